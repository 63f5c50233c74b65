//! The daemon's own transport against nsmgr: the two were written apart.

use meridio_proxy::nsm::caller::NsmCaller;
use meridio_proxy::proto::networkservice::NetworkServiceRequest;
use meridio_proxy::rpc::method;
use meridio_proxy::sync::stop::stop_pair;
use meridio_proxy::sync::thread::Threads;
use meridio_proxy::transport::client::{Address, Connector, ConnectorOptions};

use super::rig::{LIMIT, Rig, event, soon};
use super::*;
use crate::path::RegistryPath;
use crate::pki::Pki;

fn connector(rig: &Rig, pki: &Pki) -> (Connector, meridio_proxy::spiffe::SvidCell) {
    let svid = pki.cell(
        &pki.id("ns/default/sa/meridio-proxy"),
        Duration::from_secs(3600),
    );
    let options = ConnectorOptions {
        name: "nsmgr",
        address: Address::Unix(rig.socket()),
        authority: "localhost".to_owned(),
        dial_timeout: LIMIT,
        backoff_max: Duration::from_millis(100),
    };
    let threads = Threads::unsupervised();
    let connector = Connector::start(&threads, &Rpc::new(), svid.clone(), options).unwrap();
    (connector, svid)
}

#[test]
fn the_daemons_calls_pass_through_rotations_and_a_restart() {
    let rig = Rig::new();
    let (connector, svid) = connector(&rig, &rig.pki);
    let caller = NsmCaller::new(connector.clone(), Duration::from_secs(600));
    let (_stopper, stop) = stop_pair();
    let netns = || vec![rig.netns.try_clone().unwrap()];
    let request = |connection: Connection| {
        let request = NetworkServiceRequest {
            connection: Some(connection).into(),
            mechanism_preferences: rig.preferences(),
            ..Default::default()
        };
        caller.unary(&method::REQUEST, &request, &[], &netns, soon(), &stop)
    };
    let up = request(rig.new_connection("c1", "lb-1")).unwrap().message;
    let monitor = caller
        .stream(
            &method::MONITOR_CONNECTIONS,
            &rig.selector("c1"),
            soon(),
            &stop,
        )
        .unwrap();
    assert_eq!(event(&monitor).1.path.index, 1);
    let mut last = up;
    for _ in 0..5 {
        let id = rig.pki.id("ns/default/sa/meridio-proxy");
        rig.pki.refill(&svid, &id, Duration::from_secs(3600));
        last = request(last).unwrap().message;
        // nsmgr presents a new certificate to the next connection only.
        rig.nsmgr.rotate(Duration::from_secs(3600));
        last = request(last).unwrap().message;
    }
    rig.nsmgr.restart().unwrap();
    last.state = State::RESELECT_REQUESTED.into();
    last.mechanism.clear();
    let last = request(last).unwrap().message;
    let fds = || std::fs::read_dir("/proc/self/fd").unwrap().count();
    let before = fds();
    for _ in 0..200 {
        request(last.clone()).unwrap();
    }
    // Each answer carried a descriptor; other tests run beside this one.
    assert!(
        fds() < before + 150,
        "{before} descriptors before, {} after",
        fds()
    );
    let closed = caller.unary(&method::CLOSE, &last, &[], &netns, soon(), &stop);
    closed.unwrap();
    assert_eq!(rig.nsmgr.crosses(), 0);
    connector.close(soon());
    rig.assert_no_refusals();
}

#[test]
fn the_daemons_registration_passes() {
    let rig = Rig::new();
    let proxy = rig.proxy();
    let (connector, _) = connector(&rig, &rig.pki);
    let caller = NsmCaller::new(connector.clone(), Duration::from_secs(600));
    let (_stopper, stop) = stop_pair();
    let file = || vec![proxy.file.try_clone().unwrap()];
    let headers = [("path".to_owned(), RegistryPath::default().to_json())];
    let ns = super::endpoint::network_service();
    caller
        .unary(
            &method::NS_REGISTER,
            &ns,
            &headers,
            &Vec::new,
            soon(),
            &stop,
        )
        .unwrap();
    let nse = proxy.registration();
    for _ in 0..3 {
        caller
            .unary(&method::NSE_REGISTER, &nse, &headers, &file, soon(), &stop)
            .unwrap();
    }
    caller
        .unary(
            &method::NSE_UNREGISTER,
            &nse,
            &headers,
            &file,
            soon(),
            &stop,
        )
        .unwrap();
    connector.close(soon());
    rig.assert_no_refusals();
}

#[test]
fn the_daemon_and_a_foreign_nsmgr_refuse_each_other() {
    let rig = Rig::new();
    let (connector, _) = connector(&rig, &Pki::new("td"));
    let (_stopper, stop) = stop_pair();
    let deadline = clock::now() + Duration::from_secs(1);
    assert!(connector.acquire(deadline, &stop).is_err());
    rig.nsmgr.wait_refusal("handshake", soon()).unwrap();
    connector.close(soon());
}
