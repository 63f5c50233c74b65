//! Thread `lb:N`: does what one [`LbSession`] says. It blocks in one call at a
//! time, each with a deadline, and shares nothing with the other sessions, so
//! a peer that is slow delays nobody else.

use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, at, never, select};
use log::{debug, info, warn};

use super::client::{Leases, Nsmgr, Stream};
use super::convert::{self, Template};
use super::ifname;
use super::netns::Netns;
use super::path;
use super::patience::Patience;
use super::permits::{Permit, Permits};
use super::trouble::Troubles;
use crate::core::event::Event;
use crate::core::ids::{IfName, LeaseId};
use crate::core::lb_session::{
    Established, Failure, LbSession, Monitored, Plan, SessionAction, Stopping,
};
use crate::core::lease::Addresses;
use crate::ipam::IpamError;
use crate::kernel::NetHandle;
use crate::proto::connection::{Connection, ConnectionEvent};
use crate::proto::networkservice::NetworkServiceRequest;
use crate::rpc::pump::Item;
use crate::rpc::status::{Code, RpcError};
use crate::sync::clock;
use crate::sync::stop::Stop;

/// Bound of asking nsmgr for a connection, and of opening a stream.
const LOOK_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a refresh waits for IPAM when the addresses are known anyway.
const RENEW_TIMEOUT: Duration = Duration::from_secs(5);
/// How long a Request waits for those of other LBs, at most.
const TURN_TIMEOUT: Duration = Duration::from_secs(10);

mod closing;
mod look;
mod overhear;
mod words;

use overhear::Overhearing;

/// The causes of warnings.
mod cause {
    pub(super) const LOOK: &str = "look";
    pub(super) const LIST: &str = "list";
    pub(super) const ADDRESSES: &str = "addresses";
    pub(super) const RENEWAL: &str = "renewal";
    pub(super) const NAME: &str = "name";
    /// It is not known what became of a Request.
    pub(super) const UNCLEAR: &str = "unclear";
    pub(super) const REFUSED: &str = "refused";
    pub(super) const ANSWER: &str = "answer";
    pub(super) const WATCH: &str = "watch";
    /// What nsmgr's stream brings is no event.
    pub(super) const GARBLED: &str = "garbled";
    /// What a Request that succeeds proves to be over.
    pub(super) const REQUESTS: [&str; 7] = [LOOK, LIST, NAME, UNCLEAR, REFUSED, ANSWER, GARBLED];
}

/// What the sessions of a mesh have in common.
#[derive(Clone)]
pub(super) struct Shared<N, L> {
    pub(super) nsmgr: N,
    pub(super) leases: L,
    pub(super) net: NetHandle,
    pub(super) netns: Arc<Netns>,
    /// For Requests.
    pub(super) permits: Permits,
    /// `NSM_REQUEST_TIMEOUT`.
    pub(super) request_timeout: Duration,
    /// When the last Close has to be over, once the daemon stops.
    pub(super) close_by: Arc<OnceLock<Instant>>,
    /// Set at that time: ends what began before it was known.
    pub(super) cut: Stop,
    /// Whether an interface is a port of the bridge and belongs to the
    /// connection with this id.
    pub(super) is_in_place: fn(&IfName, &str) -> bool,
}

/// One session with all that it needs.
pub(super) struct LbWorker<N, L> {
    shared: Shared<N, L>,
    template: Template,
    session: LbSession<Connection>,
    /// Says that another process has the endpoint's name now.
    news: Receiver<()>,
    /// It was said during the last call.
    replaced: bool,
    watch: Option<Stream<ConnectionEvent>>,
    /// The addresses that the last Request was made with.
    addresses: Option<Addresses>,
    /// Something may hold the lease.
    leased: bool,
    /// nsmgr's id of the connection, by its last answer.
    at_nsmgr: String,
    /// A Close that had no good answer, and nothing was connected since.
    unanswered: Option<RpcError>,
    /// What `net` was told last.
    reported: Option<Event>,
    /// What was warned of, so that an outage is one warning a cause.
    troubles: Troubles,
    stopping: bool,
}

impl<N: Nsmgr, L: Leases> LbWorker<N, L> {
    pub(super) fn new(
        shared: Shared<N, L>,
        template: Template,
        session: LbSession<Connection>,
        news: Receiver<()>,
    ) -> Self {
        Self {
            shared,
            template,
            session,
            news,
            replaced: false,
            watch: None,
            addresses: None,
            leased: false,
            at_nsmgr: String::new(),
            unanswered: None,
            reported: None,
            troubles: Troubles::default(),
            stopping: false,
        }
    }

    /// Runs until `stop`, then until the connection is closed.
    pub(super) fn run(mut self, stop: &Stop) {
        loop {
            if !self.stopping && stop.is_set() {
                self.stopping = true;
                self.watch = None;
                // When the daemon stops there is no LB to send to instead.
                let how = match self.shared.close_by.get() {
                    Some(_) => Stopping::AtOnce,
                    None => Stopping::Drained,
                };
                self.session.stop(how, clock::now());
            }
            if self.shared.cut.is_set() {
                // Nothing is waited for any more.
                self.session.stop(Stopping::AtOnce, clock::now());
            }
            // What is done after the order to stop is bounded by deadlines,
            // and by the end of the time to stop.
            let calls = if self.stopping {
                self.shared.cut.clone()
            } else {
                stop.clone()
            };
            if self.news.try_recv().is_ok() | std::mem::take(&mut self.replaced) {
                self.session.replaced(clock::now());
            }
            match self.session.next(clock::now()) {
                SessionAction::Look => {
                    let looked = self.look(&calls);
                    self.session.looked(looked, clock::now());
                }
                SessionAction::Request(plan) => {
                    let outcome = self.request(plan, &calls);
                    self.session.answered(outcome, clock::now());
                }
                SessionAction::Clear(connection) => self.clear(connection, &calls),
                SessionAction::Watch => self.open_watch(&calls),
                SessionAction::Close(connection) => self.close(connection, &calls),
                SessionAction::Report(event) => self.report(event),
                SessionAction::Wait(until) => self.wait(until, &calls),
                SessionAction::Done => break,
            }
        }
        if self.leased {
            self.shared.leases.release_later(self.lease_id());
        }
    }

    fn lease_id(&self) -> LeaseId {
        LeaseId::new(self.template.id.as_str())
    }

    fn report(&mut self, event: Event) {
        if self.reported.as_ref() == Some(&event) {
            debug!("{event}, still");
        } else {
            info!("{}{event}", words::beginning(&event));
            self.reported = Some(event.clone());
        }
        self.shared.net.tell(event);
    }

    fn request(
        &mut self,
        plan: Plan<Connection>,
        stop: &Stop,
    ) -> Result<Established<Connection>, Failure<Connection>> {
        let plan = match plan {
            Plan::Refresh(connection) => Plan::Refresh(connection),
            other => {
                // Its events would be about what we do ourselves.
                self.watch = None;
                other
            }
        };
        let addresses = match self.acquire(&plan, stop) {
            Ok(addresses) => addresses,
            Err(error) => {
                self.complain(
                    cause::ADDRESSES,
                    &format!("no addresses from IPAM: {error}"),
                );
                return Err(Failure::NotSent);
            }
        };
        let plan = match plan {
            // Moved addresses are no longer what the peer has.
            Plan::Adopt(connection) if !convert::has_addresses(&connection, &addresses) => {
                Plan::Reselect(connection)
            }
            plan => plan,
        };
        let Some(ifname) = ifname::generate(&self.template.service, ifname::random) else {
            self.complain(cause::NAME, "cannot make a name for the interface");
            return Err(Failure::NotSent);
        };
        let permit = self.turn(stop);
        if stop.is_set() {
            return Err(Failure::NotSent);
        }
        debug!(id = self.template.id; "request: {}", words::plan(&plan));
        let stands = matches!(plan, Plan::Refresh(_) | Plan::Adopt(_));
        let request = self.template.request(plan, &addresses, &ifname);
        let answer = self.call_request(&request, stands, permit, stop);
        match answer {
            Ok(connection) => self.check(connection, &addresses),
            Err(error) => {
                let failure = failure(&error);
                let cause = match failure {
                    Failure::Refused => cause::REFUSED,
                    _ => cause::UNCLEAR,
                };
                self.complain(cause, &format!("Request failed: {error}"));
                Err(failure)
            }
        }
    }

    /// `stands`: it carries traffic, so it is not given up for a word of the
    /// registry.
    fn call_request(
        &mut self,
        request: &NetworkServiceRequest,
        stands: bool,
        permit: Option<Permit>,
        stop: &Stop,
    ) -> Result<Connection, RpcError> {
        let deadline = clock::now() + self.shared.request_timeout;
        // nsmgr may be about to connect: one that is answered can be closed.
        let mut patience = Patience::until(&self.shared.cut)
            // The end of a refresh is what the hop's end waits for.
            .or_stop(stop, (!stands).then_some(&self.shared.close_by))
            .with(permit);
        if !stands {
            patience = patience.or_news(&self.news);
        }
        // A refresh that is stuck keeps nobody from learning of the LB's fall.
        let quiet = never();
        let items = self.watch.as_ref().map_or(&quiet, Stream::items).clone();
        let mut ended = None;
        let mut reader = Overhearing {
            template: &self.template,
            at_nsmgr: &self.at_nsmgr,
            session: &mut self.session,
            reported: &mut self.reported,
            net: &self.shared.net,
            ended: &mut ended,
        };
        let mut read = |item| reader.read(item);
        if self.watch.is_some() {
            patience = patience.or_fall(&items, &mut read);
        }
        let netns = &self.shared.netns;
        let answer = self
            .shared
            .nsmgr
            .request(request, netns, deadline, &mut patience);
        self.replaced |= patience.has_heard();
        drop(patience);
        if let Some(item) = ended {
            self.monitored(item);
        }
        answer
    }

    fn check(
        &mut self,
        connection: Connection,
        addresses: &Addresses,
    ) -> Result<Established<Connection>, Failure<Connection>> {
        let copy = connection.clone();
        match self.template.check(connection, addresses, clock::wall()) {
            Ok(established) => {
                path::nsmgr_id(&established.connection).clone_into(&mut self.at_nsmgr);
                self.well(&cause::REQUESTS);
                self.unanswered = None;
                Ok(established)
            }
            Err(error) => {
                self.complain(
                    cause::ANSWER,
                    &format!("nsmgr's answer is not used: {error}"),
                );
                let closable = self.template.is_closable(&copy);
                Err(Failure::Unusable(closable.then(|| Box::new(copy))))
            }
        }
    }

    /// The addresses for a Request. Every one renews them; but a connection
    /// that stands shall not fall because IPAM is away.
    fn acquire(&mut self, plan: &Plan<Connection>, stop: &Stop) -> Result<Addresses, IpamError> {
        let known = self.addresses.filter(|_| !matches!(plan, Plan::First));
        let timeout = match known {
            Some(_) => RENEW_TIMEOUT.min(self.shared.request_timeout),
            None => self.shared.request_timeout,
        };
        self.leased = true;
        let deadline = clock::now() + timeout;
        match self.shared.leases.acquire(self.lease_id(), deadline, stop) {
            Ok(addresses) => {
                self.addresses = Some(addresses);
                self.well(&[cause::ADDRESSES, cause::RENEWAL]);
                Ok(addresses)
            }
            Err(IpamError::Stopped) => Err(IpamError::Stopped),
            Err(error) => match known {
                Some(addresses) => {
                    self.complain(
                        cause::RENEWAL,
                        &format!("IPAM did not renew the addresses, they are kept: {error}"),
                    );
                    Ok(addresses)
                }
                None => Err(error),
            },
        }
    }

    fn open_watch(&mut self, stop: &Stop) {
        self.watch = None;
        let selector = self.template.selector();
        let deadline = clock::now() + LOOK_TIMEOUT;
        match self.shared.nsmgr.monitor(&selector, deadline, stop) {
            Ok(stream) => {
                self.watch = Some(stream);
                self.session.watching(true, clock::now());
            }
            Err(error) => {
                self.complain(
                    cause::WATCH,
                    &format!("cannot watch the connection: {error}"),
                );
                self.session.watching(false, clock::now());
            }
        }
    }

    /// Waits for this LB's turn among those that request; those that take long
    /// hold nobody up.
    fn turn(&self, stop: &Stop) -> Option<Permit> {
        let deadline = clock::now() + TURN_TIMEOUT;
        self.shared.permits.take(deadline, stop)
    }

    /// `deadline`, or earlier when the daemon stops.
    fn bounded(&self, deadline: Instant) -> Instant {
        match self.shared.close_by.get() {
            Some(by) => deadline.min(*by),
            None => deadline,
        }
    }

    fn wait(&mut self, until: Instant, stop: &Stop) {
        let quiet = never();
        let items = self.watch.as_ref().map_or(&quiet, Stream::items).clone();
        select! {
            recv(items) -> item => {
                self.monitored(item.ok());
                // The state that counts is the last one told.
                while let (Some(_), Ok(item)) = (&self.watch, items.try_recv()) {
                    self.monitored(Some(item));
                }
            },
            recv(self.news) -> said => match said {
                Ok(()) => self.replaced = true,
                // `lb-watch` has ended and stops us.
                Err(_) => self.news = never(),
            },
            recv(stop.receiver()) -> _ => {},
            recv(at(until)) -> _ => {},
        }
    }

    fn monitored(&mut self, item: Option<Item<ConnectionEvent>>) {
        let now = clock::now();
        match item {
            Some(Item::Message(event)) => {
                self.well(&[cause::WATCH]);
                let Some(said) = self.template.monitored(&event, &self.at_nsmgr) else {
                    return;
                };
                if said != Monitored::Up {
                    info!(id = self.template.id; "nsmgr reports: {}", words::state(said));
                }
                self.session.monitored(said, now);
            }
            ended => {
                match ended {
                    Some(Item::Ended(Err(error))) if error.is_undecodable() => self.complain(
                        cause::GARBLED,
                        &format!("nsmgr's stream of the connection's events is given up: {error}"),
                    ),
                    Some(Item::Ended(Err(error))) => {
                        debug!(id = self.template.id; "monitor stream over: {error}");
                    }
                    _ => debug!(id = self.template.id; "monitor stream over: nsmgr ended it"),
                }
                self.watch = None;
                self.session.watch_ended(now);
            }
        }
    }

    /// Warns once for as long as the same thing is wrong.
    fn complain(&mut self, cause: &'static str, what: &str) {
        if self.troubles.is_new(cause, what) {
            warn!(id = self.template.id; "{what}");
        } else {
            debug!(id = self.template.id; "{what}");
        }
    }

    fn well(&mut self, causes: &[&str]) {
        if let Some(said) = self.troubles.over(causes) {
            info!(id = self.template.id; "well again after: {said}");
        }
    }
}

/// Whether nsmgr has refused, or may have connected without our learning it.
/// gRPC itself says RESOURCE_EXHAUSTED of an answer beyond its limits, and
/// INTERNAL of one that is broken off.
fn failure(error: &RpcError) -> Failure<Connection> {
    match error.code() {
        Some(
            Code::UNAVAILABLE
            | Code::DEADLINE_EXCEEDED
            | Code::CANCELLED
            | Code::RESOURCE_EXHAUSTED
            | Code::INTERNAL,
        )
        | None => Failure::Unclear,
        Some(_) => Failure::Refused,
    }
}
