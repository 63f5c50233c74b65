//! IPAM and NSP of the lab as a process, for peers that are not Rust: identity
//! from the Workload API, addresses from the environment, and one command a
//! line on standard input: `vips ADDRESS...` sets the trench's VIPs, and
//! `exit` or the end of the input ends it.
//!
//! `SPIFFE_ENDPOINT_SOCKET`, `LAB_TRENCH`, `LAB_CONDUIT`.

use std::io::{self, BufRead, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use meridio_lab::infra::{IPAM_PORT, NSP_PORT};
use meridio_lab::ipam::{Ipam, IpamOptions};
use meridio_lab::link::host;
use meridio_lab::nsp::Nsp;
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::spiffe::SvidCell;
use meridio_proxy::spiffe::workload::{self, WorkloadAddress};
use meridio_proxy::sync::thread::Threads;

/// How long the first identity may take.
const IDENTITY: Duration = Duration::from_secs(60);

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "services: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<(), String> {
    let socket = variable("SPIFFE_ENDPOINT_SOCKET")?;
    let path = (socket.strip_prefix("unix://")).ok_or("SPIFFE_ENDPOINT_SOCKET: not unix://")?;
    let (trench, conduit) = (variable("LAB_TRENCH")?, variable("LAB_CONDUIT")?);
    let (threads, rpc) = (Threads::unsupervised(), Rpc::new());
    let cell = SvidCell::new(None);
    let changed = cell.subscribe();
    let address = WorkloadAddress::Unix(PathBuf::from(path));
    let _svid = workload::start(&threads, &rpc, address, cell.clone())
        .map_err(|error| error.to_string())?;
    while cell.get().is_none() {
        (changed.recv_timeout(IDENTITY)).map_err(|error| format!("no identity: {error}"))?;
    }
    let ipam = Ipam::new(&threads, &IpamOptions::new(&trench, &conduit))?;
    ipam.serve(&threads, &rpc, cell.clone(), listen(IPAM_PORT)?)?;
    let nsp = Nsp::new(&trench);
    nsp.serve(&threads, &rpc, cell, listen(NSP_PORT)?)?;
    say("ready")?;
    for line in io::stdin().lock().lines() {
        let line = line.map_err(|error| error.to_string())?;
        let mut words = line.split_whitespace();
        match words.next() {
            Some("vips") => {
                let vips: Result<Vec<IpAddr>, _> = words.map(str::parse).collect();
                let vips = vips.map_err(|error| format!("{line}: {error}"))?;
                let texts: Vec<String> = vips.iter().map(|vip| host(*vip).to_string()).collect();
                nsp.set_vips(texts.iter().map(String::as_str));
                say("ok")?;
            }
            Some("exit") => break,
            _ => return Err(format!("unknown command: {line:?}")),
        }
    }
    Ok(())
}

fn listen(port: u16) -> Result<TcpListener, String> {
    let any = SocketAddr::new(IpAddr::V6(Ipv6Addr::UNSPECIFIED), port);
    TcpListener::bind(any).map_err(|error| format!("port {port}: {error}"))
}

fn variable(name: &str) -> Result<String, String> {
    std::env::var(name).map_err(|error| format!("{name}: {error}"))
}

fn say(line: &str) -> Result<(), String> {
    let mut out = io::stdout();
    writeln!(out, "{line}")
        .and_then(|()| out.flush())
        .map_err(|error| error.to_string())
}
