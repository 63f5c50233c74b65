//! Turns `proto/` into Rust messages with the pure-Rust parser: no `protoc` is
//! needed. Services are not generated; their methods are constants in
//! `src/rpc/method.rs`.

use std::path::Path;

const PROTOS: [&str; 8] = [
    "connection.proto",
    "connectioncontext.proto",
    "health.proto",
    "ipam.proto",
    "networkservice.proto",
    "nsp.proto",
    "registry.proto",
    "workload.proto",
];

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    for file in PROTOS {
        println!("cargo::rerun-if-changed=proto/{file}");
    }
    println!("cargo::rerun-if-env-changed=MERIDIO_PROXY_VERSION");

    // Generated code keeps the field names of the wire description, which are
    // not all in Rust's style; the module that includes it allows that once.
    protobuf_codegen::Codegen::new()
        .pure()
        .include("proto")
        .inputs(PROTOS.iter().map(|file| Path::new("proto").join(file)))
        .cargo_out_dir("proto")
        .run_from_script();
}
