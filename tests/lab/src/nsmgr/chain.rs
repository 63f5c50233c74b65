//! Request and Close inside nsmgr (networkservice/chains/nsmgr).

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use meridio_proxy::proto::connection::{Connection, Mechanism, State};
use meridio_proxy::proto::networkservice::NetworkServiceRequest;
use meridio_proxy::rpc::status::{Code, RpcError};
use meridio_proxy::sync::clock;
use protobuf::well_known_types::empty::Empty;

use super::Inner;
use super::serve::{Answer, Incoming};
use crate::forwarder::{Call, ClientEnd};
use crate::path::{self, system_time};
use crate::policy::unknown;
use crate::tls::parse_inode_url;

/// What the node's pods and services use; the client must keep it.
const EXCLUDED_PREFIX: &str = "10.96.0.0/12";
/// For closes that nobody outside asked for.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

impl Inner {
    /// The path's part that decides whose turn it is.
    pub fn enter_request(&self, request: &mut NetworkServiceRequest) -> Result<String, RpcError> {
        self.enter_close(request.connection.mut_or_insert_default())
    }

    pub fn enter_close(&self, connection: &mut Connection) -> Result<String, RpcError> {
        path::enter(connection, &self.hop.name).map_err(unknown)?;
        Ok(connection.id.clone())
    }

    pub fn request(
        &self,
        call: &Incoming,
        mut request: NetworkServiceRequest,
    ) -> Result<Answer<Connection>, RpcError> {
        if let Some(failure) = self.state.lock().failures.pop_front() {
            return Err(failure);
        }
        let mut connection = request.connection.take().unwrap_or_default();
        let (peer, own) = (&call.peer.identity, &call.peer.own);
        self.hop
            .admit_entered(&mut connection, peer, call.token.as_ref(), own)?;
        if connection.path.index != 1 {
            let reason = format!("a client's index is 0, not {}", connection.path.index);
            self.notes.violation("Request", &reason);
        }
        let id = connection.id.clone();
        let mut known = self.monitors.get(&id);
        if known.is_some() && connection.state == State::RESELECT_REQUESTED.into() {
            self.end(&id);
            known = None;
        }
        self.compare(&connection, known.as_ref());
        let result = self.establish(call, connection, &request.mechanism_preferences);
        match result {
            Ok(mut connection) => {
                if let Some(tamper) = &*self.tamper.lock() {
                    tamper(&mut connection);
                }
                Ok(Answer(connection, None))
            }
            Err(error) => {
                self.state.lock().netns.remove(&id);
                if known.is_some() {
                    self.monitors.down(&id);
                }
                Err(error)
            }
        }
    }

    fn establish(
        &self,
        call: &Incoming,
        mut connection: Connection,
        preferences: &[Mechanism],
    ) -> Result<Connection, RpcError> {
        let id = connection.id.clone();
        let labels = &mut connection.labels;
        let node = self.options.node.clone();
        labels.entry("nodeName".to_owned()).or_insert(node);
        let destination = self.discover(&connection)?;
        let context = connection.context.mut_or_insert_default();
        let excluded = &mut context.ip_context.mut_or_insert_default().excluded_prefixes;
        if excluded.is_empty() {
            excluded.push(EXCLUDED_PREFIX.to_owned());
        }
        connection.mechanism = Some(self.choose(&connection, preferences)?).into();
        let netns = self.netns(call, &connection)?;
        let end = ClientEnd {
            netns: Arc::clone(&netns),
            ifname: connection.mechanism.parameters["name"].clone(),
        };
        let ours = self.hop.as_peer();
        let token = self.hop.token(&self.forwarder.hop.as_peer())?;
        let to_forwarder = Call {
            caller: &ours,
            token: &token,
            deadline: call.deadline,
        };
        let mut connection =
            self.forwarder
                .request(connection, &to_forwarder, &end, &destination)?;
        connection.state = State::UP.into();
        self.arm_timeout(call, &connection)?;
        self.monitors.update(connection.clone());
        // The client's own descriptor goes back to it (sendfd).
        call.peer.attach(&netns);
        path::leave(&mut connection);
        debug_assert_ne!(connection.id, id);
        Ok(connection)
    }

    /// What a good client's Request looks like next to what is there.
    fn compare(&self, connection: &Connection, known: Option<&Connection>) {
        let client = path::client_id(connection);
        let what = format!("Request of {client}");
        let Some(known) = known else {
            let double = self
                .monitors
                .all()
                .iter()
                .any(|c| path::client_id(c) == client);
            if double {
                self.notes
                    .violation(&what, "a second connection: the path was not sent again");
            }
            return;
        };
        if connection.mechanism != known.mechanism && known.state == State::UP.into() {
            self.notes
                .violation(&what, "the mechanism was not sent again");
        }
        if connection.network_service_endpoint_name != known.network_service_endpoint_name {
            self.notes
                .violation(&what, "another endpoint without RESELECT_REQUESTED");
        }
        if connection.labels != known.labels || connection.payload != known.payload {
            self.notes
                .violation(&what, "labels or payload were not sent again");
        }
        let ids = |c: &Connection| -> Vec<String> {
            let segments = c.path.path_segments.iter();
            segments.map(|s| format!("{}/{}", s.name, s.id)).collect()
        };
        if ids(connection) != ids(known) {
            self.notes.violation(&what, "the path was not sent again");
        }
        let of_lb = self
            .state
            .lock()
            .lbs
            .contains_key(&known.network_service_endpoint_name);
        let ip = |c: &Connection| {
            let ip = &c.context.ip_context;
            (ip.src_ip_addrs.clone(), ip.dst_ip_addrs.clone())
        };
        if of_lb && ip(connection) != ip(known) {
            self.notes.violation(&what, "other addresses on a refresh");
        }
    }

    /// The namespace behind the mechanism's URL: held from before, or brought
    /// by this connection, waited for until the call's deadline.
    fn netns(&self, call: &Incoming, connection: &Connection) -> Result<Arc<OwnedFd>, RpcError> {
        let url = &connection.mechanism.parameters["inodeURL"];
        if let Some((held, file)) = self.state.lock().netns.get(&connection.id)
            && held == url
        {
            return Ok(Arc::clone(file));
        }
        let file = parse_inode_url(url).map_err(unknown)?;
        let fd = call
            .peer
            .files
            .wait(file, call.deadline)
            .map_err(|reason| {
                self.notes.refuse("Request", &reason);
                RpcError::status(Code::DEADLINE_EXCEEDED, reason)
            })?;
        let held = (url.clone(), Arc::clone(&fd));
        self.state.lock().netns.insert(connection.id.clone(), held);
        Ok(fd)
    }

    /// Closes the connection before the client's token runs out
    /// (networkservice/common/timeout).
    fn arm_timeout(&self, call: &Incoming, connection: &Connection) -> Result<(), RpcError> {
        let first = connection.path.path_segments.first();
        let expires = first.and_then(|segment| segment.expires.as_ref());
        let expires = expires
            .ok_or_else(|| unknown("expiration for the previous path segment cannot be nil"))?;
        let left = system_time(expires)
            .duration_since(clock::wall())
            .unwrap_or_default();
        let id = connection.id.clone();
        let delay = left.saturating_sub(call.remaining);
        self.later(&format!("conn/{id}"), delay, move |inner| {
            let ticket = inner.turns.ticket(&id);
            if ticket.wait(clock::now() + CLOSE_LIMIT) {
                inner.end(&id);
            }
        });
        Ok(())
    }

    pub fn close(
        &self,
        call: &Incoming,
        connection: Connection,
    ) -> Result<Answer<Empty>, RpcError> {
        // The stored connection is closed, whatever the client sent; one that
        // is not known is no error.
        let Some(mut stored) = self.monitors.get(&connection.id) else {
            return Ok(Answer(Empty::new(), None));
        };
        let (peer, own) = (&call.peer.identity, &call.peer.own);
        self.hop
            .admit_entered(&mut stored, peer, call.token.as_ref(), own)?;
        self.end(&stored.id);
        Ok(Answer(Empty::new(), None))
    }

    /// Ends a connection everywhere, and then says so.
    pub fn end(&self, id: &str) {
        self.timers.cancel(&format!("conn/{id}"));
        self.state.lock().netns.remove(id);
        let Some(connection) = self.monitors.get(id) else {
            return;
        };
        let ours = self.hop.as_peer();
        let token = self.hop.token(&self.forwarder.hop.as_peer());
        let closed = token.and_then(|token| {
            let call = Call {
                caller: &ours,
                token: &token,
                deadline: clock::now() + CLOSE_LIMIT,
            };
            self.forwarder.close(connection, &call)
        });
        if let Err(error) = closed {
            self.notes.refuse("forwarder's Close", &error.to_string());
        }
        self.monitors.delete(id);
    }

    /// The mechanism that is there, or the first KERNEL preference. The real
    /// nsmgr leaves the choice to the forwarder, whose words these are.
    fn choose(
        &self,
        connection: &Connection,
        preferences: &[Mechanism],
    ) -> Result<Mechanism, RpcError> {
        let kernel = |m: &&Mechanism| m.type_ == "KERNEL";
        let chosen = match connection.mechanism.as_ref() {
            Some(mechanism) => Some(mechanism).filter(kernel),
            None => preferences.iter().find(kernel),
        };
        let chosen =
            chosen.ok_or_else(|| unknown("cannot support any of the requested mechanism"))?;
        if chosen.cls != "LOCAL" {
            let reason = format!("mechanism cls {:?}", chosen.cls);
            self.notes.violation("Request", &reason);
        }
        let name = chosen.parameters.get("name").map_or("", String::as_str);
        let allowed = |b: u8| b.is_ascii_graphic() && b != b'/';
        if name.is_empty() || name.len() > 15 || !name.bytes().all(allowed) {
            return Err(unknown(format!("interface name {name:?}")));
        }
        let url = chosen.parameters.get("inodeURL").map_or("", String::as_str);
        parse_inode_url(url).map_err(unknown)?;
        Ok(chosen.clone())
    }
}
