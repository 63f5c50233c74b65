//! `proto/` is our own description of other projects' messages. The tables here
//! were typed from those projects' definitions (Meridio api/ipam/v1 and
//! api/nsp/v1, NSM api/pkg/api, SPIFFE's workload.proto, gRPC's health.proto);
//! every field's number, name and type, and every method's path, must agree.

#![allow(clippy::unwrap_used, reason = "helpers of tests end by panicking too")]

use std::collections::{BTreeMap, BTreeSet};

use grpcio::{Method, MethodType};
use meridio_proxy::proto;
use meridio_proxy::rpc::method;
use protobuf::descriptor::field_descriptor_proto::{Label, Type};
use protobuf::descriptor::{DescriptorProto, EnumDescriptorProto, FieldDescriptorProto};
use protobuf::reflect::FileDescriptor;

/// `message: number name type, …`; a `*` is repeated, `a>b` a map. Enums:
/// `enum name: NAME=number, …`.
const WIRE: &str = "
connection.Mechanism: 1 cls string, 2 type string, 3 parameters string>string
connection.PathSegment: 1 name string, 2 id string, 3 token string, 4 expires google.protobuf.Timestamp, 5 metrics string>string
connection.Path: 1 index uint32, 2 path_segments *connection.PathSegment
connection.Connection: 1 id string, 2 network_service string, 3 mechanism connection.Mechanism, 4 context connectioncontext.ConnectionContext, 5 labels string>string, 6 path connection.Path, 7 network_service_endpoint_name string, 8 payload string, 9 state connection.State
connection.ConnectionEvent: 1 type connection.ConnectionEventType, 2 connections string>connection.Connection
connection.MonitorScopeSelector: 1 path_segments *connection.PathSegment, 2 network_services *string
enum connection.State: UP=0, DOWN=1, REFRESH_REQUESTED=2, RESELECT_REQUESTED=3
enum connection.ConnectionEventType: INITIAL_STATE_TRANSFER=0, UPDATE=1, DELETE=2
connectioncontext.IpNeighbor: 1 ip string, 2 hardware_address string
connectioncontext.Route: 1 prefix string, 2 nextHop string
connectioncontext.IpFamily: 1 family connectioncontext.IpFamily.Family
enum connectioncontext.IpFamily.Family: IPV4=0, IPV6=1
connectioncontext.ExtraPrefixRequest: 1 addr_family connectioncontext.IpFamily, 2 prefix_len uint32, 3 required_number uint32, 4 requested_number uint32
connectioncontext.PolicyRoute: 1 from string, 2 proto string, 3 dst_port string, 4 src_port string, 5 routes *connectioncontext.Route
connectioncontext.IPContext: 1 src_ip_addrs *string, 2 dst_ip_addrs *string, 3 src_ip_required bool, 4 dst_ip_required bool, 5 src_routes *connectioncontext.Route, 6 dst_routes *connectioncontext.Route, 7 excluded_prefixes *string, 8 ip_neighbors *connectioncontext.IpNeighbor, 9 extra_prefix_request *connectioncontext.ExtraPrefixRequest, 10 extra_prefixes *string, 11 policies *connectioncontext.PolicyRoute
connectioncontext.DNSConfig: 1 dns_server_ips *string, 2 search_domains *string
connectioncontext.DNSContext: 1 configs *connectioncontext.DNSConfig
connectioncontext.EthernetContext: 1 src_mac string, 2 dst_mac string, 3 vlan_tag int32
connectioncontext.ConnectionContext: 1 ip_context connectioncontext.IPContext, 2 dns_context connectioncontext.DNSContext, 3 ethernet_context connectioncontext.EthernetContext, 4 extra_context string>string, 5 MTU uint32
networkservice.NetworkServiceRequest: 1 connection connection.Connection, 2 mechanism_preferences *connection.Mechanism
registry.Metadata: 1 labels string>string
registry.Destination: 1 destination_selector string>string, 2 weight uint32
registry.Match: 1 source_selector string>string, 2 routes *registry.Destination, 3 fallthrough bool, 4 metadata registry.Metadata
registry.NetworkService: 1 name string, 2 payload string, 3 matches *registry.Match, 4 path_ids *string
registry.NetworkServiceLabels: 1 labels string>string
registry.NetworkServiceEndpoint: 1 name string, 2 network_service_names *string, 3 network_service_labels string>registry.NetworkServiceLabels, 4 url string, 5 expiration_time google.protobuf.Timestamp, 6 initial_registration_time google.protobuf.Timestamp, 7 path_ids *string
registry.NetworkServiceQuery: 1 network_service registry.NetworkService, 2 watch bool
registry.NetworkServiceEndpointQuery: 1 network_service_endpoint registry.NetworkServiceEndpoint, 2 watch bool
registry.NetworkServiceResponse: 1 network_service registry.NetworkService, 2 deleted bool
registry.NetworkServiceEndpointResponse: 1 network_service_endpoint registry.NetworkServiceEndpoint, 2 deleted bool
enum ipam.v1.IPFamily: IPV4=0, IPV6=1
ipam.v1.Prefix: 1 address string, 2 prefixLength int32
ipam.v1.Subnet: 1 conduit nsp.v1.Conduit, 2 node string, 3 ipFamily ipam.v1.IPFamily
ipam.v1.Child: 1 name string, 2 subnet ipam.v1.Subnet
nsp.v1.Trench: 1 name string
nsp.v1.PortNat: 1 port uint32, 2 targetPort uint32, 3 vips *nsp.v1.Vip, 4 protocol string
nsp.v1.Conduit: 1 name string, 2 trench nsp.v1.Trench, 3 destinationPortNats *nsp.v1.PortNat
nsp.v1.Stream: 1 name string, 2 conduit nsp.v1.Conduit, 3 maxTargets uint32
nsp.v1.Vip: 1 name string, 2 address string, 3 trench nsp.v1.Trench
nsp.v1.VipResponse: 1 vips *nsp.v1.Vip
enum nsp.v1.Target.Status: ENABLED=0, DISABLED=1, ANY=2
enum nsp.v1.Target.Type: DEFAULT=0, FRONTEND=1
nsp.v1.Target: 1 ips *string, 2 context string>string, 3 status nsp.v1.Target.Status, 4 type nsp.v1.Target.Type, 5 stream nsp.v1.Stream
nsp.v1.TargetResponse: 1 targets *nsp.v1.Target
grpc.health.v1.HealthCheckRequest: 1 service string
grpc.health.v1.HealthCheckResponse: 1 status grpc.health.v1.HealthCheckResponse.ServingStatus
enum grpc.health.v1.HealthCheckResponse.ServingStatus: UNKNOWN=0, SERVING=1, NOT_SERVING=2, SERVICE_UNKNOWN=3
X509SVIDRequest:
X509SVIDResponse: 1 svids *X509SVID, 2 crl *bytes, 3 federated_bundles string>bytes
X509SVID: 1 spiffe_id string, 2 x509_svid bytes, 3 x509_svid_key bytes, 4 bundle bytes, 5 hint string
";

/// Name in `rpc/method.rs`, path, request, response; `stream` before the
/// response of a server stream.
const METHODS: &str = "
REQUEST /networkservice.NetworkService/Request networkservice.NetworkServiceRequest connection.Connection
CLOSE /networkservice.NetworkService/Close connection.Connection google.protobuf.Empty
MONITOR_CONNECTIONS /connection.MonitorConnection/MonitorConnections connection.MonitorScopeSelector stream connection.ConnectionEvent
NS_REGISTER /registry.NetworkServiceRegistry/Register registry.NetworkService registry.NetworkService
NS_FIND /registry.NetworkServiceRegistry/Find registry.NetworkServiceQuery stream registry.NetworkServiceResponse
NS_UNREGISTER /registry.NetworkServiceRegistry/Unregister registry.NetworkService google.protobuf.Empty
NSE_REGISTER /registry.NetworkServiceEndpointRegistry/Register registry.NetworkServiceEndpoint registry.NetworkServiceEndpoint
NSE_FIND /registry.NetworkServiceEndpointRegistry/Find registry.NetworkServiceEndpointQuery stream registry.NetworkServiceEndpointResponse
NSE_UNREGISTER /registry.NetworkServiceEndpointRegistry/Unregister registry.NetworkServiceEndpoint google.protobuf.Empty
IPAM_ALLOCATE /ipam.v1.Ipam/Allocate ipam.v1.Child ipam.v1.Prefix
IPAM_RELEASE /ipam.v1.Ipam/Release ipam.v1.Child google.protobuf.Empty
WATCH_VIP /nsp.v1.ConfigurationManager/WatchVip nsp.v1.Vip stream nsp.v1.VipResponse
TARGET_REGISTER /nsp.v1.TargetRegistry/Register nsp.v1.Target google.protobuf.Empty
TARGET_UNREGISTER /nsp.v1.TargetRegistry/Unregister nsp.v1.Target google.protobuf.Empty
TARGET_WATCH /nsp.v1.TargetRegistry/Watch nsp.v1.Target stream nsp.v1.TargetResponse
HEALTH_CHECK /grpc.health.v1.Health/Check grpc.health.v1.HealthCheckRequest grpc.health.v1.HealthCheckResponse
HEALTH_WATCH /grpc.health.v1.Health/Watch grpc.health.v1.HealthCheckRequest stream grpc.health.v1.HealthCheckResponse
FETCH_X509_SVID /SpiffeWorkloadAPI/FetchX509SVID X509SVIDRequest stream X509SVIDResponse
";

fn files() -> [&'static FileDescriptor; 8] {
    [
        proto::connection::file_descriptor(),
        proto::connectioncontext::file_descriptor(),
        proto::health::file_descriptor(),
        proto::ipam::file_descriptor(),
        proto::networkservice::file_descriptor(),
        proto::nsp::file_descriptor(),
        proto::registry::file_descriptor(),
        proto::workload::file_descriptor(),
    ]
}

fn scoped(scope: &str, name: &str) -> String {
    if scope.is_empty() {
        name.to_owned()
    } else {
        format!("{scope}.{name}")
    }
}

/// A message and all that is in it, in the tables' form.
fn message(scope: &str, message: &DescriptorProto, lines: &mut BTreeSet<String>) {
    let name = scoped(scope, message.name());
    assert!(
        message.oneof_decl.is_empty(),
        "{name}: no message has a oneof"
    );
    assert!(
        message.extension.is_empty(),
        "{name}: no message has extensions"
    );
    let maps: BTreeMap<String, &DescriptorProto> = message
        .nested_type
        .iter()
        .filter(|nested| nested.options.map_entry())
        .map(|entry| (scoped(&name, entry.name()), entry))
        .collect();
    let fields: Vec<String> = message
        .field
        .iter()
        .map(|field| format!("{} {} {}", field.number(), field.name(), kind(field, &maps)))
        .collect();
    lines.insert(
        format!("{name}: {}", fields.join(", "))
            .trim_end()
            .to_owned(),
    );
    for nested in &message.nested_type {
        if !nested.options.map_entry() {
            self::message(&name, nested, lines);
        }
    }
    for nested in &message.enum_type {
        lines.insert(enumeration(&name, nested));
    }
}

fn kind(field: &FieldDescriptorProto, maps: &BTreeMap<String, &DescriptorProto>) -> String {
    let name = match field.type_() {
        Type::TYPE_MESSAGE | Type::TYPE_ENUM => {
            field.type_name().trim_start_matches('.').to_owned()
        }
        scalar => format!("{scalar:?}").replace("TYPE_", "").to_lowercase(),
    };
    if let Some(entry) = maps.get(&name) {
        let part = |number| {
            let found = entry.field.iter().find(|field| field.number() == number);
            kind(found.unwrap(), &BTreeMap::new())
        };
        return format!("{}>{}", part(1), part(2));
    }
    match field.label() {
        Label::LABEL_REPEATED => format!("*{name}"),
        _ => name,
    }
}

fn enumeration(scope: &str, declared: &EnumDescriptorProto) -> String {
    let values: Vec<String> = declared
        .value
        .iter()
        .map(|value| format!("{}={}", value.name(), value.number()))
        .collect();
    format!(
        "enum {}: {}",
        scoped(scope, declared.name()),
        values.join(", ")
    )
}

fn lines(table: &str) -> BTreeSet<String> {
    let lines: Vec<&str> = table.lines().filter(|line| !line.is_empty()).collect();
    let set: BTreeSet<String> = lines.iter().map(|line| (*line).to_owned()).collect();
    assert_eq!(set.len(), lines.len(), "a line is there twice");
    set
}

#[test]
fn every_message_and_enum_is_wire_identical() {
    let mut described = BTreeSet::new();
    for file in files() {
        let file = file.proto();
        assert_eq!(file.syntax(), "proto3", "{}", file.name());
        for declared in &file.message_type {
            message(file.package(), declared, &mut described);
        }
        for declared in &file.enum_type {
            described.insert(enumeration(file.package(), declared));
        }
    }
    let expected = lines(WIRE);
    let missing: Vec<_> = expected.difference(&described).collect();
    let surplus: Vec<_> = described.difference(&expected).collect();
    assert!(
        missing.is_empty() && surplus.is_empty(),
        "expected: {missing:#?}\nfound: {surplus:#?}"
    );
}

#[test]
fn every_method_has_its_path_and_messages() {
    fn line<Req, Resp>(name: &str, method: &Method<Req, Resp>) -> String
    where
        Req: protobuf::MessageFull,
        Resp: protobuf::MessageFull,
    {
        let response = Resp::descriptor().full_name().to_owned();
        let response = match method.ty {
            MethodType::Unary => response,
            MethodType::ServerStreaming => format!("stream {response}"),
            _ => format!("client streaming {response}"),
        };
        let request = Req::descriptor().full_name().to_owned();
        format!("{name} {} {request} {response}", method.name)
    }
    macro_rules! described {
        ($($name:ident)+) => { BTreeSet::from([$(line(stringify!($name), &method::$name)),+]) };
    }
    let described = described!(REQUEST CLOSE MONITOR_CONNECTIONS NS_REGISTER NS_FIND NS_UNREGISTER
        NSE_REGISTER NSE_FIND NSE_UNREGISTER IPAM_ALLOCATE IPAM_RELEASE WATCH_VIP TARGET_REGISTER
        TARGET_UNREGISTER TARGET_WATCH HEALTH_CHECK HEALTH_WATCH FETCH_X509_SVID);
    assert_eq!(described, lines(METHODS));
    // None is left out of the table.
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("src/rpc/method.rs");
    let source = std::fs::read_to_string(path).unwrap();
    assert_eq!(source.matches("pub const ").count(), described.len());
}
