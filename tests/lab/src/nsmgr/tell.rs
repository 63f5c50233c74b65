//! When the registry tells its watchers of something.

use std::time::Instant;

use crossbeam_channel::{Receiver, bounded};
use meridio_proxy::proto::registry::{NetworkServiceEndpoint, NetworkServiceEndpointQuery};
use meridio_proxy::sync::clock;

use super::Nsmgr;

/// Events that may wait; a reader that lags misses later ones.
const BOUND: usize = 1024;

impl Nsmgr {
    /// Each change of the service's endpoints: when the watchers that came
    /// before were told of it, the endpoint's name, and whether it left.
    #[must_use]
    pub fn endpoint_changes(&self, service: &str) -> Receiver<(Instant, String, bool)> {
        let (sender, changes) = bounded(BOUND);
        let mut filter = NetworkServiceEndpoint::new();
        filter.network_service_names = vec![service.to_owned()];
        let query = NetworkServiceEndpointQuery {
            network_service_endpoint: Some(filter).into(),
            watch: true,
            ..Default::default()
        };
        let deliver = move |endpoint: NetworkServiceEndpoint, left: bool| {
            let sent = sender.try_send((clock::now(), endpoint.name, left));
            !sent.is_err_and(|error| error.is_disconnected())
        };
        self.inner()
            .registry
            .find_endpoints(&query, Box::new(deliver));
        changes
    }
}
