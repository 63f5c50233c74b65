//! The health server, asked over its real unix socket.

#![allow(
    clippy::unwrap_used,
    clippy::panic,
    reason = "helpers of tests end by panicking too"
)]

#[path = "contract_health/undecodable.rs"]
mod undecodable;

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use grpcio::{Channel, ServerCredentials, ServiceBuilder};
use meridio_proxy::health::client::Probe;
use meridio_proxy::health::server::HealthServer;
use meridio_proxy::health::{HealthCell, SubService};
use meridio_proxy::proto::health::health_check_response::ServingStatus;
use meridio_proxy::proto::health::{HealthCheckRequest, HealthCheckResponse};
use meridio_proxy::rpc::call::{self, Options};
use meridio_proxy::rpc::env::Rpc;
use meridio_proxy::rpc::method::{HEALTH_CHECK, HEALTH_WATCH};
use meridio_proxy::rpc::pump::{self, Item, Pump};
use meridio_proxy::rpc::status::{Code, RpcError};
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::stop_pair;

const LIMIT: Duration = Duration::from_secs(10);

/// A directory of this test's own, removed at the end.
struct Directory(PathBuf);

impl Directory {
    fn new(test: &str) -> Self {
        let path = std::env::temp_dir().join(format!("health-{test}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn deadline() -> Instant {
    clock::now() + LIMIT
}

fn channel(rpc: &Rpc, path: &Path) -> Channel {
    rpc.channel(Duration::from_millis(100))
        .connect(&format!("unix:{}", path.display()))
}

fn request(service: &str) -> HealthCheckRequest {
    HealthCheckRequest {
        service: service.to_owned(),
        ..Default::default()
    }
}

fn check(channel: &Channel, service: &str) -> Result<ServingStatus, RpcError> {
    let (_stopper, stop) = stop_pair();
    let options = Options {
        wait_for_ready: true,
        ..Options::with_timeout(LIMIT)
    };
    call::unary(channel, &HEALTH_CHECK, &request(service), &options, &stop)
        .map(|reply| reply.message.status.unwrap())
}

fn watch(channel: &Channel, service: &str) -> Pump<HealthCheckResponse> {
    let options = Options {
        wait_for_ready: true,
        ..Options::default()
    };
    pump::open(channel, &HEALTH_WATCH, &request(service), &options).unwrap()
}

fn next(pump: &Pump<HealthCheckResponse>) -> ServingStatus {
    match pump.items().recv_timeout(LIMIT).unwrap() {
        Item::Message(answer) => answer.status.unwrap(),
        Item::Ended(end) => panic!("the stream ended: {end:?}"),
    }
}

fn nothing_more(pump: &Pump<HealthCheckResponse>) {
    let more = pump.items().recv_timeout(Duration::from_millis(100));
    assert!(more.is_err(), "{more:?}");
}

#[test]
fn check_follows_the_facts() {
    let directory = Directory::new("check");
    let path = directory.0.join("deeper/health.sock");
    let (rpc, cell) = (Rpc::new(), HealthCell::new());
    let server = HealthServer::start(&rpc, &path, &cell).unwrap();
    let channel = channel(&rpc, &path);
    let serving = |service: &str| check(&channel, service).unwrap() == ServingStatus::SERVING;
    let subs = [
        ("IPAMCli", SubService::IpamCli),
        ("NSPCli", SubService::NspCli),
        ("NSMEndpoint", SubService::NsmEndpoint),
        ("Egress", SubService::Egress),
    ];
    assert!(serving("") && serving("Liveness"));
    for (name, sub) in subs {
        assert!(!serving(name) && !serving("Readiness"), "{name}");
        cell.set(sub, true, "test");
        assert!(serving(name), "{name}");
    }
    assert!(serving("Readiness") && serving("Liveness"));
    cell.set(SubService::NsmEndpoint, false, "test");
    assert!(!serving("Readiness") && !serving("Liveness") && !serving("NSMEndpoint"));
    assert!(serving("") && serving("Egress"));
    cell.set(SubService::NsmEndpoint, true, "test");
    cell.stopping();
    assert!(!serving("Readiness") && !serving("Liveness"));
    assert!(serving("NSMEndpoint"));

    for unknown in [
        "Startup",
        "readiness",
        "x".repeat(100_000).as_str(),
        "\n\u{1b}[0m",
    ] {
        let error = check(&channel, unknown).unwrap_err();
        assert_eq!(error.code(), Some(Code::NOT_FOUND), "{error}");
        assert!(error.to_string().len() < 400);
    }
    server.stop();
    assert!(!path.exists());
}

#[test]
fn watch_tells_the_status_and_each_change() {
    let directory = Directory::new("watch");
    let path = directory.0.join("health.sock");
    let (rpc, cell) = (Rpc::new(), HealthCell::new());
    let server = HealthServer::start(&rpc, &path, &cell).unwrap();
    let channel = channel(&rpc, &path);
    let egress = watch(&channel, "Egress");
    let unknown = watch(&channel, "Startup");
    assert_eq!(next(&egress), ServingStatus::NOT_SERVING);
    assert_eq!(next(&unknown), ServingStatus::SERVICE_UNKNOWN);
    cell.set(SubService::Egress, true, "test");
    assert_eq!(next(&egress), ServingStatus::SERVING);
    // Neither another service's change nor the same fact again is told.
    cell.set(SubService::IpamCli, true, "test");
    cell.set(SubService::Egress, true, "again");
    nothing_more(&egress);
    cell.set(SubService::Egress, false, "test");
    assert_eq!(next(&egress), ServingStatus::NOT_SERVING);
    nothing_more(&unknown);
    server.stop();
    let end = egress.items().recv_timeout(LIMIT).unwrap();
    assert!(matches!(end, Item::Ended(Err(_))), "{end:?}");
}

#[test]
fn watches_are_bounded_and_given_back() {
    let directory = Directory::new("bound");
    let path = directory.0.join("health.sock");
    let (rpc, cell) = (Rpc::new(), HealthCell::new());
    let server = HealthServer::start(&rpc, &path, &cell).unwrap();
    let channel = channel(&rpc, &path);
    let mut open: Vec<_> = (0..64).map(|_| watch(&channel, "")).collect();
    for pump in &open {
        assert_eq!(next(pump), ServingStatus::SERVING);
    }
    let refused = watch(&channel, "");
    match refused.items().recv_timeout(LIMIT).unwrap() {
        Item::Ended(Err(pump::StreamError::Rpc(error))) => {
            assert_eq!(error.code(), Some(Code::RESOURCE_EXHAUSTED));
        }
        other => panic!("{other:?}"),
    }
    // A stream that its client cancels makes room, without any change of the
    // facts; the server hears of it a moment later.
    drop(open.pop());
    let until = deadline();
    loop {
        let again = watch(&channel, "");
        match again.items().recv_timeout(LIMIT).unwrap() {
            Item::Message(_) => break,
            Item::Ended(_) => assert!(clock::now() < until, "no room came"),
        }
    }
    server.stop();
}

#[test]
fn a_stale_socket_is_replaced_and_a_file_is_not() {
    let directory = Directory::new("stale");
    let path = directory.0.join("health.sock");
    drop(UnixListener::bind(&path).unwrap());
    let (rpc, cell) = (Rpc::new(), HealthCell::new());
    let server = HealthServer::start(&rpc, &path, &cell).unwrap();
    assert_eq!(
        check(&channel(&rpc, &path), "").unwrap(),
        ServingStatus::SERVING
    );
    server.stop();

    std::fs::write(&path, "precious").unwrap();
    let error = HealthServer::start(&rpc, &path, &cell)
        .map(drop)
        .unwrap_err();
    assert!(error.to_string().contains("is no socket"), "{error}");
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "precious");
}

/// Whoever says nothing, no HTTP/2, or too much, takes nothing from a probe.
#[test]
fn nonsense_at_the_socket_disturbs_no_probe() {
    let directory = Directory::new("nonsense");
    let path = directory.0.join("health.sock");
    let (rpc, cell) = (Rpc::new(), HealthCell::new());
    let server = HealthServer::start(&rpc, &path, &cell).unwrap();
    let channel = channel(&rpc, &path);
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
    let silent: Vec<_> = (0..50)
        .map(|_| UnixStream::connect(&path).unwrap())
        .collect();
    for garbage in [
        b"GET / HTTP/1.1\r\n\r\n".to_vec(),
        vec![0xff; 100_000],
        [&preface[..], &[0xff; 1000]].concat(),
    ] {
        let mut stream = UnixStream::connect(&path).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        // It may be closed before all of it is taken.
        let _ = stream.write_all(&garbage);
        let ended = stream.read_to_end(&mut Vec::new());
        let is_late = |error: &std::io::Error| error.kind() == std::io::ErrorKind::WouldBlock;
        assert!(!ended.as_ref().is_err_and(is_late), "{ended:?}");
        assert_eq!(check(&channel, "").unwrap(), ServingStatus::SERVING);
    }
    let error = check(&channel, &"x".repeat(5 << 20)).unwrap_err();
    assert_eq!(error.code(), Some(Code::RESOURCE_EXHAUSTED), "{error}");
    assert_eq!(check(&channel, "").unwrap(), ServingStatus::SERVING);
    drop(silent);
    server.stop();
}

#[test]
fn a_path_where_no_socket_can_be_is_an_error_that_names_it() {
    let directory = Directory::new("wrong");
    let (rpc, cell) = (Rpc::new(), HealthCell::new());
    let start = |path: &Path| {
        let error = HealthServer::start(&rpc, path, &cell).map(drop);
        error.unwrap_err().to_string()
    };
    let occupied = directory.0.join("occupied");
    std::fs::create_dir(&occupied).unwrap();
    let error = start(&occupied);
    assert!(
        error.contains("occupied") && error.contains("is no socket"),
        "{error}"
    );
    assert!(occupied.is_dir());
    let error = start(&directory.0.join("x".repeat(108)));
    assert!(error.contains("xxx"), "{error}");
    let file = directory.0.join("file");
    std::fs::write(&file, "precious").unwrap();
    let error = start(&file.join("health.sock"));
    assert!(
        error.contains("file/health.sock") || error.contains("Not a directory"),
        "{error}"
    );
}

/// The two may overlap when a container is replaced in its pod.
#[test]
fn a_successor_keeps_its_socket_when_the_predecessor_ends() {
    let directory = Directory::new("successor");
    let path = directory.0.join("health.sock");
    let (rpc, cell) = (Rpc::new(), HealthCell::new());
    let first = HealthServer::start(&rpc, &path, &cell).unwrap();
    let second = HealthServer::start(&rpc, &path, &cell).unwrap();
    first.stop();
    assert!(path.exists());
    let answer = check(&channel(&rpc, &path), "");
    assert_eq!(answer.unwrap(), ServingStatus::SERVING);
    second.stop();
    let left: Vec<_> = std::fs::read_dir(&directory.0).unwrap().collect();
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn the_probe_of_the_deployment_is_answered() {
    let directory = Directory::new("probe");
    let path = directory.0.join("health.sock");
    let (rpc, cell) = (Rpc::new(), HealthCell::new());
    let server = HealthServer::start(&rpc, &path, &cell).unwrap();
    let probe = |service: &str| {
        let args = [
            format!("-addr=unix://{}", path.display()),
            format!("-service={service}"),
            "-connect-timeout=5s".to_owned(),
            "-rpc-timeout=5s".to_owned(),
        ];
        let probe = Probe::parse(args.into_iter().map(Into::into)).unwrap();
        probe.run().map_err(|error| error.exit_status())
    };
    assert_eq!(probe(""), Ok(()));
    assert_eq!(probe("Liveness"), Ok(()));
    assert_eq!(probe("Readiness"), Err(4));
    assert_eq!(probe("Startup"), Err(3));
    server.stop();
}

/// The binary under the probe's name; its exit status and what it says.
struct Tool(PathBuf);

impl Tool {
    fn new(directory: &Directory) -> Self {
        let path = directory.0.join("grpc_health_probe");
        std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_proxy"), &path).unwrap();
        Self(path)
    }

    fn run(&self, args: &[&str]) -> (Option<i32>, String) {
        let output = std::process::Command::new(&self.0)
            .args(args)
            .env_clear()
            .output()
            .unwrap();
        let said = [output.stdout, output.stderr].concat();
        (output.status.code(), String::from_utf8(said).unwrap())
    }
}

/// Exit statuses and first words of grpc-health-probe v0.4.61.
#[test]
fn the_probe_ends_as_the_original_tool_does() {
    let directory = Directory::new("tool");
    let tool = Tool::new(&directory);
    let path = directory.0.join("health.sock");
    let (rpc, cell) = (Rpc::new(), HealthCell::new());
    let server = HealthServer::start(&rpc, &path, &cell).unwrap();
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let silent = silent.local_addr().unwrap().to_string();
    let unix = format!("unix://{}", path.display());
    let long = "-connect-timeout=5s";
    for (args, status, says) in [
        (&["-addr", &unix, long][..], 0, "status: SERVING\n"),
        (
            &["-addr", &unix, long, "-gzip", "-rpc-header=a: b"],
            0,
            "status: SERVING\n",
        ),
        (
            &["-addr", &unix, long, "-service=Readiness"],
            4,
            "service unhealthy (responded with \"NOT_SERVING\")\n",
        ),
        (
            &["-addr", &unix, long, "-service=Startup"],
            3,
            "error: health rpc failed: ",
        ),
        (
            &["-addr", &silent, "-connect-timeout=100ms"],
            2,
            "timeout: failed to connect service ",
        ),
        (
            &["-addr=127.0.0.1:1", "-connect-timeout=100ms"],
            2,
            "timeout: failed to connect service \"127.0.0.1:1\" within 100ms\n",
        ),
        (&["-addr", &unix, "-tls"], 1, "error: -tls is not supported"),
        (
            &["-addr", &unix, "-rpc-timeout=x"],
            1,
            "error: invalid value",
        ),
        (&["-h"], 1, "Usage:\n"),
        (&[], 1, "error: -addr not specified\n"),
        (&["-version"], 0, meridio_proxy::cli::VERSION),
    ] {
        let (ended, said) = tool.run(args);
        assert_eq!(ended, Some(status), "{args:?}: {said}");
        assert!(said.starts_with(says), "{args:?}: {said}");
    }
    let (_, said) = tool.run(&["-v", "-addr", &unix, long]);
    let lines: Vec<&str> = said.lines().collect();
    assert_eq!(lines.len(), 4, "{said}");
    server.stop();
}

/// Over TCP, a server that hears the headers and the user agent, and one that
/// never answers.
#[test]
fn the_probe_speaks_tcp_and_sends_what_it_is_told_to() {
    let directory = Directory::new("tcp");
    let tool = Tool::new(&directory);
    let rpc = Rpc::new();
    let (heard, hears) = crossbeam_channel::bounded(1);
    let held = std::sync::Arc::new(parking_lot::Mutex::new(Vec::new()));
    let service = ServiceBuilder::new()
        .add_unary_handler(&HEALTH_CHECK, move |context, request, sink| {
            let texts = context
                .request_headers()
                .iter()
                .filter_map(|(name, value)| {
                    Some(format!("{name}: {}", std::str::from_utf8(value).ok()?))
                });
            let _ = heard.try_send(texts.collect::<Vec<_>>());
            if request.service == "silent" {
                held.lock().push(sink);
                return;
            }
            let answered = sink.success(HealthCheckResponse {
                status: ServingStatus::SERVING.into(),
                ..Default::default()
            });
            context.spawn(async move {
                let _ = answered.await;
            });
        })
        .build();
    let mut server = rpc.server().register_service(service).build().unwrap();
    let port = server
        .add_listening_port("127.0.0.1:0", ServerCredentials::insecure())
        .unwrap();
    server.start();
    let address = format!("127.0.0.1:{port}");
    let args = [
        "-addr",
        &address,
        "-user-agent=me",
        "-rpc-header",
        "X-Team: red",
    ];
    assert_eq!(tool.run(&args).0, Some(0));
    let texts = hears.recv_timeout(LIMIT).unwrap();
    assert!(texts.contains(&"x-team: red".to_owned()), "{texts:?}");
    let agent = texts.iter().find(|text| text.starts_with("user-agent: me"));
    assert!(agent.is_some(), "{texts:?}");
    let args = ["-addr", &address, "-service=silent", "-rpc-timeout=100ms"];
    let (status, said) = tool.run(&args);
    assert_eq!(status, Some(3), "{said}");
    assert!(said.contains("timeout: health rpc did not complete within 100ms"));
}
