//! Parts of the lab as a process, for peers that are not Rust. One command a
//! line on standard input; each is answered with `ok`, after lines of its own.
//!
//! `services`: IPAM and NSP, with an identity from the Workload API
//! (`SPIFFE_ENDPOINT_SOCKET`, `LAB_TRENCH`, `LAB_CONDUIT`). `vips ADDRESS...`
//! sets the trench's VIPs; `stop` and `start` with `ipam` or `nsp` end the
//! server and serve again with what it knew; `leases` tells IPAM's table.
//!
//! `services nsmgr`: nsmgr with registry and forwarder on `LAB_SOCKET`, and a
//! Workload API `LAB_IDENTITIES/NAME.sock` for each name among the arguments.
//! `state` tells what is there, `refusals` what was refused, `restart` replaces
//! nsmgr.

use std::io::{self, BufRead, Write};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener};
use std::path::PathBuf;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use meridio_lab::agent::Agent;
use meridio_lab::infra::{IPAM_PORT, NSP_PORT};
use meridio_lab::ipam::{Ipam, IpamOptions};
use meridio_lab::link::host;
use meridio_lab::nsmgr::{Nsmgr, NsmgrOptions};
use meridio_lab::nsp::Nsp;
use meridio_lab::pki::Pki;
use meridio_lab::veth::VethDatapath;
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::spiffe::SvidCell;
use meridio_proxy::spiffe::workload::{self, WorkloadAddress};
use meridio_proxy::sync::thread::Threads;

/// How long the first identity may take.
const IDENTITY: Duration = Duration::from_secs(60);
/// The life of the lab's tokens, as of NSM's by default.
const TOKENS: Duration = Duration::from_secs(600);
const TRUST_DOMAIN: &str = "example.org";

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let done = match args.next().as_deref() {
        None => serve_ipam_and_nsp(),
        Some("nsmgr") => serve_nsmgr(args),
        Some(other) => Err(format!("unknown role {other:?}")),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(io::stderr(), "services: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve_ipam_and_nsp() -> Result<(), String> {
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
    let nsp = Nsp::new(&trench);
    let serve = |what: &str| match what {
        "ipam" => ipam.serve(&threads, &rpc, cell.clone(), listen(IPAM_PORT)?),
        "nsp" => nsp.serve(&threads, &rpc, cell.clone(), listen(NSP_PORT)?),
        other => Err(format!("neither ipam nor nsp: {other:?}")),
    };
    serve("ipam")?;
    serve("nsp")?;
    commands(|words| {
        match words {
            ["vips", vips @ ..] => {
                let vips: Result<Vec<IpAddr>, _> = vips.iter().map(|vip| vip.parse()).collect();
                let vips = vips.map_err(|error| format!("{words:?}: {error}"))?;
                let texts: Vec<String> = vips.iter().map(|vip| host(*vip).to_string()).collect();
                nsp.set_vips(texts.iter().map(String::as_str));
            }
            ["stop", "ipam"] => ipam.stop(),
            ["stop", "nsp"] => nsp.stop(),
            ["start", what] => serve(what)?,
            ["leases"] => {
                let leases = ipam.allocations().into_iter();
                let leases: Vec<String> = leases
                    .map(|(key, network)| format!("{}={network}", key.child))
                    .collect();
                say(&format!("leases {}", leases.join(" ")))?;
            }
            _ => return Err(format!("unknown command: {words:?}")),
        }
        Ok(())
    })
}

fn serve_nsmgr(identities: impl Iterator<Item = String>) -> Result<(), String> {
    let folder = PathBuf::from(variable("LAB_IDENTITIES")?);
    let trust = Pki::new(TRUST_DOMAIN);
    let _agents: Vec<Agent> = identities
        .map(|name| {
            let id = trust.id(&format!("ns/red/pod/{name}"));
            Agent::start(&folder.join(format!("{name}.sock")), &trust, &id, TOKENS)
        })
        .collect();
    let datapath = Arc::new(VethDatapath::new());
    let nsmgr = Nsmgr::start(NsmgrOptions {
        socket: PathBuf::from(variable("LAB_SOCKET")?),
        trust: Arc::new(trust),
        node: variable("NODE_NAME")?,
        datapath: Arc::clone(&datapath) as _,
        token_lifetime: TOKENS,
    })?;
    commands(|words| {
        match words {
            ["state", service] => {
                let ((monitors, finds), connections) = (nsmgr.streams(), nsmgr.connections());
                say(&format!(
                    "state connections={} crosses={} made={} monitors={monitors} finds={finds} endpoints={}",
                    connections.len(),
                    nsmgr.crosses(),
                    datapath.made(),
                    nsmgr.registered(service).join(","),
                ))?;
            }
            ["refusals"] => {
                for line in nsmgr.refusals() {
                    say(&format!("note {}", line.replace('\n', " ")))?;
                }
            }
            ["restart"] => nsmgr.restart()?,
            _ => return Err(format!("unknown command: {words:?}")),
        }
        Ok(())
    })
}

/// Executes the lines of standard input until it ends.
fn commands(execute: impl Fn(&[&str]) -> Result<(), String>) -> Result<(), String> {
    say("ready")?;
    for line in io::stdin().lock().lines() {
        let line = line.map_err(|error| error.to_string())?;
        let words: Vec<&str> = line.split_whitespace().collect();
        execute(&words)?;
        say("ok")?;
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
