//! Turns `proto/` into Rust messages with the pure-Rust parser: no `protoc` is
//! needed. Services are not generated; their methods are constants in
//! `src/rpc/method.rs`. For a release, has the C++ library linked in.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

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

    if env::var("PROFILE").is_ok_and(|profile| profile == "release")
        && let Some(folder) = static_cpp()
    {
        println!("cargo::rustc-link-search=native={}", folder.display());
    }
}

/// A folder where the linker finds the C++ library as an archive only, and so
/// takes from it what the C core of gRPC needs: the whole of it, and the
/// mathematics that only it uses, are 1.5 MiB of memory more. `None` where the
/// compiler has no archive.
fn static_cpp() -> Option<PathBuf> {
    const NAME: &str = "libstdc++.a";
    println!("cargo::rerun-if-env-changed=CXX");
    let compiler = env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let said = Command::new(compiler)
        .arg(format!("-print-file-name={NAME}"))
        .output()
        .ok()?;
    // The bare name when it is not found.
    let archive = PathBuf::from(String::from_utf8(said.stdout).ok()?.trim());
    let folder = PathBuf::from(env::var_os("OUT_DIR")?).join("cpp");
    let link = folder.join(NAME);
    std::fs::create_dir_all(&folder).ok()?;
    let _ = std::fs::remove_file(&link);
    (archive.is_absolute() && std::os::unix::fs::symlink(archive, link).is_ok()).then_some(folder)
}
