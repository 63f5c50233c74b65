//! Thread `svid-watch`: the Workload API stream.
//!
//! Every message is a full replacement of what earlier ones said. One that
//! breaks a rule is logged and leaves the old state in force.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use crossbeam_channel::select;
use grpcio::Channel;
use log::{debug, error, info, warn};
use openssl::x509::X509;

use super::error::IdentityError;
use super::svid::{Bundles, SpiffeId, Svid, TrustDomain};
use super::{Identity, SvidCell};
use crate::proto::workload::{X509SVID, X509SVIDRequest, X509SVIDResponse};
use crate::rpc::call::Options;
use crate::rpc::env::Rpc;
use crate::rpc::method::FETCH_X509_SVID;
use crate::rpc::pump::{self, Item, StreamError};
use crate::rpc::status::{Code, RpcError};
use crate::sync::clock;
use crate::sync::stop::Stop;
use crate::sync::thread::{STACK_LARGE, ThreadHandle, Threads};

/// Where the Workload API listens (`SPIFFE_ENDPOINT_SOCKET`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum WorkloadAddress {
    /// `unix:///path`
    Unix(PathBuf),
    /// `tcp://ip:port`
    Tcp(std::net::SocketAddr),
}

/// The security header that the API demands.
const HEADER: (&str, &str) = ("workload.spiffe.io", "true");
/// The pause grows by this much with each failure in a row …
const PAUSE_STEP: Duration = Duration::from_secs(1);
/// … up to this, as in go-spiffe's `workloadapi` package.
const PAUSE_MAX: Duration = Duration::from_secs(30);

/// Starts the thread; it fills `cell` and keeps it filled until stopped.
///
/// # Errors
///
/// When the thread cannot be started.
pub fn start(
    threads: &Threads,
    rpc: &Rpc,
    address: WorkloadAddress,
    cell: SvidCell,
) -> std::io::Result<ThreadHandle> {
    let rpc = rpc.clone();
    threads.spawn("svid-watch", STACK_LARGE, move |stop| {
        let channel = rpc.channel(PAUSE_STEP).connect(&address.target());
        run(&channel, &address, &cell, &stop);
    })
}

impl WorkloadAddress {
    /// The address in gRPC's syntax.
    fn target(&self) -> String {
        match self {
            Self::Unix(path) => format!("unix:{}", path.display()),
            Self::Tcp(std::net::SocketAddr::V4(address)) => format!("ipv4:{address}"),
            Self::Tcp(std::net::SocketAddr::V6(address)) => format!("ipv6:{address}"),
        }
    }
}

fn run(channel: &Channel, address: &WorkloadAddress, cell: &SvidCell, stop: &Stop) {
    let mut failures: u32 = 0;
    loop {
        let mut was_told = false;
        let ended = match watch(channel, cell, &mut was_told, stop) {
            Ok(()) => return,
            Err(ended) => ended,
        };
        failures = if was_told {
            1
        } else {
            failures.saturating_add(1)
        };
        let pause = pause(&ended, failures);
        let target = address.target();
        if is_refused_for_good(&ended) {
            // go-spiffe gives up here; a daemon without renewal would go on
            // until its certificate expires, and then fail everywhere.
            error!("Workload API at {target}: {ended}; next attempt in {pause:?}");
        } else if was_told && is_routine(&ended) {
            // An agent ends its streams now and then, and when it restarts; the
            // next attempt tells whether anything is wrong.
            debug!("Workload API at {target}: {ended}; next attempt in {pause:?}");
        } else {
            warn!("Workload API at {target}: {ended}; next attempt in {pause:?}");
        }
        if stop.wait(pause) {
            return;
        }
    }
}

fn is_refused_for_good(ended: &StreamError) -> bool {
    let StreamError::Rpc(error) = ended else {
        return false;
    };
    matches!(error.code(), Some(Code::CANCELLED | Code::INVALID_ARGUMENT))
}

/// What the end of an agent, or of its stream, looks like.
fn is_routine(ended: &StreamError) -> bool {
    match ended {
        StreamError::Rpc(error) => matches!(error.code(), Some(Code::OK | Code::UNAVAILABLE)),
        StreamError::Lagged => false,
    }
}

fn pause(ended: &StreamError, failures: u32) -> Duration {
    if is_refused_for_good(ended) {
        return PAUSE_MAX;
    }
    PAUSE_STEP.saturating_mul(failures).min(PAUSE_MAX)
}

/// Follows one stream to its end; `Ok` when the thread shall stop. `was_told` is
/// set when a message came.
fn watch(
    channel: &Channel,
    cell: &SvidCell,
    was_told: &mut bool,
    stop: &Stop,
) -> Result<(), StreamError> {
    let options = Options {
        headers: vec![(HEADER.0.to_owned(), HEADER.1.to_owned())],
        ..Options::default()
    };
    let request = X509SVIDRequest::default();
    let stream =
        pump::open(channel, &FETCH_X509_SVID, &request, &options).map_err(StreamError::Rpc)?;
    loop {
        let item = select! {
            recv(stream.items()) -> item => item,
            recv(stop.receiver()) -> _ => return Ok(()),
        };
        match item {
            Ok(Item::Message(response)) => {
                *was_told = true;
                take(&response, cell);
            }
            Ok(Item::Ended(Err(error))) => return Err(error),
            Ok(Item::Ended(Ok(()))) | Err(_) => {
                let text = "the agent ended the stream";
                return Err(StreamError::Rpc(RpcError::status(Code::OK, text)));
            }
        }
    }
}

/// Puts what a message says into the cell, if it is new: an agent says the same
/// again when it was restarted, and another identity has all connections made
/// anew. Only this thread writes the cell.
fn take(response: &X509SVIDResponse, cell: &SvidCell) {
    let present = cell.get();
    let generation = present.as_ref().map_or(0, |identity| identity.generation) + 1;
    match identity(response, generation) {
        Ok(identity) if present.is_some_and(|present| says_the_same(&present, &identity)) => {
            debug!(id = identity.svid.id.as_str(); "the present SVID was sent again");
        }
        Ok(identity) => {
            let left = identity.svid.not_after.duration_since(clock::wall());
            let id = identity.svid.id.as_str();
            match left {
                Ok(left) => info!(
                    id, generation, valid_s = left.as_secs(), trust_domains = identity.bundles.0.len();
                    "new SVID"
                ),
                Err(_) => warn!(id, generation; "new SVID, which has expired already"),
            }
            cell.set(Some(Arc::new(identity)));
        }
        Err(error) => error!("Workload API: update dropped, the old one stays: {error}"),
    }
}

fn says_the_same(one: &Identity, other: &Identity) -> bool {
    let authorities = |one: &[X509], other: &[X509]| {
        one.len() == other.len() && one.iter().all(|authority| other.contains(authority))
    };
    let (trusts, trusted) = (&one.bundles.0, &other.bundles.0);
    one.svid.chain == other.svid.chain
        && one.svid.key.public_eq(&other.svid.key)
        && trusts.len() == trusted.len()
        && trusts.iter().all(|(domain, bundle)| {
            (trusted.get(domain)).is_some_and(|others| authorities(bundle, others))
        })
}

/// Reads a message: the first SVID is the identity; all of them must be good.
fn identity(response: &X509SVIDResponse, generation: u64) -> Result<Identity, IdentityError> {
    let mut own = None;
    let mut bundles = Bundles::default();
    for svid in distinct(&response.svids) {
        let parsed = own_svid(svid)?;
        bundles.insert_der(parsed.id.trust_domain(), &svid.bundle)?;
        own.get_or_insert(parsed);
    }
    for (domain, bundle) in &response.federated_bundles {
        bundles.insert_der(TrustDomain::parse(domain)?, bundle)?;
    }
    Ok(Identity {
        svid: own.ok_or_else(|| IdentityError("no SVID in the response".to_owned()))?,
        bundles,
        generation,
    })
}

/// Leaves out SVIDs that repeat a hint, which says what an SVID is for.
fn distinct(svids: &[X509SVID]) -> impl Iterator<Item = &X509SVID> {
    let mut hints = BTreeSet::new();
    svids
        .iter()
        .filter(move |svid| svid.hint.is_empty() || hints.insert(svid.hint.as_str()))
}

fn own_svid(svid: &X509SVID) -> Result<Svid, IdentityError> {
    let named = SpiffeId::parse(&svid.spiffe_id)?;
    let parsed = Svid::from_der(&svid.x509_svid, &svid.x509_svid_key)?;
    if parsed.id != named {
        return Err(IdentityError(format!(
            "SVID of {named} has a certificate for {}",
            parsed.id
        )));
    }
    Ok(parsed)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ended(code: Code) -> StreamError {
        StreamError::Rpc(RpcError::status(code, ""))
    }

    #[test]
    fn pauses_grow_in_steps() {
        let seconds = |code, failures| pause(&ended(code), failures).as_secs();
        for (failures, expected) in [(1, 1), (2, 2), (29, 29), (30, 30), (31, 30), (u32::MAX, 30)] {
            assert_eq!(seconds(Code::UNAVAILABLE, failures), expected);
            assert_eq!(seconds(Code::PERMISSION_DENIED, failures), expected);
        }
        assert_eq!(seconds(Code::CANCELLED, 1), 30);
        assert_eq!(seconds(Code::INVALID_ARGUMENT, 1), 30);
        assert_eq!(pause(&StreamError::Lagged, 1).as_secs(), 1);
    }

    #[test]
    fn keeps_the_first_of_equal_hints() {
        let svid = |id: &str, hint: &str| X509SVID {
            spiffe_id: id.to_owned(),
            hint: hint.to_owned(),
            ..Default::default()
        };
        let all = [
            svid("a", ""),
            svid("b", "x"),
            svid("c", "x"),
            svid("d", ""),
            svid("e", "y"),
        ];
        let ids: Vec<&str> = distinct(&all).map(|svid| svid.spiffe_id.as_str()).collect();
        assert_eq!(ids, ["a", "b", "d", "e"]);
    }

    #[test]
    fn addresses_in_the_syntax_of_grpc() {
        for (address, target) in [
            (
                WorkloadAddress::Unix("/run/a.sock".into()),
                "unix:/run/a.sock",
            ),
            (
                WorkloadAddress::Tcp("127.0.0.1:80".parse().unwrap()),
                "ipv4:127.0.0.1:80",
            ),
            (
                WorkloadAddress::Tcp("[::1]:80".parse().unwrap()),
                "ipv6:[::1]:80",
            ),
        ] {
            assert_eq!(address.target(), target);
        }
    }
}
