//! The worker in virtual time: what fails, what is tried again and when.

use std::sync::Arc;
use std::time::{Duration, Instant};

use crossbeam_channel::bounded;
use parking_lot::Mutex;

use super::fake::Fake;
use super::worker::{Net, run};
use super::{NetMsg, Rtnl};
use crate::core::dataplane::Dataplane;
use crate::core::event::Event;
use crate::core::family::{Family, IpFamilies, PerFamily};
use crate::core::ids::{EndpointName, IfName, PortKey, SegmentId};
use crate::core::observed::{Link, LinkFact, RouteKind};
use crate::core::op::{BRIDGE, KernelOp};
use crate::sync::clock;
use crate::sync::thread::{STACK_SMALL, Threads};

struct World {
    kernel: Fake,
    net: Net<Fake>,
    egress: Arc<Mutex<Vec<(bool, String)>>>,
    now: Instant,
}

impl World {
    /// At rest, with a bridge and its address.
    fn new() -> Self {
        let kernel = Fake::default();
        let observed = kernel.clone().snapshot().unwrap();
        let egress = Arc::new(Mutex::new(Vec::new()));
        let told = Arc::clone(&egress);
        let now = clock::now();
        let sink = Box::new(move |up, why: &str| told.lock().push((up, why.to_owned())));
        let dataplane = Dataplane::new(IpFamilies::V4, [2, 0, 0, 0, 0, 1]);
        let net = Net::new(kernel.clone(), dataplane, observed, sink, now);
        let mut world = Self {
            kernel,
            net,
            egress,
            now,
        };
        world.fact(Event::BridgePrefixes(PerFamily {
            v4: Some("172.16.0.1/24".parse().unwrap()),
            v6: None,
        }));
        world.announced();
        world
    }

    /// Until the addresses on the bridge have been announced.
    fn announced(&mut self) {
        while self.net.next_deadline() < self.now + FULL / 2 {
            self.tick();
        }
    }

    fn take(&mut self, message: NetMsg) {
        self.net.take(message, &mut Vec::new(), self.now);
    }

    fn fact(&mut self, event: Event) {
        self.take(NetMsg::Fact(event));
        self.net.turn(self.now);
    }

    fn link(&mut self, name: &str) {
        let fact = self.kernel.with(|state| state.add_link(name));
        self.take(NetMsg::Link(fact));
        self.net.turn(self.now);
    }

    fn lb(&mut self, id: &str, ifname: &str, peer: &str) {
        self.fact(Event::PortExpected {
            key: PortKey::Lb(EndpointName::new(id)),
            ifname: IfName::parse(ifname).unwrap(),
            peers: [peer.parse().unwrap()].into(),
        });
    }

    /// Goes on to the next deadline and returns how far away it was.
    fn tick(&mut self) -> Duration {
        let at = self.net.next_deadline();
        let waited = at.saturating_duration_since(self.now);
        self.now = at;
        self.net.turn(self.now);
        waited
    }

    fn hops(&self) -> usize {
        self.kernel.with(|state| match state.routes.v4.get(&0) {
            Some(RouteKind::Via(hops)) => hops.len(),
            _ => 0,
        })
    }

    fn snapshots(&self) -> usize {
        self.kernel.with(|state| state.snapshots)
    }
}

const FULL: Duration = Duration::from_secs(60);

#[test]
fn a_refused_port_takes_no_traffic_and_is_tried_again() {
    let mut world = World::new();
    world.link("if1");
    world.link("if2");
    world.lb("a", "if1", "172.16.0.5");
    world.kernel.with(|state| {
        state.fault = Some((|op| matches!(op, KernelOp::Attach { .. }), libc::EBUSY));
    });
    world.lb("b", "if2", "172.16.0.6");
    assert_eq!(world.hops(), 1);
    // Once in a turn, not in each of its rounds.
    assert_eq!(world.kernel.with(|state| state.refused.len()), 1);
    let waits: Vec<u128> = (0..7).map(|_| world.tick().as_millis()).collect();
    assert_eq!(waits, [200, 400, 800, 1600, 3200, 5000, 5000]);
    assert_eq!(world.kernel.with(|state| state.refused.len()), 8);
    world.kernel.with(|state| state.fault = None);
    world.tick();
    assert_eq!(world.hops(), 2);
    assert!(world.tick() > Duration::from_secs(50));
}

#[test]
fn one_refused_rule_does_not_hold_up_the_others() {
    let mut world = World::new();
    let bad = |op: &KernelOp| matches!(op, KernelOp::AddRule { source, .. } if source.to_string() == "20.0.0.2/32");
    world
        .kernel
        .with(|state| state.fault = Some((bad, libc::ENOMEM)));
    let vips = ["20.0.0.1/32", "20.0.0.2/32", "20.0.0.3/32"];
    world.fact(Event::Vips(vips.map(|vip| vip.parse().unwrap()).into()));
    assert_eq!(world.kernel.with(|state| state.rules.len()), 2);
    world.kernel.with(|state| state.fault = None);
    assert_eq!(world.tick(), Duration::from_millis(200));
    assert_eq!(world.kernel.with(|state| state.rules.len()), 3);
}

#[test]
fn a_kernel_that_cannot_be_read_is_asked_again() {
    let mut world = World::new();
    world.kernel.with(|state| {
        state.blind = true;
        state.rules.clear();
        let _ = state.delete_link(BRIDGE);
    });
    world.take(NetMsg::Overrun);
    world.net.turn(world.now);
    assert_eq!(world.tick(), Duration::from_millis(200));
    assert_eq!(world.tick(), Duration::from_millis(400));
    world.kernel.with(|state| state.blind = false);
    world.tick();
    assert!(world.kernel.with(|state| state.named(BRIDGE).is_some()));
    assert!(world.tick() > Duration::from_secs(50));
}

#[test]
fn the_state_is_read_anew_every_minute_and_otherwise_not() {
    let mut world = World::new();
    world.tick();
    let before = world.snapshots();
    assert_eq!(world.tick(), FULL);
    assert_eq!(world.snapshots(), before + 1);
    // What no event told of is mended by then.
    world
        .kernel
        .with(|state| state.routes.get_mut(Family::V4).clear());
    assert_eq!(world.tick(), FULL);
    assert_eq!(world.kernel.with(|state| state.routes.v4.len()), 1);
    // Links are told whole: no dump.
    let before = world.snapshots();
    world.link("if1");
    world.lb("a", "if1", "172.16.0.5");
    assert_eq!(world.snapshots(), before);
}

#[test]
fn no_plan_is_made_where_nothing_has_changed() {
    let mut world = World::new();
    world.link("if1");
    world.lb("a", "if1", "172.16.0.5");
    let link = (world.kernel).with(|state| state.named("if1").cloned().unwrap());
    let before = world.net.plans;
    // A dump that says the same, the echo of an operation, a turn for nothing.
    world.take(NetMsg::Foreign);
    world.tick();
    world.take(NetMsg::Link(LinkFact::Seen(link.clone())));
    world.net.turn(world.now);
    assert_eq!(world.tick(), FULL);
    assert_eq!(world.net.plans, before);
    // One that says something else does not wait for anything more.
    let down = LinkFact::Seen(Link {
        carrier: false,
        ..link
    });
    world.take(NetMsg::Link(down));
    world.net.turn(world.now);
    assert_eq!(world.hops(), 0);
    assert!(world.net.plans > before);
}

#[test]
fn a_foreign_change_is_mended_soon_and_a_fight_slowly() {
    let mut world = World::new();
    world.tick();
    let mut waits = Vec::new();
    for _ in 0..24 {
        world
            .kernel
            .with(|state| state.routes.get_mut(Family::V4).clear());
        world.take(NetMsg::Foreign);
        world.take(NetMsg::Foreign);
        waits.push(world.tick().as_millis());
        assert_eq!(world.kernel.with(|state| state.routes.v4.len()), 1);
    }
    assert!(waits[..17].iter().all(|wait| *wait == 50), "{waits:?}");
    assert_eq!(waits[17..], [100, 200, 400, 800, 1600, 3200, 5000]);
    // Peace: a change that needs no mending, long after.
    world.now += Duration::from_secs(11);
    world.take(NetMsg::Foreign);
    assert_eq!(world.tick(), Duration::from_millis(50));
}

#[test]
fn egress_follows_the_connected_lbs_only() {
    let mut world = World::new();
    world.lb("a", "if1", "172.16.0.5");
    world.lb("a", "if1", "172.16.0.5");
    let key = |id: &str| PortKey::Lb(EndpointName::new(id));
    world.fact(Event::PeerDown { key: key("a") });
    world.fact(Event::PeerDown { key: key("x") });
    world.lb("a", "if1", "172.16.0.5");
    world.fact(Event::PortReleased { key: key("a") });
    let told: Vec<bool> = world.egress.lock().iter().map(|(up, _)| *up).collect();
    assert_eq!(told, [true, false, true, false]);
    assert_eq!(world.egress.lock()[1].1, "no load balancer is connected");
}

#[test]
fn a_late_event_of_the_past_is_corrected_by_the_next() {
    let mut world = World::new();
    world.link("if1");
    world.lb("a", "if1", "172.16.0.5");
    let now = world
        .kernel
        .with(|state| state.named("if1").unwrap().clone());
    let mut before = now.clone();
    before.master = None;
    let done = world.kernel.with(|state| state.done.len());
    world.take(NetMsg::Link(LinkFact::Seen(before)));
    world.take(NetMsg::Link(LinkFact::Seen(now)));
    world.net.turn(world.now);
    assert_eq!(world.kernel.with(|state| state.done.len()), done);
    assert_eq!(world.hops(), 1);
}

/// A new process, after `change`.
fn restarted(world: &World, change: impl FnOnce(&mut super::fake::State)) -> World {
    world.kernel.with(change);
    let observed = world.kernel.clone().snapshot().unwrap();
    let mut dataplane = Dataplane::new(IpFamilies::V4, [2, 0, 0, 0, 0, 1]);
    dataplane.apply(Event::BridgePrefixes(PerFamily {
        v4: Some("172.16.0.1/24".parse().unwrap()),
        v6: None,
    }));
    let sink = Box::new(|_, _: &str| ());
    let mut world = World {
        net: Net::new(world.kernel.clone(), dataplane, observed, sink, world.now),
        kernel: world.kernel.clone(),
        egress: Arc::default(),
        now: world.now,
    };
    world.net.turn(world.now);
    world.announced();
    world
}

#[test]
fn a_predecessor_s_hops_wait_for_their_lbs_but_not_for_ever() {
    let mut world = World::new();
    for (id, ifname, peer) in [
        ("a", "if1", "172.16.0.5"),
        ("b", "if2", "172.16.0.6"),
        ("c", "if3", "172.16.0.7"),
    ] {
        world.link(ifname);
        world.lb(id, ifname, peer);
    }
    let mut world = restarted(&world, |_| ());
    world.lb("a", "if1", "172.16.0.5");
    assert_eq!(world.hops(), 3);
    world.now += Duration::from_secs(2);
    world.lb("b", "if2", "172.16.0.6");
    assert_eq!(world.tick(), Duration::from_secs(3));
    assert_eq!(world.hops(), 2);
    assert!(world.tick() > Duration::from_secs(50));

    // All are known: nothing is waited for. What does not answer goes.
    let mut world = restarted(&world, |_| ());
    world.lb("b", "if2", "172.16.0.6");
    world.lb("a", "if1", "172.16.0.5");
    assert!(world.tick() > Duration::from_secs(50));
    assert_eq!(world.hops(), 2);
    let mut world = restarted(&world, |state| {
        state.silent.insert("172.16.0.5".parse().unwrap());
    });
    world.lb("b", "if2", "172.16.0.6");
    assert_eq!(world.hops(), 1);
}

fn target(world: &mut World, id: &str, ifname: &str, peers: &[&str]) {
    world.fact(Event::PortExpected {
        key: PortKey::Target(SegmentId::new(id)),
        ifname: IfName::parse(ifname).unwrap(),
        peers: peers.iter().map(|peer| peer.parse().unwrap()).collect(),
    });
}

/// The sender's IP and hardware address of what was sent since the last call.
fn announcements(world: &World) -> Vec<(Vec<u8>, Vec<u8>)> {
    world.kernel.with(|state| {
        let sent = std::mem::take(&mut state.sent);
        let of = |frame: Vec<u8>| (frame[28..32].to_vec(), frame[22..28].to_vec());
        sent.into_iter().map(of).collect()
    })
}

fn answer(world: &World, address: &str, ifname: &str, mac: u8) {
    world.kernel.with(|state| {
        let port = state.named(ifname).unwrap().index;
        let answer = (port, [2, 0, 0, 0, 0, mac]);
        state.answers.insert(address.parse().unwrap(), answer);
    });
}

#[test]
fn a_target_s_address_is_announced_with_what_it_answered() {
    let mut world = World::new();
    let own = (vec![172, 16, 0, 1], vec![2, 0, 0, 0, 0, 1]);
    assert_eq!(announcements(&world), [own.clone(), own.clone(), own]);
    world.link("if1");
    target(&mut world, "t", "if1", &["172.16.0.9"]);
    answer(&world, "172.16.0.9", "if1", 9);
    world.announced();
    let told = (vec![172, 16, 0, 9], vec![2, 0, 0, 0, 0, 9]);
    assert_eq!(announcements(&world), vec![told.clone(); 3]);
    // A refresh is no news; a new interface of the same name is.
    target(&mut world, "t", "if1", &["172.16.0.9"]);
    world.announced();
    assert_eq!(announcements(&world), []);
    let gone = world.kernel.with(|state| state.delete_link("if1")).unwrap();
    world.take(NetMsg::Link(gone));
    world.net.turn(world.now);
    world.link("if1");
    answer(&world, "172.16.0.9", "if1", 10);
    world.announced();
    let told = (vec![172, 16, 0, 9], vec![2, 0, 0, 0, 0, 10]);
    assert_eq!(announcements(&world), vec![told; 3]);
}

#[test]
fn nothing_is_announced_for_who_has_no_lease_of_it() {
    let mut world = World::new();
    announcements(&world);
    for ifname in ["if1", "if2", "if3"] {
        world.link(ifname);
    }
    world.lb("lb", "if3", "172.16.0.5");
    target(&mut world, "a", "if1", &["172.16.0.9"]);
    // The bridge's own address, an LB's, what is no host's, what is outside.
    let others = ["172.16.0.1", "172.16.0.5", "172.16.0.255", "10.0.0.1"];
    target(&mut world, "b", "if2", &others);
    for address in others.into_iter().chain(["172.16.0.9"]) {
        answer(&world, address, "if2", 66);
    }
    world.announced();
    assert_eq!(announcements(&world), []);
    let asked = world.kernel.with(|state| {
        let asked = |op: &KernelOp| match op {
            KernelOp::AskNeighbour { address, .. } => Some(address.to_string()),
            _ => None,
        };
        state.done.iter().filter_map(asked).collect::<Vec<_>>()
    });
    assert_eq!(asked, ["172.16.0.9"; 7]);
}

#[test]
fn quiesce_is_answered_after_the_facts_before_it_are_applied() {
    let (to_net, messages) = bounded(8);
    let (result, done) = bounded(1);
    let mut handle = Threads::unsupervised()
        .spawn("net", STACK_SMALL, move |stop| {
            // The model kernel stays on one thread.
            let world = World::new();
            let kernel = world.kernel.clone();
            run(world.net, &messages, &stop);
            let _ = result.send(kernel.with(|state| state.rules.len()));
        })
        .unwrap();
    let vips = ["20.0.0.1/32".parse().unwrap()].into();
    to_net.send(NetMsg::Fact(Event::Vips(vips))).unwrap();
    let (ack, applied) = bounded(0);
    to_net.send(NetMsg::Quiesce(ack)).unwrap();
    let deadline = clock::now() + Duration::from_secs(5);
    assert_eq!(
        applied.recv_deadline(deadline),
        Err(crossbeam_channel::RecvTimeoutError::Disconnected)
    );
    handle.stop();
    assert_eq!(done.recv_deadline(deadline), Ok(1));
}
