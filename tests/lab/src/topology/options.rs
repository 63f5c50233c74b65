//! What to build, and what the daemon is told about it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::time::Duration;

use meridio_proxy::core::family::IpFamilies;

use super::Topology;
use crate::infra::{IPAM_PORT, NSP_PORT};

/// What to build.
#[derive(Debug, Clone)]
pub struct TopologyOptions {
    /// What to run in place of the daemon's binary, with its arguments.
    pub program: Option<(PathBuf, Vec<String>)>,
    pub trench: String,
    pub conduit: String,
    pub namespace: String,
    pub node: String,
    pub families: IpFamilies,
    pub lbs: usize,
    pub targets: usize,
    /// Those of families that are not used are left out.
    pub vips: Vec<IpAddr>,
    pub token_lifetime: Duration,
    pub svid_lifetime: Duration,
    /// Settings of the daemon beside, or instead of, the usual ones.
    pub env: BTreeMap<String, String>,
    /// The daemon's soft and hard limit of descriptors; else those of the test.
    pub descriptors: Option<(u64, u64)>,
}

impl Default for TopologyOptions {
    fn default() -> Self {
        Self {
            program: None,
            trench: "trench-a".to_owned(),
            conduit: "conduit-a".to_owned(),
            namespace: "red".to_owned(),
            node: "node-1".to_owned(),
            families: IpFamilies::Dual,
            lbs: 2,
            targets: 3,
            vips: vec![
                IpAddr::from([20, 0, 0, 1]),
                IpAddr::from([0x2000, 0, 0, 0, 0, 0, 0, 1]),
            ],
            token_lifetime: Duration::from_secs(600),
            svid_lifetime: Duration::from_secs(3600),
            env: BTreeMap::new(),
            descriptors: None,
        }
    }
}

impl Topology {
    /// The daemon's environment, as the operator sets it (v1.2.8).
    pub(super) fn environment(&self) -> BTreeMap<String, String> {
        let options = &self.options;
        let nsmgr = self.dir.path().join("nsm.io.sock");
        let mut env: BTreeMap<String, String> = [
            ("PATH", "/usr/sbin:/usr/bin:/sbin:/bin".to_owned()),
            ("SPIFFE_ENDPOINT_SOCKET", self.agent.address()),
            ("NSM_NAME", "proxy-1".to_owned()),
            ("NSM_HOST", options.node.clone()),
            ("NSM_CONNECT_TO", format!("unix://{}", nsmgr.display())),
            ("NSM_MAX_TOKEN_LIFETIME", "10m".to_owned()),
            ("NSM_SERVICE_NAME", self.proxy_service()),
            ("NSM_NETWORK_SERVICE_NAME", self.lb_service()),
            ("NSM_IPAM_SERVICE", format!("ipam-service:{IPAM_PORT}")),
            ("NSM_NSP_SERVICE_NAME", "nsp-service".to_owned()),
            ("NSM_NSP_SERVICE_PORT", NSP_PORT.to_string()),
            ("NSM_TRENCH", options.trench.clone()),
            ("NSM_CONDUIT", options.conduit.clone()),
            ("NSM_NAMESPACE", options.namespace.clone()),
            ("NSM_IP_FAMILY", families(options.families).to_owned()),
            ("NSM_LOG_LEVEL", "DEBUG".to_owned()),
        ]
        .map(|(key, value)| (key.to_owned(), value))
        .into();
        env.extend(options.env.clone());
        env
    }
}

fn families(families: IpFamilies) -> &'static str {
    match families {
        IpFamilies::V4 => "ipv4",
        IpFamilies::V6 => "ipv6",
        IpFamilies::Dual => "dualstack",
    }
}
