//! Peers whose messages cannot be decoded at all: what they said before stays
//! in force, they are asked again, and all others go on.

use meridio_lab::spoil::{Spoil, Spoils};
use meridio_lab::topology::{LIMIT, Topology, TopologyOptions};
use meridio_proxy::proto::workload::X509SVIDResponse;
use meridio_proxy::rpc::method;
use meridio_proxy::sync::clock;
use meridio_proxy::sync::thread::{STACK_SMALL, ThreadHandle, Threads};

use super::hostile::{assert_held, held, lines, says};
use super::{during, in_good_order, lab, lost, steady};

/// What the decoder says, and what gRPC says of a message beyond its limit.
const SPOILS: [(Spoil, &str); 4] = [
    (Spoil::Rubbish, "cannot be decoded"),
    (Spoil::Truncated, "cannot be decoded"),
    (Spoil::Nested, "cannot be decoded"),
    (Spoil::Oversized, "RESOURCE_EXHAUSTED"),
];
/// The level of a line that tells of trouble.
const WARNING: &str = "\"severity\":\"warning\"";
/// Attempts before the peer is sane again.
const ATTEMPTS: usize = 3;

fn wait(spoils: &Spoils, method: &'static str, count: usize) {
    spoils.wait(method, count, clock::now() + LIMIT).unwrap();
}

/// Ends the spoiling of `method` after so many more answers.
fn heal_after(spoils: &Spoils, method: &'static str, count: usize) -> ThreadHandle {
    let (spoils, count) = (spoils.clone(), spoils.done(method) + count);
    let heal = move |_| {
        let waited = spoils.wait(method, count, clock::now() + LIMIT);
        spoils.set(method, None);
        waited.unwrap();
    };
    (Threads::unsupervised().spawn("heal", STACK_SMALL, heal)).unwrap()
}

/// Readiness does not blink, whatever the peer says.
fn stays_ready(lab: &Topology, since: usize) {
    let daemon = lab.daemon().unwrap();
    daemon.health("Readiness").unwrap();
    let blink = |line: &&String| line.contains("NOT_SERVING");
    assert_eq!(daemon.lines()[since..].iter().find(blink), None);
}

#[test]
fn lists_of_vips_that_cannot_be_decoded() {
    let mut lab = lab(2, 1);
    let traffic = steady(&lab);
    let before = held(&lab);
    let since = lines(&lab);
    let spoils = lab.nsp.spoils().clone();
    let step = during(&traffic, || {
        for (spoil, why) in SPOILS {
            let since = lines(&lab);
            let count = spoils.done(method::WATCH_VIP.name) + ATTEMPTS;
            spoils.set(method::WATCH_VIP.name, Some(spoil));
            lab.nsp.repeat_vips();
            says(
                &lab,
                since,
                &[WARNING, "NSP does not tell the VIPs", why, "tried again"],
            );
            wait(&spoils, method::WATCH_VIP.name, count);
            spoils.set(method::WATCH_VIP.name, None);
            says(&lab, since, &["NSP tells the VIPs again"]);
        }
        stays_ready(&lab, since);
    });
    assert_eq!(lost(&lab, &step), 0, "{step}");
    assert_held(&lab, &before);
    lab.add_vip([20, 0, 0, 2].into()).unwrap();
    in_good_order(&lab);
}

#[test]
fn answers_of_ipam_that_cannot_be_decoded() {
    let mut lab = lab(2, 1);
    let traffic = steady(&lab);
    let since = lines(&lab);
    let name = lab.make_target().unwrap();
    let before = held(&lab);
    let spoils = lab.ipam.spoils().clone();
    let method = method::IPAM_ALLOCATE.name;
    let step = during(&traffic, || {
        for (spoil, why) in [SPOILS[0], SPOILS[3]] {
            spoils.set(method, Some(spoil));
            let error = lab.targets[&name].connect().unwrap_err();
            assert!(error.contains("IPAM") && error.contains(why), "{error}");
            spoils.set(method, None);
        }
        stays_ready(&lab, since);
    });
    assert_eq!(lost(&lab, &step), 0, "{step}");
    let step = during(&traffic, || {
        spoils.set(method, Some(Spoil::Rubbish));
        let _healer = heal_after(&spoils, method, 4);
        let lb = lab.add_lb().unwrap();
        says(&lab, since, &[WARNING, "IPAM", "cannot be decoded", &lb]);
        lab.start_target(&name).unwrap();
        stays_ready(&lab, since);
        lab.stop_target(&name).unwrap();
        lab.remove_lb(&lb).unwrap();
    });
    assert_eq!(lost(&lab, &step), 0, "{step}");
    assert_held(&lab, &before);
    in_good_order(&lab);
}

#[test]
fn answers_of_nsmgr_to_a_request_that_cannot_be_decoded() {
    for (spoil, why) in [SPOILS[0], SPOILS[3]] {
        let mut lab = lab(2, 1);
        let spoils = lab.nsmgr.spoils().clone();
        let traffic = steady(&lab);
        let before = held(&lab);
        let since = lines(&lab);
        let mut name = String::new();
        let step = during(&traffic, || {
            spoils.set(method::REQUEST.name, Some(spoil));
            let _healer = heal_after(&spoils, method::REQUEST.name, 1);
            name = lab.add_lb().unwrap();
            says(&lab, since, &[WARNING, "Request failed", why, &name]);
            stays_ready(&lab, since);
        });
        assert_eq!(step.lost_steady, 0, "{spoil:?}: {step}");
        // The connection of the answer that was lost leaves nothing either.
        lab.remove_lb(&name).unwrap();
        assert_held(&lab, &before);
        assert_eq!(lab.infra.leaked().unwrap(), 0);
    }
}

#[test]
fn streams_of_nsmgr_that_cannot_be_decoded() {
    let mut lab = lab(2, 1);
    let traffic = steady(&lab);
    let since = lines(&lab);
    let before = held(&lab);
    let spoils = lab.nsmgr.spoils().clone();
    let (find, monitor) = (method::NSE_FIND.name, method::MONITOR_CONNECTIONS.name);
    let step = during(&traffic, || {
        for (spoil, why) in SPOILS {
            let from = lines(&lab);
            spoils.set(find, Some(spoil));
            spoils.set(monitor, Some(spoil));
            let counts = [find, monitor].map(|m| (m, spoils.done(m) + 3 * ATTEMPTS));
            lab.nsmgr.drop_streams();
            for (method, count) in counts {
                wait(&spoils, method, count);
            }
            if spoil == Spoil::Rubbish {
                says(
                    &lab,
                    from,
                    &[WARNING, "the registry's stream of LBs ended", why],
                );
                says(
                    &lab,
                    from,
                    &[WARNING, "stream of the connection's events", why],
                );
                says(
                    &lab,
                    from,
                    &[WARNING, "stream of connection events is given up", why],
                );
                says(
                    &lab,
                    from,
                    &["watch of the own registry entry is lost", why],
                );
            }
            spoils.set(find, None);
            spoils.set(monitor, None);
        }
        stays_ready(&lab, since);
        let deadline = clock::now() + LIMIT;
        let service = lab.proxy_service();
        (lab.nsmgr.wait_registered(&service, "proxy-1", deadline)).unwrap();
    });
    assert_eq!(lost(&lab, &step), 0, "{step}");
    assert_held(&lab, &before);
    // The streams are back: new LBs and targets are seen.
    lab.add_lb().unwrap();
    lab.add_target().unwrap();
    in_good_order(&lab);
}

#[test]
fn answers_to_a_registration_that_cannot_be_decoded() {
    let mut lab = Topology::peers(TopologyOptions {
        lbs: 1,
        targets: 1,
        ..TopologyOptions::default()
    })
    .unwrap();
    let spoils = lab.nsmgr.spoils().clone();
    let (service, endpoint) = (method::NS_REGISTER.name, method::NSE_REGISTER.name);
    spoils.set(service, Some(Spoil::Rubbish));
    spoils.set(endpoint, Some(Spoil::Nested));
    lab.start_daemon().unwrap();
    says(
        &lab,
        0,
        &[
            "registering the network service failed",
            "cannot be decoded",
        ],
    );
    wait(&spoils, service, ATTEMPTS);
    spoils.set(service, None);
    says(&lab, 0, &["registering the network service succeeded"]);
    says(
        &lab,
        0,
        &[
            WARNING,
            "registering the endpoint failed",
            "cannot be decoded",
        ],
    );
    lab.add_lb().unwrap();
    wait(&spoils, endpoint, ATTEMPTS);
    spoils.set(endpoint, None);
    says(&lab, 0, &["registering the endpoint succeeded"]);
    lab.wait_ready().unwrap();
    lab.add_target().unwrap();
    let traffic = steady(&lab);
    let step = during(&traffic, || {});
    assert_eq!(lost(&lab, &step), 0, "{step}");
    in_good_order(&lab);
}

#[test]
fn identities_that_cannot_be_decoded() {
    let mut lab = lab(2, 1);
    let traffic = steady(&lab);
    let before = held(&lab);
    let since = lines(&lab);
    let step = during(&traffic, || {
        for (spoil, why) in SPOILS {
            let from = lines(&lab);
            let mut rubbish = X509SVIDResponse::default();
            spoil.apply(&mut rubbish);
            lab.agent.push(rubbish);
            says(
                &lab,
                from,
                &[WARNING, "Workload API at", why, "next attempt in 1s"],
            );
            says(
                &lab,
                from,
                &[WARNING, "Workload API at", why, "next attempt in 2s"],
            );
            lab.agent.rotate();
            says(&lab, from, &["new SVID"]);
        }
        stays_ready(&lab, since);
    });
    assert_eq!(lost(&lab, &step), 0, "{step}");
    assert_held(&lab, &before);
    lab.add_target().unwrap();
    in_good_order(&lab);
}
