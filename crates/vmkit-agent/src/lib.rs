//! The guest agent: wire protocol, the host's client, and the agent itself.
//!
//! ```text
//!   host: Client ── exec, ping, shutdown …             guest: agent ── processes
//!           │  one stream per command and per              │
//!           │  standard stream, each with its own          │
//!           ▼  flow control                                ▼
//!        yamux  ◀───────────────────────────────────▶   yamux
//!        link   ◀── marker, version, nonce, escape ──▶   link
//!        unix socket ─── QEMU ─── virtio-serial ─── /dev/vportNpM
//! ```
//!
//! The line outlives its users: the [`link`] layer makes the beginning of a session unmistakable, whatever an earlier host
//! left on it. Any byte stream will do; virtio-serial is what our images use.
//!
//! The agent is a static binary. Built by
//! `RUSTFLAGS="-C target-feature=+crt-static" cargo build --profile agent -p vmkit-agent --target x86_64-unknown-linux-gnu`
//! (`make agent`).

pub mod agent;
pub mod client;
pub mod link;
mod mux;
pub mod protocol;
