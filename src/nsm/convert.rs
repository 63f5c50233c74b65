//! Between nsmgr's messages and what the sessions and the mesh work with.

use std::collections::BTreeSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::net::IpAddr;
use std::time::SystemTime;

use ipnetwork::IpNetwork;

use super::error::Unusable;
use super::path;
use crate::core::family::Family;
use crate::core::ids::IfName;
use crate::core::lb_session::{Established, Monitored, Plan};
use crate::core::lease::{Addresses, Lease};
use crate::core::mesh::{Expiry, Sighting};
use crate::proto::connection::{
    Connection, ConnectionEvent, ConnectionEventType, Mechanism, MonitorScopeSelector, PathSegment,
    State,
};
use crate::proto::networkservice::NetworkServiceRequest;
use crate::proto::registry::{
    NetworkServiceEndpoint, NetworkServiceEndpointQuery, NetworkServiceEndpointResponse,
};
use crate::sync::clock::Now;

/// Constants of the NSM API (pkg/api/networkservice/mechanisms, payload).
const CLS_LOCAL: &str = "LOCAL";
const TYPE_KERNEL: &str = "KERNEL";
const PARAMETER_NAME: &str = "name";
const PARAMETER_NETNS: &str = "inodeURL";
const PAYLOAD: &str = "ETHERNET";

/// Addresses of one peer that are taken as next hops. One of each family is
/// what there is; a peer must not be able to fill the route.
const PEERS_MOST: usize = 16;

/// What stays the same through the life of a connection.
#[derive(Debug, Clone)]
pub(super) struct Template {
    /// The connection's id.
    pub(super) id: String,
    /// The name of this client in the path.
    pub(super) client: String,
    /// The network service.
    pub(super) service: String,
    /// The endpoint: NSM would otherwise choose one.
    pub(super) endpoint: String,
    /// The MTU of the interface.
    pub(super) mtu: u32,
    /// The URL of the own network namespace.
    pub(super) netns: String,
}

impl Template {
    /// The Request for `plan`; `ifname` is a new name, which a connection that
    /// keeps its interface does not need.
    pub(super) fn request(
        &self,
        plan: Plan<Connection>,
        addresses: &Addresses,
        ifname: &IfName,
    ) -> NetworkServiceRequest {
        let (mut connection, reselect) = match plan {
            Plan::First => (self.first(), false),
            Plan::Refresh(connection) | Plan::Adopt(connection) => (connection, false),
            Plan::Reselect(connection) => (connection, true),
        };
        // A monitor shows the connection as nsmgr has it.
        connection.id.clone_from(&self.id);
        connection.path.mut_or_insert_default().index = 0;
        connection
            .network_service_endpoint_name
            .clone_from(&self.endpoint);
        connection.state = State::UP.into();
        if reselect {
            connection.state = State::RESELECT_REQUESTED.into();
            connection.mechanism = None.into();
        }
        let context = connection.context.mut_or_insert_default();
        context.MTU = self.mtu;
        let ip = context.ip_context.mut_or_insert_default();
        (ip.src_ip_addrs, ip.dst_ip_addrs) = address_lists(addresses);
        let name = connection
            .mechanism
            .parameters
            .get(PARAMETER_NAME)
            .map_or(ifname.as_str(), String::as_str)
            .to_owned();
        NetworkServiceRequest {
            connection: Some(connection).into(),
            mechanism_preferences: vec![self.preference(name)],
            ..NetworkServiceRequest::default()
        }
    }

    fn first(&self) -> Connection {
        Connection {
            id: self.id.clone(),
            network_service: self.service.clone(),
            path: Some(path::first(&self.client, &self.id)).into(),
            payload: PAYLOAD.to_owned(),
            ..Connection::default()
        }
    }

    fn preference(&self, ifname: String) -> Mechanism {
        Mechanism {
            cls: CLS_LOCAL.to_owned(),
            type_: TYPE_KERNEL.to_owned(),
            parameters: [
                (PARAMETER_NAME.to_owned(), ifname),
                (PARAMETER_NETNS.to_owned(), self.netns.clone()),
            ]
            .into(),
            ..Mechanism::default()
        }
    }

    /// Checks the answer to a Request that was made with `addresses`.
    ///
    /// # Errors
    ///
    /// When it is not the connection that was asked for, or its interface or
    /// addresses cannot be used.
    pub(super) fn check(
        &self,
        connection: Connection,
        addresses: &Addresses,
        now: SystemTime,
    ) -> Result<Established<Connection>, Unusable> {
        if connection.id != self.id {
            return Err(Unusable::Id(connection.id));
        }
        self.check_path(&connection)?;
        let endpoint = &connection.network_service_endpoint_name;
        if *endpoint != self.endpoint {
            return Err(Unusable::Endpoint(endpoint.clone()));
        }
        let ifname = interface(&connection)?;
        let ip = &connection.context.ip_context;
        for text in &ip.src_ip_addrs {
            parse(text)?;
        }
        let peers = peers(&ip.dst_ip_addrs, addresses)?;
        Ok(Established {
            ifname,
            peers,
            lives: path::lives(&connection.path, now),
            connection,
        })
    }

    fn check_path(&self, connection: &Connection) -> Result<(), Unusable> {
        let path = &connection.path;
        let fault = if path.index != 0 {
            format!("has index {}", path.index)
        } else if !path::is_known_to_nsmgr(path, &self.client, &self.id) {
            let segments = path.path_segments.iter().take(2);
            let ids: Vec<_> = segments
                .map(|segment| (&segment.name, &segment.id))
                .collect();
            format!("begins with {ids:?}")
        } else {
            return Ok(());
        };
        Err(Unusable::Path(fault))
    }

    /// Whether nsmgr would find the connection to close it.
    pub(super) fn is_closable(&self, connection: &Connection) -> bool {
        path::is_known_to_nsmgr(&connection.path, &self.client, &self.id)
    }

    /// The connection as it is closed.
    pub(super) fn close(&self, mut connection: Connection) -> Connection {
        connection.id.clone_from(&self.id);
        connection.path.mut_or_insert_default().index = 0;
        connection
    }

    /// Asks a monitor for this connection.
    pub(super) fn selector(&self) -> MonitorScopeSelector {
        MonitorScopeSelector {
            path_segments: vec![PathSegment {
                id: self.id.clone(),
                name: self.client.clone(),
                ..PathSegment::default()
            }],
            ..MonitorScopeSelector::default()
        }
    }

    /// The connection of ours in a monitor's first event, if nsmgr has it and
    /// could find it by its path. Of several, which answers that were lost can
    /// leave, one that is up, and always the same.
    pub(super) fn find_own(&self, event: ConnectionEvent) -> Option<Connection> {
        let own = |connection: &Connection| {
            path::belongs_to(connection, &self.id) && self.is_closable(connection)
        };
        event
            .connections
            .into_iter()
            .filter(|(_, connection)| own(connection))
            .min_by_key(|(key, connection)| (connection.state != State::UP.into(), key.clone()))
            .map(|(_, connection)| connection)
    }

    /// The interface of a connection that nsmgr reports as up, in this network
    /// namespace.
    pub(super) fn interface_of_up(&self, connection: &Connection) -> Option<IfName> {
        let here = connection.mechanism.parameters.get(PARAMETER_NETNS) == Some(&self.netns);
        let up = connection.state == State::UP.into();
        interface(connection).ok().filter(|_| here && up)
    }

    /// What an event says of this connection, if anything. `at_nsmgr` is the
    /// id of nsmgr's segment of it: an answer that was lost can have left
    /// another connection with our id there, whose end is not ours.
    pub(super) fn monitored(&self, event: &ConnectionEvent, at_nsmgr: &str) -> Option<Monitored> {
        let kind = event.type_.enum_value().ok()?;
        let own = event.connections.values().find(|connection| {
            path::belongs_to(connection, &self.id) && path::nsmgr_id(connection) == at_nsmgr
        });
        match (own, kind) {
            (Some(_), ConnectionEventType::DELETE) => Some(Monitored::Deleted),
            (Some(connection), _) => match connection.state.enum_value() {
                Ok(State::DOWN) => Some(Monitored::Down),
                Ok(State::REFRESH_REQUESTED) => Some(Monitored::RefreshRequested),
                // An unknown state is one of a newer NSM, which would not use
                // it for a failure without telling older clients too.
                Ok(State::UP | State::RESELECT_REQUESTED) | Err(_) => Some(Monitored::Up),
            },
            (None, ConnectionEventType::INITIAL_STATE_TRANSFER) => Some(Monitored::Absent),
            (None, _) => None,
        }
    }
}

/// Whether a connection has exactly these addresses.
pub(super) fn has_addresses(connection: &Connection, addresses: &Addresses) -> bool {
    let ip = &connection.context.ip_context;
    let (src, dst) = address_lists(addresses);
    let set = |list: &[String]| list.iter().cloned().collect::<BTreeSet<_>>();
    set(&ip.src_ip_addrs) == set(&src) && set(&ip.dst_ip_addrs) == set(&dst)
}

/// The source and destination lists of a connection whose client is the proxy.
/// The proxy's port has the `-dst` child and the peer the `-src` child, so in
/// this role they change places.
fn address_lists(addresses: &Addresses) -> (Vec<String>, Vec<String>) {
    let leases = || addresses.leases.values();
    (
        leases().map(|lease| lease.dst.to_string()).collect(),
        leases().map(|lease| lease.src.to_string()).collect(),
    )
}

fn interface(connection: &Connection) -> Result<IfName, Unusable> {
    let mechanism = &connection.mechanism;
    if mechanism.type_ != TYPE_KERNEL {
        return Err(Unusable::Mechanism(format!("is {:?}", mechanism.type_)));
    }
    let name = mechanism.parameters.get(PARAMETER_NAME);
    let name = name.ok_or_else(|| Unusable::Mechanism("has no interface name".to_owned()))?;
    IfName::parse(name).map_err(|error| Unusable::Mechanism(error.to_string()))
}

fn parse(text: &str) -> Result<IpNetwork, Unusable> {
    text.parse().map_err(|_| Unusable::Address(text.to_owned()))
}

/// The addresses that packets can be sent to by way of the port: one wrong
/// next hop would make the kernel refuse the route to all.
fn peers(texts: &[String], addresses: &Addresses) -> Result<BTreeSet<IpAddr>, Unusable> {
    let mut peers = BTreeSet::new();
    if texts.len() > PEERS_MOST {
        return Err(Unusable::TooMany(texts.len()));
    }
    for text in texts {
        let peer = parse(text)?.ip();
        let lease = addresses.leases.get(Family::from(peer)).as_ref();
        if !lease.is_some_and(|lease| is_neighbour(peer, lease)) {
            return Err(Unusable::ForeignAddress(text.clone()));
        }
        peers.insert(peer);
    }
    let has = |family| peers.iter().any(|peer| Family::from(*peer) == family);
    for (family, lease) in addresses.leases.iter() {
        if lease.is_some() && !has(family) {
            return Err(Unusable::NoAddress(family));
        }
    }
    Ok(peers)
}

fn is_neighbour(peer: IpAddr, lease: &Lease) -> bool {
    lease.src.contains(peer) && peer != lease.dst.ip() && !peer.is_unspecified()
}

/// The query for the endpoints of a service.
pub(super) fn query(service: &str, watch: bool) -> NetworkServiceEndpointQuery {
    NetworkServiceEndpointQuery {
        network_service_endpoint: Some(NetworkServiceEndpoint {
            network_service_names: vec![service.to_owned()],
            ..NetworkServiceEndpoint::default()
        })
        .into(),
        watch,
        ..NetworkServiceEndpointQuery::default()
    }
}

/// What an answer to [`query`] says; `None` if it is about another service, or
/// about nothing.
pub(super) fn sighting(
    response: NetworkServiceEndpointResponse,
    service: &str,
    now: &Now,
) -> Option<Sighting> {
    let endpoint = response.network_service_endpoint.into_option()?;
    let services = &endpoint.network_service_names;
    if !services.is_empty() && !services.iter().any(|name| name == service) {
        return None;
    }
    let expires = endpoint.expiration_time.as_ref().and_then(path::time);
    let registered = endpoint.initial_registration_time.as_ref();
    let mut incarnation = DefaultHasher::new();
    (
        endpoint.url.as_str(),
        registered.map(|at| (at.seconds, at.nanos)),
    )
        .hash(&mut incarnation);
    Some(Sighting {
        name: endpoint.name,
        expires: expires.map(|told| Expiry {
            told,
            at: path::monotonic(told, now),
        }),
        deleted: response.deleted,
        incarnation: incarnation.finish(),
    })
}

#[cfg(test)]
mod tests;
