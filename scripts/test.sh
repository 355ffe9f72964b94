#!/usr/bin/env bash
# Every test, real VMs included. A test that cannot run here fails: nothing is skipped in silence.
set -euo pipefail
cd "$(dirname "$0")/.."
# Of no use to vmkit itself: one test's guest has SSH host keys, and the program that makes them is this machine's.
command -v ssh-keygen >/dev/null || {
  as_root=(); [ "$(id -u)" = 0 ] || as_root=(sudo)
  "${as_root[@]}" apt-get -qq -o DPkg::Lock::Timeout=600 install -y --no-install-recommends openssh-client >/dev/null
}
export VMKIT_REQUIRE="${VMKIT_REQUIRE:-qemu}"
cargo test --locked --workspace --all-features
