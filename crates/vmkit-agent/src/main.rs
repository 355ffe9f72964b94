//! The guest agent's executable: process 1 in our images, an ordinary service elsewhere.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use lexopt::prelude::*;
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use vmkit_agent::agent::{Agent, Line, Port, init, ports, ports_to_come};

const HELP: &str = "\
The guest agent of vmkit: executes commands for the host.

Usage: vmkit-agent [--listen virtio|unix:PATH|tcp:ADDRESS:PORT]

  --listen WHERE  virtio (the default): every port whose name begins with org.vmkit.agent.
                  unix, tcp: for tests and for guests without virtio-serial; nobody is authenticated
  --version       print the versions of the program and of the protocol
  --help          print this

As process 1 it loads the modules of its initramfs, mounts the root disk and reaps orphans.
";

/// How long after the first look for ports the second is; from then on each takes twice as long to come. A guest that was saved
/// soon after its boot and goes on is to have something better to do.
const LOOKS: Duration = Duration::from_millis(10);
/// How long ports are looked for that appear late: the kernel announces a device's one after the other, within moments.
const LATE: Duration = Duration::from_secs(5);
/// How long there may be none before that is an error.
const APPEARS: Duration = Duration::from_secs(60);

enum Listen {
    Virtio,
    Unix(PathBuf),
    Tcp(String),
}

fn main() -> ExitCode {
    let first = std::process::id() == 1;
    if first {
        // Kernels before 5.16 end every process that has its memory with one that dumps it, and nothing can run without process 1.
        let _ = set_dumpable_behavior(DumpableBehavior::NotDumpable);
    }
    if first && let Err(error) = init() {
        vmkit_agent::agent::give_up(&error);
        return ExitCode::FAILURE;
    }
    // What the kernel passes on to process 1 is not for us.
    let listen = if first { Ok(Some(Listen::Virtio)) } else { arguments() };
    let listen = match listen {
        Ok(Some(listen)) => listen,
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("vmkit-agent: {error}; see --help");
            return ExitCode::from(2);
        }
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let result = runtime.and_then(|runtime| runtime.block_on(serve(listen)));
    if let Err(error) = result {
        eprintln!("vmkit-agent: {error}");
        if first {
            vmkit_agent::agent::give_up(&error);
        }
    }
    ExitCode::FAILURE
}

fn arguments() -> Result<Option<Listen>, lexopt::Error> {
    let mut listen = Listen::Virtio;
    let mut parser = lexopt::Parser::from_env();
    while let Some(arg) = parser.next()? {
        match arg {
            Long("listen") => {
                let value = parser.value()?.string()?;
                listen = match value.split_once(':') {
                    None if value == "virtio" => Listen::Virtio,
                    Some(("unix", path)) => Listen::Unix(path.into()),
                    Some(("tcp", address)) => Listen::Tcp(address.to_owned()),
                    _ => return Err(format!("cannot listen on {value:?}").into()),
                };
            }
            Long("version") => {
                println!("vmkit-agent {} (protocol {})", env!("CARGO_PKG_VERSION"), vmkit_agent::link::VERSION);
                return Ok(None);
            }
            Long("help") | Short('h') => {
                print!("{HELP}");
                return Ok(None);
            }
            _ => return Err(arg.unexpected()),
        }
    }
    Ok(Some(listen))
}

async fn serve(listen: Listen) -> std::io::Result<()> {
    let agent = Agent::new()?;
    match listen {
        Listen::Virtio => virtio(agent).await,
        Listen::Unix(path) => {
            let listener = tokio::net::UnixListener::bind(path)?;
            agent.watch(&listener)?;
            loop {
                let (line, _) = listener.accept().await?;
                serve_socket(&agent, line.into_std()?.into())?;
            }
        }
        Listen::Tcp(address) => {
            let listener = tokio::net::TcpListener::bind(address).await?;
            agent.watch(&listener)?;
            loop {
                let (line, _) = listener.accept().await?;
                line.set_nodelay(true)?;
                serve_socket(&agent, line.into_std()?.into())?;
            }
        }
    }
}

fn serve_socket(agent: &Agent, socket: OwnedFd) -> std::io::Result<()> {
    let serves = agent.serve_port(Port::socket(socket)?, Line::Once);
    tokio::spawn(async move { report(serves.await) });
    Ok(())
}

async fn virtio(agent: Agent) -> std::io::Result<()> {
    let mut served: Vec<PathBuf> = Vec::new();
    let mut waited = Duration::ZERO;
    let mut looks = Some(agent.hold());
    let to_come = ports_to_come();
    loop {
        for node in ports() {
            if !served.contains(&node) {
                if served.is_empty() {
                    // From here on it is about those that are late.
                    waited = Duration::ZERO;
                }
                let port = Port::open(&node)?;
                let serves = agent.serve_port(port, Line::Lasting);
                tokio::spawn(async move { report(serves.await) });
                served.push(node);
            }
        }
        if served.is_empty() && waited > APPEARS {
            let message = "no virtio port named org.vmkit.agent.* has appeared";
            return Err(std::io::Error::new(std::io::ErrorKind::NotFound, message));
        }
        let complete = to_come.is_some_and(|all| served.len() >= all);
        if !served.is_empty() && (complete || waited > LATE) {
            drop(looks.take());
            std::future::pending::<()>().await;
        }
        let pause = if served.is_empty() { LOOKS } else { LOOKS.max(waited) };
        tokio::select! {
            // What has not appeared by then never will, and nobody who goes on from here is to look for it.
            () = agent.prepares() => {
                drop(looks.take());
                std::future::pending().await
            }
            () = tokio::time::sleep(pause) => {}
        }
        waited += pause;
    }
}

fn report(result: std::io::Result<()>) {
    if let Err(error) = result {
        eprintln!("vmkit-agent: a line failed: {error}");
    }
}
