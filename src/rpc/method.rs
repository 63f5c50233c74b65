//! The gRPC methods that the daemon calls or serves, by their wire path.

use grpcio::{Marshaller, Method, MethodType, pb_de, pb_ser};
use protobuf::Message;
use protobuf::well_known_types::empty::Empty;

use crate::proto::connection::{Connection, ConnectionEvent, MonitorScopeSelector};
use crate::proto::health::{HealthCheckRequest, HealthCheckResponse};
use crate::proto::ipam::{Child, Prefix};
use crate::proto::networkservice::NetworkServiceRequest;
use crate::proto::nsp::{Target, TargetResponse, Vip, VipResponse};
use crate::proto::registry::{
    NetworkService, NetworkServiceEndpoint, NetworkServiceEndpointQuery,
    NetworkServiceEndpointResponse, NetworkServiceQuery, NetworkServiceResponse,
};
use crate::proto::workload::{X509SVIDRequest, X509SVIDResponse};

const fn method<Req: Message, Resp: Message>(
    ty: MethodType,
    name: &'static str,
) -> Method<Req, Resp> {
    Method {
        ty,
        name,
        req_mar: Marshaller {
            ser: pb_ser,
            de: pb_de,
        },
        resp_mar: Marshaller {
            ser: pb_ser,
            de: pb_de,
        },
    }
}

const UNARY: MethodType = MethodType::Unary;
const STREAM: MethodType = MethodType::ServerStreaming;

/// Makes, refreshes or moves a connection.
pub const REQUEST: Method<NetworkServiceRequest, Connection> =
    method(UNARY, "/networkservice.NetworkService/Request");
/// Ends a connection.
pub const CLOSE: Method<Connection, Empty> = method(UNARY, "/networkservice.NetworkService/Close");
/// Events about connections; note the package: `connection`.
pub const MONITOR_CONNECTIONS: Method<MonitorScopeSelector, ConnectionEvent> =
    method(STREAM, "/connection.MonitorConnection/MonitorConnections");

/// Registers a network service.
pub const NS_REGISTER: Method<NetworkService, NetworkService> =
    method(UNARY, "/registry.NetworkServiceRegistry/Register");
/// Finds network services.
pub const NS_FIND: Method<NetworkServiceQuery, NetworkServiceResponse> =
    method(STREAM, "/registry.NetworkServiceRegistry/Find");
/// Removes a network service.
pub const NS_UNREGISTER: Method<NetworkService, Empty> =
    method(UNARY, "/registry.NetworkServiceRegistry/Unregister");
/// Registers, or refreshes, an endpoint.
pub const NSE_REGISTER: Method<NetworkServiceEndpoint, NetworkServiceEndpoint> =
    method(UNARY, "/registry.NetworkServiceEndpointRegistry/Register");
/// Finds endpoints.
pub const NSE_FIND: Method<NetworkServiceEndpointQuery, NetworkServiceEndpointResponse> =
    method(STREAM, "/registry.NetworkServiceEndpointRegistry/Find");
/// Removes an endpoint.
pub const NSE_UNREGISTER: Method<NetworkServiceEndpoint, Empty> =
    method(UNARY, "/registry.NetworkServiceEndpointRegistry/Unregister");

/// Allocates, or renews, the address of a child of a subnet.
pub const IPAM_ALLOCATE: Method<Child, Prefix> = method(UNARY, "/ipam.v1.Ipam/Allocate");
/// Gives an address back.
pub const IPAM_RELEASE: Method<Child, Empty> = method(UNARY, "/ipam.v1.Ipam/Release");

/// The VIPs of a trench, as full lists.
pub const WATCH_VIP: Method<Vip, VipResponse> =
    method(STREAM, "/nsp.v1.ConfigurationManager/WatchVip");
/// Registers a target; the proxy does not call it, its lab does.
pub const TARGET_REGISTER: Method<Target, Empty> = method(UNARY, "/nsp.v1.TargetRegistry/Register");
/// Removes a target.
pub const TARGET_UNREGISTER: Method<Target, Empty> =
    method(UNARY, "/nsp.v1.TargetRegistry/Unregister");
/// The targets of a stream, as full lists.
pub const TARGET_WATCH: Method<Target, TargetResponse> =
    method(STREAM, "/nsp.v1.TargetRegistry/Watch");

/// Asks for a service's health once.
pub const HEALTH_CHECK: Method<HealthCheckRequest, HealthCheckResponse> =
    method(UNARY, "/grpc.health.v1.Health/Check");
/// Follows a service's health.
pub const HEALTH_WATCH: Method<HealthCheckRequest, HealthCheckResponse> =
    method(STREAM, "/grpc.health.v1.Health/Watch");

/// X.509 identities of the calling process, as full replacements. The service
/// has no package.
pub const FETCH_X509_SVID: Method<X509SVIDRequest, X509SVIDResponse> =
    method(STREAM, "/SpiffeWorkloadAPI/FetchX509SVID");
