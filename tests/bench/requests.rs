//! Requests of targets, as the endpoint answers them: a forwarder dials anew
//! for each, with a path of three hops and their tokens. No interface is made,
//! which in the lab would take longer than the daemon does.

use std::path::Path;
use std::time::Duration;

use meridio_lab::client::{NsmClient, Session};
use meridio_lab::forwarder::mechanism;
use meridio_lab::policy::Hop;
use meridio_lab::topology::{Topology, TopologyOptions};
use meridio_proxy::core::lease::Verb;
use meridio_proxy::proto::connection::{self, Connection, PathSegment};
use meridio_proxy::proto::networkservice::NetworkServiceRequest;
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::sync::clock;

use crate::report::{Aim, Report, millis};
use crate::size::cpu;

const REPEATS: usize = 5;
/// Where a forwarder's patience with a Request ends.
const LIMIT: Duration = Duration::from_secs(15);
const TOKEN_LIFETIME: Duration = Duration::from_secs(600);

pub fn run(report: &mut Report) -> Result<(), String> {
    for slow in [0, 5] {
        for count in [1, 16, 120] {
            round(report, count, Duration::from_millis(slow))?;
        }
    }
    Ok(())
}

fn round(report: &mut Report, count: usize, slow: Duration) -> Result<(), String> {
    let lab = Topology::start(TopologyOptions {
        lbs: 1,
        targets: 0,
        env: [("NSM_LOG_LEVEL", "INFO"), ("NSM_IP_RELEASE_DELAY", "1ms")]
            .map(|(key, value)| (key.to_owned(), value.to_owned()))
            .into(),
        ..TopologyOptions::default()
    })?;
    lab.ipam.set_delay(Verb::Allocate, slow);
    let mesh = Mesh::of(&lab);
    let socket = lab.endpoint_socket()?;
    let leases = lab.ipam.allocations().len();
    let pid = lab.daemon()?.pid();
    let (mut all, mut each, mut used) = (Vec::new(), Vec::new(), Vec::new());
    for repeat in 0..REPEATS {
        let requests = (0..count).map(|number| mesh.request(&lab, &format!("{repeat}-{number}")));
        let requests = requests.collect::<Result<Vec<_>, String>>()?;
        let before = cpu(pid);
        let begun = clock::now();
        let answers = at_once(&requests, |request| mesh.ask(&socket, request))?;
        all.push(begun.elapsed());
        used.push(millis(cpu(pid).saturating_sub(before)) / count as f64);
        each.extend(answers.iter().map(|(time, _)| *time));
        let closed = at_once(&answers, |(_, (session, answer))| {
            session
                .close(answer, LIMIT)
                .map_err(|error| error.to_string())
        });
        closed?;
        // A node's prefix has no room for two rounds.
        let deadline = clock::now() + LIMIT;
        lab.ipam.wait(deadline, |table, _| table.len() <= leases)?;
    }
    let what = format!("{count} targets, IPAM {} ms", slow.as_millis());
    let aims: &[Aim] = if (count, slow) == (120, Duration::from_millis(5)) {
        &[Aim::Median(2000.0)]
    } else {
        &[]
    };
    report.add_times(&format!("{what}: all served"), &all, aims);
    report.add_times(&format!("{what}: dial and Request"), &each, &[]);
    let rates: Vec<f64> = (all.iter())
        .map(|time| count as f64 / time.as_secs_f64())
        .collect();
    report.add(&format!("{what}: rate"), "Requests/s", &rates, &[]);
    report.add(&format!("{what}: daemon's time each"), "CPU ms", &used, &[]);
    Ok(())
}

/// Who stands between a target and the endpoint.
struct Mesh {
    nsmgr: Hop,
    client: NsmClient,
}

impl Mesh {
    fn of(lab: &Topology) -> Self {
        let hop = |name: &str| {
            let account = format!("ns/nsm/sa/{name}");
            Hop::new(lab.pki(), &account, name, TOKEN_LIFETIME)
        };
        Self {
            nsmgr: hop("nsmgr"),
            client: NsmClient::new(hop("forwarder"), Rpc::new()),
        }
    }

    /// A target's first Request as the forwarder sends it.
    fn request(&self, lab: &Topology, id: &str) -> Result<NetworkServiceRequest, String> {
        let target = Hop::new(lab.pki(), "ns/red/sa/target", id, TOKEN_LIFETIME);
        let mut connection = Connection {
            id: id.to_owned(),
            network_service: lab.proxy_service(),
            payload: "ETHERNET".to_owned(),
            path: Some(connection::Path {
                path_segments: vec![PathSegment {
                    name: target.name.clone(),
                    id: id.to_owned(),
                    ..Default::default()
                }],
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let mut caller = &target;
        for hop in [&self.nsmgr, &self.client.hop] {
            let peer = caller.as_peer();
            let token = caller.token(&hop.as_peer());
            token
                .and_then(|token| hop.admit(&mut connection, &peer, &token, &hop.identity()))
                .map_err(|error| error.to_string())?;
            caller = hop;
        }
        Ok(NetworkServiceRequest {
            connection: Some(connection).into(),
            mechanism_preferences: vec![mechanism("", "")],
            ..Default::default()
        })
    }

    fn ask(
        &self,
        socket: &Path,
        request: &NetworkServiceRequest,
    ) -> Result<(Duration, (Session, Connection)), String> {
        let begun = clock::now();
        let session = self.client.dial(socket);
        let answered = session.and_then(|session| {
            let answer = session.request(request, &[], LIMIT)?;
            Ok((session, answer))
        });
        let answered = answered.map_err(|error| error.to_string())?;
        Ok((begun.elapsed(), answered))
    }
}

/// Does something with all at once, each on a thread of its own.
fn at_once<T: Sync, R: Send>(
    all: &[T],
    act: impl Fn(&T) -> Result<R, String> + Sync,
) -> Result<Vec<R>, String> {
    let act = &act;
    std::thread::scope(|scope| {
        let running: Vec<_> = all
            .iter()
            .map(|one| scope.spawn(move || act(one)))
            .collect();
        let joined = running.into_iter().map(|thread| {
            let done = thread.join().map_err(|_| "a caller panicked".to_owned());
            done.and_then(|done| done)
        });
        joined.collect()
    })
}
