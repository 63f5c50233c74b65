//! The calls that the threads of this folder make, as traits: nsmgr's through
//! [`NsmCaller`], the leases through [`IpamHandle`]. Tests stand in for both.

use std::any::Any;
use std::time::Instant;

use crossbeam_channel::Receiver;
use log::error;

use super::caller::{Call, NsmCaller};
use super::netns::Netns;
use super::patience::Patience;
use crate::core::ids::LeaseId;
use crate::core::lease::Addresses;
use crate::ipam::{IpamError, IpamHandle};
use crate::proto::connection::{Connection, ConnectionEvent, MonitorScopeSelector};
use crate::proto::networkservice::NetworkServiceRequest;
use crate::proto::registry::{NetworkServiceEndpointQuery, NetworkServiceEndpointResponse};
use crate::rpc::method;
use crate::rpc::pump::{Item, Pump};
use crate::rpc::status::RpcError;
use crate::sync::stop::Stop;

/// A stream of messages; dropping it cancels the RPC.
pub(super) struct Stream<T> {
    items: Receiver<Item<T>>,
    _open: Box<dyn Any + Send>,
}

impl<T> Stream<T> {
    /// `open` is held as long as the stream is.
    pub(super) fn new(items: Receiver<Item<T>>, open: Box<dyn Any + Send>) -> Self {
        Self { items, _open: open }
    }

    /// The channel to select on.
    pub(super) fn items(&self) -> &Receiver<Item<T>> {
        &self.items
    }
}

impl<T: Send + 'static> From<Pump<T>> for Stream<T> {
    fn from(pump: Pump<T>) -> Self {
        Self::new(pump.items().clone(), Box::new(pump))
    }
}

/// nsmgr. Every call ends by `deadline`, or when the wait for it does.
pub(super) trait Nsmgr: Clone + Send + 'static {
    /// Makes, refreshes or rebuilds a connection that ends in `netns`.
    fn request(
        &self,
        request: &NetworkServiceRequest,
        netns: &Netns,
        deadline: Instant,
        patience: &mut Patience<'_>,
    ) -> Result<Connection, RpcError>;

    /// Ends a connection.
    fn close(
        &self,
        connection: &Connection,
        netns: &Netns,
        deadline: Instant,
        patience: &mut Patience<'_>,
    ) -> Result<(), RpcError>;

    /// Opens a stream of events about connections.
    fn monitor(
        &self,
        selector: &MonitorScopeSelector,
        deadline: Instant,
        stop: &Stop,
    ) -> Result<Stream<ConnectionEvent>, RpcError>;

    /// Opens a stream of endpoints.
    fn find(
        &self,
        query: &NetworkServiceEndpointQuery,
        deadline: Instant,
        stop: &Stop,
    ) -> Result<Stream<NetworkServiceEndpointResponse>, RpcError>;
}

impl Nsmgr for NsmCaller {
    fn request(
        &self,
        request: &NetworkServiceRequest,
        netns: &Netns,
        deadline: Instant,
        patience: &mut Patience<'_>,
    ) -> Result<Connection, RpcError> {
        let passed = || descriptors(netns);
        let stop = patience.stop().clone();
        let call: Call<'_, _, _> = (&method::REQUEST, request, &[], &passed);
        self.unary_with(call, deadline, &stop, &mut |answer| patience.wait(answer))
            .map(|reply| reply.message)
    }

    fn close(
        &self,
        connection: &Connection,
        netns: &Netns,
        deadline: Instant,
        patience: &mut Patience<'_>,
    ) -> Result<(), RpcError> {
        let passed = || descriptors(netns);
        let stop = patience.stop().clone();
        let call: Call<'_, _, _> = (&method::CLOSE, connection, &[], &passed);
        self.unary_with(call, deadline, &stop, &mut |answer| patience.wait(answer))
            .map(drop)
    }

    fn monitor(
        &self,
        selector: &MonitorScopeSelector,
        deadline: Instant,
        stop: &Stop,
    ) -> Result<Stream<ConnectionEvent>, RpcError> {
        self.stream(&method::MONITOR_CONNECTIONS, selector, deadline, stop)
            .map(Stream::from)
    }

    fn find(
        &self,
        query: &NetworkServiceEndpointQuery,
        deadline: Instant,
        stop: &Stop,
    ) -> Result<Stream<NetworkServiceEndpointResponse>, RpcError> {
        self.stream(&method::NSE_FIND, query, deadline, stop)
            .map(Stream::from)
    }
}

/// nsmgr keeps what it was passed once on a connection, so a call without the
/// descriptor mostly works; if not, it fails at its deadline.
fn descriptors(netns: &Netns) -> Vec<std::os::fd::OwnedFd> {
    match netns.descriptor() {
        Ok(descriptor) => vec![descriptor],
        Err(error) => {
            error!("cannot pass the network namespace to nsmgr: {error}");
            Vec::new()
        }
    }
}

/// The leases of connections.
pub(super) trait Leases: Clone + Send + 'static {
    /// Allocates, or renews, the addresses of `id`.
    fn acquire(&self, id: LeaseId, deadline: Instant, stop: &Stop) -> Result<Addresses, IpamError>;

    /// Gives them back after a while, unless they are acquired again.
    fn release_later(&self, id: LeaseId);
}

impl Leases for IpamHandle {
    fn acquire(&self, id: LeaseId, deadline: Instant, stop: &Stop) -> Result<Addresses, IpamError> {
        self.acquire_wait(id, deadline, stop)
    }

    fn release_later(&self, id: LeaseId) {
        IpamHandle::release_later(self, id);
    }
}
