//! Thread `lb-watch`: follows the registry and starts and stops the sessions.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, at, bounded, never, select};
use log::{debug, info, warn};

use super::LbOptions;
use super::client::{Leases, Nsmgr, Stream};
use super::convert::{self, Template};
use super::error;
use super::ifname;
use super::lb_worker::{LbWorker, Shared};
use super::trouble::{Ends, Troubles};
use crate::core::ids::EndpointName;
use crate::core::lb_session::LbSession;
use crate::core::mesh::{MOST, Mesh, MeshAction};
use crate::core::retry::Jitter;
use crate::proto::registry::NetworkServiceEndpointResponse;
use crate::rpc::pump::Item;
use crate::sync::clock::{self, Now};
use crate::sync::stop::Stop;
use crate::sync::thread::{STACK_SMALL, ThreadHandle, Threads};

/// Pause before the stream is opened again, whatever ended it.
const REOPEN_PAUSE: Duration = Duration::from_millis(500);
/// Bound of waiting for a connection to nsmgr.
const OPEN_TIMEOUT: Duration = Duration::from_secs(5);
/// Bound of a full list; the stream ends by itself.
const LIST_TIMEOUT: Duration = Duration::from_secs(15);
/// Refused names that are remembered, so that each is warned of once.
const REFUSED_MOST: usize = 64;
/// Streams in a row that brought nothing, before that is warned of.
const FRUITLESS: u32 = 2;

/// The causes of warnings.
const OPEN: &str = "open";
const WATCH: &str = "watch";
const LIST: &str = "list";

type Answers = Stream<NetworkServiceEndpointResponse>;

pub(super) struct LbWatch<N, L> {
    threads: Threads,
    shared: Shared<N, L>,
    options: LbOptions,
    mesh: Mesh,
    sessions: BTreeMap<EndpointName, Session>,
    ended: (Sender<EndpointName>, Receiver<EndpointName>),
    number: u32,
    watch: Option<Answers>,
    reopen_at: Instant,
    ends: Ends,
    list: Option<(Answers, Instant)>,
    refused: BTreeSet<String>,
    /// What was warned of, so that an outage is one warning a cause.
    troubles: Troubles,
}

/// A session's thread, and the way to tell it that another process has its
/// endpoint's name.
struct Session {
    thread: ThreadHandle,
    news: Sender<()>,
}

/// What a turn brought.
enum Turn {
    Stop,
    Timer,
    Ended(EndpointName),
    Watched(Option<Item<NetworkServiceEndpointResponse>>),
    Listed(Option<Item<NetworkServiceEndpointResponse>>),
}

impl<N: Nsmgr, L: Leases> LbWatch<N, L> {
    /// `now` begins the time of the first list.
    pub(super) fn new(
        threads: Threads,
        shared: Shared<N, L>,
        options: LbOptions,
        now: Instant,
    ) -> Self {
        Self {
            threads,
            shared,
            options,
            mesh: Mesh::new(now),
            sessions: BTreeMap::new(),
            // A session sends once, and there are no more than that.
            ended: bounded(MOST),
            number: 0,
            watch: None,
            reopen_at: now,
            ends: Ends::default(),
            list: None,
            refused: BTreeSet::new(),
            troubles: Troubles::default(),
        }
    }

    /// Runs until `stop`; returns the sessions, which have been told to stop.
    pub(super) fn run(mut self, stop: &Stop) -> Vec<ThreadHandle> {
        loop {
            self.open_due(stop);
            match self.turn(stop) {
                Turn::Stop => break,
                Turn::Timer => {}
                Turn::Ended(name) => {
                    self.sessions.remove(&name);
                    let action = self.mesh.ended(&name, clock::now());
                    self.act(action);
                }
                Turn::Watched(item) => self.watched(item),
                Turn::Listed(item) => self.listed(item),
            }
        }
        self.sessions
            .into_values()
            .map(|mut session| {
                session.thread.stop();
                session.thread
            })
            .collect()
    }

    fn turn(&self, stop: &Stop) -> Turn {
        let quiet = never();
        let watch = self.watch.as_ref().map_or(&quiet, Stream::items);
        let list = self.list.as_ref().map_or(&quiet, |(list, _)| list.items());
        select! {
            recv(stop.receiver()) -> _ => Turn::Stop,
            recv(self.ended.1) -> name => name.map_or(Turn::Timer, Turn::Ended),
            recv(watch) -> item => Turn::Watched(item.ok()),
            recv(list) -> item => Turn::Listed(item.ok()),
            recv(at(self.next_deadline())) -> _ => Turn::Timer,
        }
    }

    fn next_deadline(&self) -> Instant {
        let due = match &self.list {
            Some((_, deadline)) => *deadline,
            None => self.mesh.next_deadline(),
        };
        match self.watch {
            Some(_) => due,
            None => due.min(self.reopen_at),
        }
    }

    /// Opens the streams that are due, and gives up a list that takes too
    /// long.
    fn open_due(&mut self, stop: &Stop) {
        if self.watch.is_none() && self.reopen_at <= clock::now() {
            self.watch = self.open(true, stop);
            self.ends.opened(clock::now());
            self.reopen_at = clock::now() + REOPEN_PAUSE;
        }
        if matches!(&self.list, Some((_, deadline)) if *deadline <= clock::now()) {
            self.list = None;
            self.complain(LIST, "the registry's list was not complete in time");
            self.mesh.list_failed(clock::now());
        }
        if self.list.is_none() && self.mesh.list_due(clock::now()) {
            match self.open(false, stop) {
                Some(list) => self.list = Some((list, clock::now() + LIST_TIMEOUT)),
                None => self.mesh.list_failed(clock::now()),
            }
        }
    }

    fn open(&mut self, watch: bool, stop: &Stop) -> Option<Answers> {
        let query = convert::query(&self.options.network_service, watch);
        let deadline = clock::now() + OPEN_TIMEOUT;
        match self.shared.nsmgr.find(&query, deadline, stop) {
            Ok(stream) => Some(stream),
            Err(error) => {
                self.complain(OPEN, &format!("cannot ask the registry for LBs: {error}"));
                None
            }
        }
    }

    fn watched(&mut self, item: Option<Item<NetworkServiceEndpointResponse>>) {
        match item {
            Some(Item::Message(response)) => {
                self.ends.heard();
                self.well(&[OPEN, WATCH]);
                self.seen(response);
            }
            ended => {
                self.watch_ended(ended);
                self.watch = None;
                self.reopen_at = clock::now() + REOPEN_PAUSE;
            }
        }
    }

    /// Says that the stream of LBs ended; loudly only if it does so again and
    /// again, and brings nothing.
    fn watch_ended(&mut self, ended: Option<Item<NetworkServiceEndpointResponse>>) {
        let fruitless = self.ends.ended(clock::now());
        if fruitless == 0 {
            self.well(&[WATCH]);
        }
        match ended {
            Some(Item::Ended(Err(error))) => {
                let what = format!("the registry's stream of LBs ended: {error}");
                if fruitless < FRUITLESS {
                    debug!("{what}");
                } else {
                    self.complain(WATCH, &what);
                }
            }
            _ => debug!("the registry's stream of LBs ended"),
        }
    }

    fn listed(&mut self, item: Option<Item<NetworkServiceEndpointResponse>>) {
        match item {
            Some(Item::Message(response)) => self.seen(response),
            Some(Item::Ended(Ok(()))) => {
                self.well(&[OPEN, LIST]);
                self.list = None;
                for action in self.mesh.listed() {
                    self.act(Some(action));
                }
            }
            other => {
                if let Some(Item::Ended(Err(error))) = other {
                    self.complain(LIST, &format!("the registry's list of LBs failed: {error}"));
                }
                self.list = None;
                self.mesh.list_failed(clock::now());
            }
        }
    }

    fn seen(&mut self, response: NetworkServiceEndpointResponse) {
        let now = Now::read();
        let sighting = convert::sighting(response, &self.options.network_service, &now);
        let Some(sighting) = sighting else { return };
        match self.mesh.seen(&sighting, now.mono) {
            Ok(action) => self.act(action),
            Err(why) => {
                let name = error::start(&sighting.name).to_owned();
                if self.refused.len() < REFUSED_MOST && self.refused.insert(name.clone()) {
                    warn!("endpoint {name:?} is not connected: {why}");
                }
            }
        }
    }

    fn act(&mut self, action: Option<MeshAction>) {
        match action {
            Some(MeshAction::Connect(name)) => self.start(name),
            Some(MeshAction::Disconnect(name, why)) => {
                info!("LB {name} is gone: {why}");
                if let Some(session) = self.sessions.get_mut(&name) {
                    session.thread.stop();
                }
            }
            Some(MeshAction::Replaced(name)) => {
                info!("LB {name} is registered anew");
                if let Some(session) = self.sessions.get(&name) {
                    // One that waits to be read says the same.
                    let _ = session.news.try_send(());
                }
            }
            None => {}
        }
    }

    fn start(&mut self, name: EndpointName) {
        let LbOptions {
            name: client,
            network_service: service,
            mtu,
            ..
        } = &self.options;
        let template = Template {
            id: format!("{client}-{service}-{name}"),
            client: client.clone(),
            service: service.clone(),
            endpoint: name.as_str().to_owned(),
            mtu: *mtu,
            netns: self.shared.netns.url().to_owned(),
        };
        let jitter = Jitter::new(ifname::random());
        let session = LbSession::new(name.clone(), jitter, clock::now());
        let (news, heard) = bounded(1);
        let worker = LbWorker::new(self.shared.clone(), template, session, heard);
        let ended = self.ended.0.clone();
        self.number = self.number.wrapping_add(1);
        let thread = format!("lb:{}", self.number);
        info!("{thread} serves LB {name}");
        let last = name.clone();
        let started = self.threads.spawn(&thread, STACK_SMALL, move |stop| {
            worker.run(&stop);
            let _ = ended.try_send(last);
        });
        match started {
            Ok(thread) => {
                self.sessions.insert(name, Session { thread, news });
            }
            Err(error) => {
                log::error!("cannot start {thread} for LB {name}: {error}");
                // The next answer of the registry tries again.
                let _ = self.mesh.ended(&name, clock::now());
            }
        }
    }

    /// Warns once for as long as the same thing is wrong.
    fn complain(&mut self, cause: &'static str, what: &str) {
        if self.troubles.is_new(cause, what) {
            warn!("{what}");
        } else {
            debug!("{what}");
        }
    }

    fn well(&mut self, causes: &[&str]) {
        if let Some(said) = self.troubles.over(causes) {
            info!("the registry answers again after: {said}");
        }
    }
}
