//! Thread `nse-register`: keeps the network service and the endpoint in the
//! registry, through nsmgr (NSM: sdk registry/chains/client).

use std::collections::HashMap;
use std::convert::Infallible;
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, at, never, select};
use log::{debug, info, warn};
use protobuf::Message;

use super::convert::{system_time, timestamp};
use super::random::Random;
use super::said::{ENDPOINT, SERVICE, Said, UNREGISTER};
use crate::core::registration::{LIFETIME, Outcome, Registration, Step};
use crate::nsm::caller::NsmCaller;
use crate::proto::registry::{
    Destination, Match, NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery,
    NetworkServiceEndpointResponse, NetworkServiceLabels, NetworkServiceQuery,
};
use crate::rpc::method;
use crate::rpc::pump::{Item, Pump, StreamError};
use crate::rpc::status::{Code, RpcError};
use crate::sync::clock::{self, Now};
use crate::sync::stop::Stop;

/// The payload of the service: layer 2.
const PAYLOAD: &str = "ETHERNET";
/// The label that ties a target to the proxy of its node.
const NODE: &str = "nodeName";
/// A Go template over the request's labels (sdk pkg/tools/matchutils).
const NODE_TEMPLATE: &str = "{{.nodeName}}";
/// The registry's path, which its hops fill in; without this header they
/// refuse the call (sdk registry/common/grpcmetadata).
const PATH_HEADER: (&str, &str) = ("path", r#"{"Index":0,"PathSegments":[]}"#);

/// What is registered.
pub struct Entry {
    /// `NSM_NAME`.
    pub name: String,
    /// `NSM_SERVICE_NAME`.
    pub service_name: String,
    /// `NSM_HOST`; may be empty.
    pub node: String,
    /// The endpoint's socket, which nsmgr hands to forwarders.
    pub socket: OwnedFd,
    /// `inode://…` of the socket.
    pub url: String,
}

/// How the thread is told to leave the registry, and tells that it did.
pub struct Leaving {
    /// Set when nothing shall be registered any more; ends running calls.
    pub leave: Stop,
    /// If the endpoint shall be unregistered, until when that is tried; there
    /// before `leave` is set.
    pub by: Receiver<Instant>,
    /// Dropped when it is done, or given up.
    pub left: Sender<Infallible>,
}

/// The thread's state.
pub struct Registrar {
    caller: NsmCaller,
    entry: Entry,
    random: Box<dyn Random>,
    machine: Registration,
    watch: Option<Pump<NetworkServiceEndpointResponse>>,
    said: Said,
    /// Whether the registration was logged, which refreshes do not repeat.
    told: bool,
}

impl Registrar {
    /// Nothing is registered yet.
    #[must_use]
    pub fn new(caller: NsmCaller, entry: Entry, random: Box<dyn Random>) -> Self {
        Self {
            caller,
            entry,
            random,
            machine: Registration::new(clock::now()),
            watch: None,
            said: Said::default(),
            told: false,
        }
    }

    /// Registers once `addressed` is set, and runs until stopped.
    pub fn run(mut self, addressed: &Stop, leaving: Leaving, stop: &Stop) {
        let Leaving { leave, by, left } = leaving;
        select! {
            recv(addressed.receiver()) -> _ => self.keep(&leave, stop),
            recv(leave.receiver()) -> _ => {}
            recv(stop.receiver()) -> _ => {}
        }
        self.watch = None;
        if let Ok(deadline) = by.try_recv() {
            self.unregister(deadline, stop);
        }
        drop(left);
        // Ending without being stopped would count as a failure.
        let _ = stop.receiver().recv();
    }

    /// Keeps the endpoint registered.
    fn keep(&mut self, leave: &Stop, stop: &Stop) {
        while !leave.is_set() && !stop.is_set() {
            match self.machine.next(clock::now()) {
                Step::RegisterService => self.register_service(leave),
                Step::CheckService => self.check_service(leave),
                Step::RegisterEndpoint => self.register_endpoint(leave),
                Step::Wait(until) => self.wait(until, leave, stop),
                // Only after `leave`.
                Step::Unregister | Step::Done => return,
            }
        }
    }

    fn wait(&mut self, until: Instant, leave: &Stop, stop: &Stop) {
        let silent = never();
        let items = self.watch.as_ref().map_or(&silent, Pump::items);
        let item = select! {
            recv(items) -> item => Some(item),
            recv(at(until)) -> _ => None,
            recv(leave.receiver()) -> _ => None,
            recv(stop.receiver()) -> _ => None,
        };
        match item {
            None => {}
            Some(Ok(Item::Message(event))) => self.own_entry(&event),
            Some(Ok(Item::Ended(Err(StreamError::Lagged)))) => {
                self.watch = None;
                self.open_watch(leave);
            }
            Some(Ok(Item::Ended(ended))) => {
                let why = ended.map_or_else(|error| error.to_string(), |()| "ended".to_owned());
                info!("the watch of the own registry entry is lost ({why}): registering anew");
                self.told = false;
                self.watch = None;
                self.machine.watch_ended(clock::now());
            }
            Some(Err(_)) => {
                self.watch = None;
                self.machine.watch_ended(clock::now());
            }
        }
    }

    fn own_entry(&mut self, event: &NetworkServiceEndpointResponse) {
        let name = &event.network_service_endpoint.get_or_default().name;
        if event.deleted && *name == self.entry.name {
            info!("the own registry entry was removed: registering anew");
            self.told = false;
            self.machine.entry_deleted(clock::now());
        }
    }

    fn register_service(&mut self, leave: &Stop) {
        let service = service(&self.entry);
        let answer = self.call(&method::NS_REGISTER, &service, false, leave);
        let outcome = self.judge(SERVICE, answer.as_ref().err());
        self.machine.service_answered(outcome, clock::now());
    }

    fn check_service(&mut self, leave: &Stop) {
        let same = match self.find_service(leave) {
            Ok(found) => found
                .iter()
                .any(|other| is_same(other, &service(&self.entry))),
            Err(error) => {
                debug!("looking for the network service failed: {error}");
                false
            }
        };
        if self.said.shared(same) {
            info!(
                service = self.entry.service_name;
                "this proxy may not register its network service, but the registry has the same"
            );
        }
        self.machine.service_checked(same, clock::now());
    }

    fn find_service(&self, leave: &Stop) -> Result<Vec<NetworkService>, String> {
        let query = NetworkServiceQuery {
            network_service: Some(NetworkService {
                name: self.entry.service_name.clone(),
                ..NetworkService::default()
            })
            .into(),
            ..NetworkServiceQuery::default()
        };
        let deadline = self.deadline();
        let pump = self
            .caller
            .stream(&method::NS_FIND, &query, deadline, leave)
            .map_err(|error| error.to_string())?;
        let mut found = Vec::new();
        loop {
            let item = select! {
                recv(pump.items()) -> item => item.map_err(|error| error.to_string())?,
                recv(at(deadline)) -> _ => return Err("no answer in time".to_owned()),
                recv(leave.receiver()) -> _ => return Err("stopped".to_owned()),
            };
            match item {
                Item::Message(response) if !response.deleted => {
                    found.extend(response.network_service.into_option());
                }
                Item::Message(_) => {}
                Item::Ended(Ok(())) => return Ok(found),
                Item::Ended(Err(error)) => return Err(error.to_string()),
            }
        }
    }

    fn register_endpoint(&mut self, leave: &Stop) {
        let endpoint = endpoint(&self.entry, Now::read());
        let answer = self.call(&method::NSE_REGISTER, &endpoint, true, leave);
        let outcome = self.judge(ENDPOINT, answer.as_ref().err());
        let (Ok(response), Outcome::Done) = (answer, outcome) else {
            return self.machine.endpoint_failed(clock::now());
        };
        let now = Now::read();
        let left = system_time(&response.expiration_time).map_or(LIFETIME, |at| now.until(at));
        let mut jitter = [0u8; 1];
        // Without randomness the refreshes are not spread; nothing else.
        let _ = self.random.fill(&mut jitter);
        self.machine.endpoint_registered(left, jitter[0], now.mono);
        if !std::mem::replace(&mut self.told, true) {
            info!(
                endpoint = self.entry.name, service = self.entry.service_name;
                "the endpoint is registered"
            );
        }
        self.open_watch(leave);
    }

    /// The only sign of a restart of nsmgr or registry is the end of a stream.
    fn open_watch(&mut self, leave: &Stop) {
        if self.watch.is_some() {
            return;
        }
        let query = NetworkServiceEndpointQuery {
            network_service_endpoint: Some(NetworkServiceEndpoint {
                name: self.entry.name.clone(),
                ..NetworkServiceEndpoint::default()
            })
            .into(),
            watch: true,
            ..NetworkServiceEndpointQuery::default()
        };
        match self
            .caller
            .stream(&method::NSE_FIND, &query, self.deadline(), leave)
        {
            Ok(pump) => self.watch = Some(pump),
            Err(error) => {
                debug!("watching the own registry entry failed: {error}");
                self.machine.watch_ended(clock::now());
            }
        }
    }

    fn unregister(&mut self, deadline: Instant, stop: &Stop) {
        self.machine.leave(clock::now());
        loop {
            let now = clock::now();
            match self.machine.next(now) {
                Step::Wait(until) if until < deadline => {
                    if stop.wait(until.duration_since(now)) {
                        return;
                    }
                }
                Step::Unregister if now < deadline => self.try_unregister(deadline, stop),
                Step::Done => return,
                _ => {
                    warn!("the endpoint may still be in the registry, until its entry expires");
                    return;
                }
            }
        }
    }

    fn try_unregister(&mut self, deadline: Instant, stop: &Stop) {
        let endpoint = endpoint(&self.entry, Now::read());
        let deadline = deadline.min(self.deadline());
        let answer = self.call_by(&method::NSE_UNREGISTER, &endpoint, true, deadline, stop);
        let outcome = self.judge(UNREGISTER, answer.as_ref().err());
        if outcome == Outcome::Done {
            info!("the endpoint has left the registry");
        }
        self.machine.unregistered(outcome, clock::now());
    }

    fn deadline(&self) -> Instant {
        clock::now() + self.machine.attempt_timeout()
    }

    fn call<Req, Resp>(
        &self,
        method: &grpcio::Method<Req, Resp>,
        request: &Req,
        with_socket: bool,
        stop: &Stop,
    ) -> Result<Resp, RpcError>
    where
        Req: Message,
        Resp: Message + Unpin,
    {
        self.call_by(method, request, with_socket, self.deadline(), stop)
    }

    /// The socket goes with every attempt: after one that failed, nsmgr has
    /// closed its copy (sdk registry/common/recvfd).
    fn call_by<Req, Resp>(
        &self,
        method: &grpcio::Method<Req, Resp>,
        request: &Req,
        with_socket: bool,
        deadline: Instant,
        stop: &Stop,
    ) -> Result<Resp, RpcError>
    where
        Req: Message,
        Resp: Message + Unpin,
    {
        let headers = [(PATH_HEADER.0.to_owned(), PATH_HEADER.1.to_owned())];
        let descriptors = || -> Vec<OwnedFd> {
            if !with_socket {
                return Vec::new();
            }
            match self.entry.socket.try_clone() {
                Ok(fd) => vec![fd],
                Err(error) => {
                    warn!("the endpoint's socket cannot be passed to nsmgr: {error}");
                    Vec::new()
                }
            }
        };
        self.caller
            .unary(method, request, &headers, &descriptors, deadline, stop)
            .map(|reply| reply.message)
    }

    /// Logs a failure that was not logged yet, and the recovery.
    fn judge(&mut self, what: &'static str, error: Option<&RpcError>) -> Outcome {
        let Some(error) = error else {
            if self.said.succeeded(what) {
                info!("{what} succeeded");
            }
            return Outcome::Done;
        };
        if *error == RpcError::Cancelled {
            // By ourselves, to stop.
            return Outcome::Failed;
        }
        if self.said.failed(what, error) {
            warn!("{what} failed and is tried again: {error}");
        } else {
            debug!("{what} failed again: {error}");
        }
        if error.code() == Some(Code::PERMISSION_DENIED) {
            Outcome::Denied
        } else {
            Outcome::Failed
        }
    }
}

/// The network service: a target's request matches the endpoint of its node.
fn service(entry: &Entry) -> NetworkService {
    let selector = HashMap::from([(NODE.to_owned(), NODE_TEMPLATE.to_owned())]);
    NetworkService {
        name: entry.service_name.clone(),
        payload: PAYLOAD.to_owned(),
        matches: vec![Match {
            source_selector: selector.clone(),
            routes: vec![Destination {
                destination_selector: selector,
                ..Destination::default()
            }],
            ..Match::default()
        }],
        ..NetworkService::default()
    }
}

/// Whether another proxy's registration does what ours would.
fn is_same(other: &NetworkService, ours: &NetworkService) -> bool {
    other.name == ours.name && other.payload == ours.payload && other.matches == ours.matches
}

fn endpoint(entry: &Entry, now: Now) -> NetworkServiceEndpoint {
    let mut labels = NetworkServiceLabels::default();
    if !entry.node.is_empty() {
        labels.labels.insert(NODE.to_owned(), entry.node.clone());
    }
    NetworkServiceEndpoint {
        name: entry.name.clone(),
        network_service_names: vec![entry.service_name.clone()],
        network_service_labels: HashMap::from([(entry.service_name.clone(), labels)]),
        url: entry.url.clone(),
        expiration_time: timestamp(now.wall + LIFETIME),
        ..NetworkServiceEndpoint::default()
    }
}

/// Bound of the wait for [`Leaving::left`] beyond the deadline given to it.
pub const LEAVE_GRACE: Duration = Duration::from_millis(50);

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(node: &str) -> Entry {
        Entry {
            name: "proxy-1".to_owned(),
            service_name: "proxy.c.t.ns".to_owned(),
            node: node.to_owned(),
            socket: std::fs::File::open("/dev/null").unwrap().into(),
            url: "inode://1/2".to_owned(),
        }
    }

    #[test]
    fn what_is_registered() {
        let ours = service(&entry("node-a"));
        assert_eq!(
            (ours.name.as_str(), ours.payload.as_str()),
            ("proxy.c.t.ns", "ETHERNET")
        );
        let one = &ours.matches[0];
        let selector = HashMap::from([("nodeName".to_owned(), "{{.nodeName}}".to_owned())]);
        assert_eq!(ours.matches.len(), 1);
        assert_eq!(one.source_selector, selector);
        assert_eq!(one.routes.len(), 1);
        assert_eq!(one.routes[0].destination_selector, selector);
        assert!(!one.fallthrough && one.metadata.is_none() && one.routes[0].weight == 0);

        let now = Now::read();
        let nse = endpoint(&entry("node-a"), now);
        assert_eq!(nse.name, "proxy-1");
        assert_eq!(nse.network_service_names, ["proxy.c.t.ns"]);
        let labels = &nse.network_service_labels["proxy.c.t.ns"].labels;
        assert_eq!(
            *labels,
            HashMap::from([("nodeName".to_owned(), "node-a".to_owned())])
        );
        assert_eq!(nse.url, "inode://1/2");
        assert_eq!(system_time(&nse.expiration_time), Some(now.wall + LIFETIME));

        let nameless = endpoint(&entry(""), now);
        let labels = &nameless.network_service_labels["proxy.c.t.ns"];
        assert!(
            labels.labels.is_empty(),
            "the entry for the service is there all the same"
        );
    }

    #[test]
    fn the_same_service_of_another_proxy() {
        let ours = service(&entry("node-a"));
        let mut other = service(&entry("node-b"));
        other.path_ids.push("spiffe://td/other".to_owned());
        assert!(is_same(&other, &ours));
        for change in [
            |other: &mut NetworkService| other.payload = "IP".to_owned(),
            |other: &mut NetworkService| other.matches.clear(),
            |other: &mut NetworkService| other.name.clear(),
        ] {
            let mut changed = other.clone();
            change(&mut changed);
            assert!(!is_same(&changed, &ours));
        }
    }
}
