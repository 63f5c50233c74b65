//! The settings, one row each: field, type, parser, variable, default, help.
//!
//! A row's documentation is the text of `--help`. A name in brackets after the
//! variable is read when the variable itself is not set: Meridio declares these
//! six in a way that makes its library (envconfig) try both.

use std::time::Duration;

use log::LevelFilter;

use super::value::{self, HostPort};
use super::written::Written;
use crate::core::family::IpFamilies;
use crate::spiffe::workload::WorkloadAddress;
use crate::transport::client::Address;

/// What is known about a setting besides its value.
#[derive(Debug, Clone, Copy)]
pub struct Row {
    /// The environment variable.
    pub variable: &'static str,
    /// The variable that is read when `variable` is not set.
    pub fallback: Option<&'static str>,
    /// The value when nothing is set; `None` when there is none.
    pub default: Option<&'static str>,
    /// What a value looks like, in a word or an example.
    pub form: &'static str,
    /// One line for `--help`.
    pub help: &'static str,
}

impl Row {
    /// The name of the flag, without dashes: `ip-family` for `NSM_IP_FAMILY`.
    #[must_use]
    pub fn flag(&self) -> String {
        self.variable
            .strip_prefix("NSM_")
            .unwrap_or(self.variable)
            .to_lowercase()
            .replace('_', "-")
    }
}

/// The variables with their values, in the order of the table; a value is
/// `None` where it is missing.
pub(super) type Texts<'a> = &'a dyn Fn(&Row) -> Option<String>;

macro_rules! settings {
    ($(
        $(#[doc = $help:literal])+
        $field:ident: $type:ty = $parser:path,
            $variable:literal $(($fallback:literal))? $(, $default:literal)?;
    )+) => {
        /// The values of all settings. Only [`super::Config`] makes one.
        #[derive(Debug, Clone)]
        #[non_exhaustive]
        pub struct Settings {
            $(
                $(#[doc = $help])+
                pub $field: $type,
            )+
        }

        /// All settings.
        pub const TABLE: &[Row] = &[$(
            Row {
                variable: $variable,
                fallback: settings!(@option $($fallback)?),
                default: settings!(@option $($default)?),
                form: <$type as Written>::FORM,
                help: concat!($($help),+),
            },
        )+];

        /// Parses every text; what is wrong goes to `report` with its row.
        pub(super) fn parse(texts: Texts<'_>, report: &mut dyn FnMut(&Row, String)) -> Option<Settings> {
            let mut rows = TABLE.iter();
            $(
                let $field = rows.next().and_then(|row| read(row, texts, $parser, report));
            )+
            Some(Settings { $($field: $field?,)+ })
        }

        impl Settings {
            /// The values in force, as they could be written, in the order of
            /// the table.
            pub(super) fn written(&self) -> Vec<String> {
                vec![$(self.$field.written(),)+]
            }
        }
    };
    (@option $value:literal) => { Some($value) };
    (@option) => { None };
}

fn read<T>(
    row: &Row,
    texts: Texts<'_>,
    parser: impl Fn(&str) -> Result<T, String>,
    report: &mut dyn FnMut(&Row, String),
) -> Option<T> {
    parser(&texts(row)?)
        .map_err(|wrong| report(row, wrong))
        .ok()
}

settings! {
    /// Name of this proxy: its endpoint in the registry, its client name
    name: String = value::name, "NSM_NAME", "proxy";
    /// Network service that is offered to targets
    service_name: String = value::name, "NSM_SERVICE_NAME", "proxy";
    /// Where nsmgr listens: unix:///path or tcp://host:port
    connect_to: Address = value::connect_to,
        "NSM_CONNECT_TO", "unix:///var/lib/networkservicemesh/nsm.io.sock";
    /// Bound of one attempt to connect to a peer
    dial_timeout: Duration = value::positive_duration, "NSM_DIAL_TIMEOUT", "5s";
    /// Bound of one Request or Close of a load balancer's connection
    request_timeout: Duration = value::positive_duration, "NSM_REQUEST_TIMEOUT", "15s";
    /// Lifetime of the tokens that prove this proxy's identity to NSM
    max_token_lifetime: Duration = value::positive_duration, "NSM_MAX_TOKEN_LIFETIME", "24h";
    /// Where IPAM listens: host:port
    ipam_service: HostPort = value::host_port, "NSM_IPAM_SERVICE", "ipam-service:7777";
    /// Name of the node, whose part of the conduit's subnet is used
    host: String = value::optional_name, "NSM_HOST", "";
    /// Network service of the load balancers
    network_service_name: String = value::name, "NSM_NETWORK_SERVICE_NAME", "load-balancer";
    /// Kubernetes namespace of the trench
    namespace: String = value::name, "NSM_NAMESPACE", "default";
    /// Name of the trench
    trench: String = value::name, "NSM_TRENCH", "default";
    /// Name of the conduit
    conduit: String = value::name, "NSM_CONDUIT", "load-balancer";
    /// Name of the NSP service, without the trench
    nsp_service_name: String = value::name, "NSM_NSP_SERVICE_NAME", "nsp-service";
    /// Port of the NSP service
    nsp_service_port: u16 = value::port, "NSM_NSP_SERVICE_PORT", "7778";
    /// IP families: ipv4, ipv6 or dualstack
    ip_family: IpFamilies = value::ip_families, "NSM_IP_FAMILY" ("IP_FAMILY"), "dualstack";
    /// Log level: INFO, DEBUG or TRACE
    log_level: LevelFilter = value::log_level, "NSM_LOG_LEVEL", "DEBUG";
    /// MTU of the interfaces of targets and load balancers
    mtu: u32 = value::mtu, "NSM_MTU", "1500";
    /// Pause between checks of the connections to IPAM and NSP, at least 10s
    grpc_keepalive_time: Duration = value::parse_duration,
        "NSM_GRPC_KEEPALIVE_TIME" ("GRPC_KEEPALIVE_TIME"), "30s";
    /// Bound of the probe of this proxy's own endpoint
    grpc_probe_rpc_timeout: Duration = value::positive_duration,
        "NSM_GRPC_PROBE_RPC_TIMEOUT" ("GRPC_PROBE_RPC_TIMEOUT"), "1s";
    /// Longest pause between attempts to connect to a peer
    grpc_max_backoff: Duration = value::positive_duration,
        "NSM_GRPC_MAX_BACKOFF" ("GRPC_MAX_BACKOFF"), "5s";
    /// Delay before the addresses of a closed connection are released
    ip_release_delay: Duration = value::parse_duration,
        "NSM_IP_RELEASE_DELAY" ("IP_RELEASE_DELAY"), "20s";
    /// Pause between renewals of the bridge's addresses at IPAM
    bridge_ip_renew_interval: Duration = value::positive_duration,
        "NSM_BRIDGE_IP_RENEW_INTERVAL" ("BRIDGE_IP_RENEW_INTERVAL"), "5m";
    /// Where SPIRE's Workload API listens: unix:///path or tcp://ip:port
    spiffe_endpoint_socket: WorkloadAddress = value::workload, "SPIFFE_ENDPOINT_SOCKET";
}
