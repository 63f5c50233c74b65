//! The seam between the lab's control plane (nsmgr, forwarder) and its data
//! plane (veth pairs between network namespaces).

use std::os::fd::OwnedFd;
use std::sync::Arc;

use meridio_proxy::proto::connection::Connection;

/// One end of a connection, as the forwarder knows it.
#[derive(Clone)]
pub struct End {
    /// The namespace, as received by descriptor passing, never by name.
    pub netns: Arc<OwnedFd>,
    /// The interface's name there (`mechanism.parameters["name"]`).
    pub ifname: String,
    /// The alias that it gets: `server-<client id>` on the client's side,
    /// `client-<client id>` on the endpoint's.
    pub alias: String,
}

/// What the kernel forwarder does for a connection. Called by the forwarder
/// with one call at a time for each connection.
pub trait Datapath: Send + Sync {
    /// Makes, or on a refresh brings up to date, the pair of interfaces:
    /// client side with `src_ip_addrs`, endpoint side with `dst_ip_addrs`, MTU,
    /// and on the client's side the policy routes. Addresses of global scope
    /// that are not in the context are removed, as the real forwarder does.
    fn connect(
        &self,
        id: &str,
        client: &End,
        endpoint: &End,
        connection: &Connection,
    ) -> Result<(), String>;

    /// Removes the pair; a connection that is not known is no error.
    fn disconnect(&self, id: &str);
}

/// An endpoint that lives in the lab's own process (a load balancer).
pub trait LocalEndpoint: Send + Sync {
    /// The endpoint's name in the registry.
    fn name(&self) -> String;
    /// Where its ends of connections are made.
    fn netns(&self) -> Arc<OwnedFd>;
    /// Accepts a connection, and names the interface in
    /// `mechanism.parameters["name"]`; may add to the context.
    fn request(&self, connection: Connection) -> Result<Connection, String>;
    /// The connection's interfaces exist now.
    fn connected(&self, connection: &Connection);
    /// The connection ended.
    fn close(&self, connection: &Connection);
}
