//! From an event at a peer to the change in the kernel, as a netlink listener
//! in the pod sees it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use meridio_lab::datapath::LocalEndpoint;
use meridio_lab::lb::Lb;
use meridio_lab::link::watch::{Change, KernelWatch};
use meridio_lab::link::{Route, host};
use meridio_lab::topology::{LIMIT, TABLE, Topology, TopologyOptions};
use meridio_proxy::proto::connection::Connection;
use meridio_proxy::sync::clock;
use parking_lot::Mutex;

use crate::report::{Aim, Report};

const AIMS: [Aim; 2] = [Aim::Median(1.0), Aim::P99(10.0)];
const VIP_CHANGES: usize = 200;
const LB_CHANGES: usize = 100;
const TARGETS: usize = 40;
/// The load balancer that comes and goes.
const LB: &str = "lb-50";

pub fn run(report: &mut Report) -> Result<(), String> {
    let mut lab = Topology::start(TopologyOptions {
        lbs: 1,
        targets: 1,
        ..TopologyOptions::default()
    })?;
    let watch = KernelWatch::start(&lab.pod).map_err(|error| error.to_string())?;
    vips(&lab, &watch, report)?;
    lbs(&lab, &watch, report)?;
    targets(&mut lab, &watch, report)
}

fn late(what: &str) -> String {
    format!("{what}: not seen within {LIMIT:?}")
}

fn vips(lab: &Topology, watch: &KernelWatch, report: &mut Report) -> Result<(), String> {
    let own: Vec<String> = lab
        .vips()
        .iter()
        .map(|vip| host(*vip).to_string())
        .collect();
    let (mut added, mut removed) = (Vec::new(), Vec::new());
    for number in 0..VIP_CHANGES {
        let extra = host([20, 0, 1, number as u8].into());
        let more = extra.to_string();
        watch.skip();
        let begun = clock::now();
        lab.nsp
            .set_vips(own.iter().map(String::as_str).chain([more.as_str()]));
        let at = watch.wait(
            begun + LIMIT,
            |change| matches!(change, Change::Rule(rule) if rule.from == Some(extra)),
        );
        added.push(at.ok_or_else(|| late("rule"))? - begun);
        let begun = clock::now();
        lab.nsp.set_vips(own.iter().map(String::as_str));
        let at = watch.wait(
            begun + LIMIT,
            |change| matches!(change, Change::RuleGone(rule) if rule.from == Some(extra)),
        );
        removed.push(at.ok_or_else(|| late("end of a rule"))? - begun);
    }
    report.add_times("NSP tells a VIP, to its rule", &added, &AIMS);
    report.add_times("NSP takes a VIP back, to its rule's end", &removed, &AIMS);
    Ok(())
}

/// A load balancer that notes when its interfaces were joined: before the
/// lab's forwarder and nsmgr have finished their answer.
struct Timed {
    lb: Lb,
    joined: Mutex<Option<Instant>>,
}

impl LocalEndpoint for Timed {
    fn name(&self) -> String {
        self.lb.name().to_owned()
    }

    fn netns(&self) -> Arc<OwnedFd> {
        LocalEndpoint::netns(&self.lb)
    }

    fn request(&self, connection: Connection) -> Result<Connection, String> {
        self.lb.request(connection)
    }

    fn connected(&self, connection: &Connection) {
        self.lb.connected(connection);
        *self.joined.lock() = Some(clock::now());
    }

    fn close(&self, connection: &Connection) {
        self.lb.close(connection);
    }
}

fn has_hops(change: &Change, wanted: usize) -> bool {
    let is_default = |route: &Route| {
        route.table == TABLE && route.destination.is_ipv4() && route.hops.len() == wanted
    };
    matches!(change, Change::Route(route) if is_default(route))
}

fn lbs(lab: &Topology, watch: &KernelWatch, report: &mut Report) -> Result<(), String> {
    let lb = Lb::new(LB, 50).map_err(|error| error.to_string())?;
    (lab.router.attach(LB, 50, lb.namespace())).map_err(|error| error.to_string())?;
    let timed = Arc::new(Timed {
        lb,
        joined: Mutex::new(None),
    });
    // The last thing that nsmgr does before it hands its answer to gRPC.
    let answered = Arc::new(Mutex::new(None));
    let note = Arc::clone(&answered);
    lab.nsmgr.tamper(move |connection| {
        if connection.network_service_endpoint_name == LB {
            *note.lock() = Some(clock::now());
        }
    });
    let told = lab.nsmgr.endpoint_changes(&lab.lb_service());
    let (mut from_answer, mut from_joining) = (Vec::new(), Vec::new());
    let (mut from_entry, mut removed) = (Vec::new(), Vec::new());
    for _ in 0..LB_CHANGES {
        watch.skip();
        let begun = clock::now();
        lab.nsmgr.add_endpoint(
            &lab.lb_service(),
            Arc::clone(&timed) as Arc<dyn LocalEndpoint>,
        );
        let at = watch.wait(begun + LIMIT, |change| has_hops(change, 2));
        let at = at.ok_or_else(|| late("next hop"))?;
        let joined = timed.joined.lock().take().ok_or("no connection")?;
        let answered = answered.lock().take().ok_or("no answer")?;
        from_entry.push(at - begun);
        from_joining.push(at.saturating_duration_since(joined));
        from_answer.push(at.saturating_duration_since(answered));
        lab.nsmgr.unregister_endpoint(LB);
        let left = told.try_iter().find(|(_, _, left)| *left);
        let (begun, _, _) = left.ok_or("the registry tells nothing")?;
        let at = watch.wait(begun + LIMIT, |change| has_hops(change, 1));
        let at = at.ok_or_else(|| late("end of a next hop"))?;
        removed.push(at.saturating_duration_since(begun));
        let ended = lab.wait("end of the connection", || {
            let links = lab.rtnl.links()?;
            Ok(!links.iter().any(|link| link.alias.ends_with("-lb-50")))
        });
        ended?;
        lab.nsmgr.remove_endpoint(LB);
    }
    report.add_times(
        "nsmgr answers for an LB, to its next hop",
        &from_answer,
        &AIMS,
    );
    report.add_times(
        "an LB leaves the registry, to its hop's end",
        &removed,
        &AIMS,
    );
    let name = "its interface joined, nsmgr's work, next hop";
    report.add_times(name, &from_joining, &[]);
    let name = "registry entry, IPAM, Request, interface, next hop";
    report.add_times(name, &from_entry, &[]);
    Ok(())
}

/// From the interface under its final name to the port of the bridge.
fn targets(lab: &mut Topology, watch: &KernelWatch, report: &mut Report) -> Result<(), String> {
    let name = lab.make_target()?;
    let target = Arc::clone(&lab.targets[&name]);
    let mut times: Vec<Duration> = Vec::new();
    for _ in 0..TARGETS {
        watch.skip();
        let begun = clock::now();
        target.connect()?;
        let mut appeared = None;
        let mut named = String::new();
        let deadline = begun + LIMIT;
        while let Ok((at, change)) = watch.changes().recv_deadline(deadline) {
            let Change::Link(link) = change else { continue };
            if !link.name.starts_with("proxy.") || (!named.is_empty() && link.name != named) {
                continue;
            }
            named.clone_from(&link.name);
            let since = *appeared.get_or_insert(at);
            if link.master.is_some() {
                times.push(at - since);
                break;
            }
        }
        target.disconnect()?;
    }
    if times.len() < TARGETS {
        return Err(late("port"));
    }
    report.add_times("a target's interface appears, to its port", &times, &AIMS);
    Ok(())
}
