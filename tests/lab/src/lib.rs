//! The peers that meridio-proxy meets in a cluster, for tests, demo and
//! benchmarks: SPIRE agent, nsmgr with registry and kernel forwarder, IPAM,
//! NSP, load balancers and targets, each in a network namespace of its own,
//! with mTLS everywhere. They refuse what the real ones refuse. Nothing of the
//! daemon depends on this crate.
//!
//! Every peer can have a bad day, under the same names ([`fault::Fault`]), by
//! [`topology::Topology::inflict`] and [`topology::Topology::recover`]:
//!
//! | fault | SPIRE agent, IPAM, NSP | nsmgr, registry, forwarder | LB | target |
//! |---|---|---|---|---|
//! | Pause | no byte passes ([`wire`]) | none answers; nsmgr moves no byte | no answer | – |
//! | Kill | connections cut, new ones refused | so too; the forwarder: DOWN for all | silent, its registration runs out | ends without a Close |
//! | Restart | cut, and there again | all forgotten, but by the registry | DOWN, interfaces forgotten | connects anew |
//! | Late | what it sends, delayed | calls delayed | calls delayed | – |
//! | Refuse | calls and streams answered with the status | so too | calls | – |
//! | DropStreams | streams end; IPAM: connections cut | streams end; the forwarder: DOWN for all | DOWN | takes its connection for DOWN |
//! | Forget | a new SVID; no leases; no VIPs | no connections, no endpoints | interfaces forgotten | connects anew, with no address in mind |
#![allow(
    missing_docs,
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::needless_pass_by_value,
    clippy::cast_possible_truncation,
    clippy::cast_possible_wrap,
    clippy::cast_sign_loss
)]

pub mod agent;
pub mod backlog;
pub mod burst;
pub mod client;
pub mod datapath;
pub mod demo;
pub mod echo;
pub mod fault;
pub mod forwarder;
pub mod infra;
pub mod ipam;
pub mod lb;
pub mod link;
pub mod monitor;
pub mod netns;
pub mod nft;
pub mod nsmgr;
pub mod nsp;
pub mod path;
pub mod pki;
pub mod policy;
pub mod process;
pub mod registry;
pub mod router;
pub mod sock;
pub mod spoil;
pub mod spread;
pub mod target;
pub mod tls;
pub mod topology;
pub mod traffic;
pub mod veth;
pub mod wire;
pub mod workdir;
