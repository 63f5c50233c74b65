//! The worker against the model kernel, under any sequence of facts, foreign
//! changes, lost events and restarts.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv6Addr};
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use proptest::prelude::*;

use super::NetMsg;
use super::fake::{Fake, State};
use super::worker::Net;
use crate::core::dataplane::Dataplane;
use crate::core::event::Event;
use crate::core::family::{Family, IpFamilies, PerFamily};
use crate::core::ids::{EndpointName, IfName, PortKey, SegmentId};
use crate::core::observed::{RouteKind, Rule, RuleAction};
use crate::core::op::{BRIDGE, route_metric};
use crate::sync::clock;

const NAMES: [&str; 6] = ["if0", "if1", "if2", "if3", "lo", BRIDGE];
/// The last two are never next hops; the two before depend on the bridge's
/// address.
const PEERS: [&str; 9] = [
    "172.16.0.5",
    "172.16.0.6",
    "fd00::5",
    "fd00::6",
    "fd00::7",
    "172.16.0.255",
    "172.16.0.1",
    "10.0.0.1",
    "fd99::1",
];
/// The last three get no rule.
const VIPS: [&str; 8] = [
    "20.0.0.1/32",
    "20.0.0.2/32",
    "20.0.1.0/24",
    "fd20::1/128",
    "fd20::/64",
    "172.16.0.0/16",
    "fd00::/8",
    "0.0.0.0/0",
];
/// Of the bridge's hardware address.
const LINK_LOCAL: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0xff, 0xfe00, 1));
const PREFIXES: [(&str, &str); 4] = [
    ("172.16.0.1/24", "fd00::1/64"),
    ("172.16.0.1/24", "fd00::1/64"),
    ("172.16.0.2/24", "fd00::2/64"),
    ("172.16.0.1/20", "fd00::1/60"),
];

#[derive(Debug, Clone)]
enum Step {
    Expect(usize, usize, Vec<usize>),
    Down(usize),
    Release(usize),
    Vips(Vec<usize>),
    Prefixes(usize),
    /// Foreign changes; the flag says whether their events arrive.
    Foreign(Foreign, bool),
    Restart,
}

#[derive(Debug, Clone)]
enum Foreign {
    AddLink(usize),
    DeleteLink(usize),
    Carrier(usize, bool),
    Detach(usize),
    BridgeDown,
    DeleteBridge,
    DeleteRule(usize),
    AddRule(usize, bool),
    DeleteRoute(bool),
    DeleteAddress(usize),
    /// Somebody on the link has it, too.
    Duplicate(usize),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let subset = |n: usize| proptest::collection::vec(0..n, 0..4);
    let step = prop_oneof![
        6 => (0..6usize, 0..NAMES.len(), subset(PEERS.len()))
            .prop_map(|(key, name, peers)| Step::Expect(key, name, peers)),
        2 => (0..6usize).prop_map(Step::Down),
        2 => (0..6usize).prop_map(Step::Release),
        3 => subset(VIPS.len()).prop_map(Step::Vips),
        2 => (0..PREFIXES.len()).prop_map(Step::Prefixes),
        8 => (foreign(), proptest::bool::weighted(0.8))
            .prop_map(|(change, told)| Step::Foreign(change, told)),
        1 => Just(Step::Restart),
    ];
    proptest::collection::vec(step, 1..60)
}

fn foreign() -> impl Strategy<Value = Foreign> {
    prop_oneof![
        6 => (0..4usize).prop_map(Foreign::AddLink),
        2 => (0..4usize).prop_map(Foreign::DeleteLink),
        2 => (0..4usize, any::<bool>()).prop_map(|(n, on)| Foreign::Carrier(n, on)),
        1 => (0..4usize).prop_map(Foreign::Detach),
        1 => Just(Foreign::BridgeDown),
        1 => Just(Foreign::DeleteBridge),
        1 => (0..5usize).prop_map(Foreign::DeleteRule),
        2 => (0..5usize, any::<bool>()).prop_map(|(n, ours)| Foreign::AddRule(n, ours)),
        1 => any::<bool>().prop_map(Foreign::DeleteRoute),
        1 => (0..4usize).prop_map(Foreign::DeleteAddress),
        2 => (0..4usize).prop_map(Foreign::Duplicate),
    ]
}

fn key(n: usize) -> PortKey {
    if n < 4 {
        PortKey::Lb(EndpointName::new(format!("lb{n}")))
    } else {
        PortKey::Target(SegmentId::new(format!("target{n}")))
    }
}

/// The test's own record of what was told.
#[derive(Debug, Default, Clone)]
struct Told {
    ports: BTreeMap<usize, (usize, BTreeSet<IpAddr>, bool)>,
    /// Who was told before whom.
    order: Vec<usize>,
    vips: Option<BTreeSet<IpNetwork>>,
    prefixes: PerFamily<Option<IpNetwork>>,
}

struct Run {
    kernel: Fake,
    net: Net<Fake>,
    told: Told,
    /// Events were lost since the state was last read.
    lost: bool,
    now: Instant,
}

fn new_net(kernel: &Fake, now: Instant) -> Net<Fake> {
    use super::Rtnl;
    let observed = kernel.clone().snapshot().unwrap();
    let dataplane = Dataplane::new(IpFamilies::Dual, [2, 0, 0, 0, 0, 1]);
    Net::new(
        kernel.clone(),
        dataplane,
        observed,
        Box::new(|_, _| ()),
        now,
    )
}

impl Run {
    fn new() -> Self {
        let kernel = Fake::default();
        kernel.with(|state| {
            let lo = state.add_link("lo");
            drop(lo);
        });
        let now = clock::now();
        Self {
            net: new_net(&kernel, now),
            kernel,
            told: Told::default(),
            lost: false,
            now,
        }
    }

    fn take(&mut self, message: NetMsg) {
        self.net.take(message, &mut Vec::new(), self.now);
    }

    fn step(&mut self, step: &Step) {
        match step {
            Step::Expect(n, name, peers) => {
                let peers: BTreeSet<IpAddr> =
                    peers.iter().map(|n| PEERS[*n].parse().unwrap()).collect();
                let port = (*name, peers.clone(), false);
                if self.told.ports.insert(*n, port).is_none() {
                    self.told.order.push(*n);
                }
                self.take(NetMsg::Fact(Event::PortExpected {
                    key: key(*n),
                    ifname: IfName::parse(NAMES[*name]).unwrap(),
                    peers,
                }));
            }
            Step::Down(n) => {
                if let Some(port) = self.told.ports.get_mut(n) {
                    port.2 = true;
                }
                self.take(NetMsg::Fact(Event::PeerDown { key: key(*n) }));
            }
            Step::Release(n) => {
                self.told.ports.remove(n);
                self.told.order.retain(|told| told != n);
                self.take(NetMsg::Fact(Event::PortReleased { key: key(*n) }));
            }
            Step::Vips(list) => {
                let vips: BTreeSet<IpNetwork> =
                    list.iter().map(|n| VIPS[*n].parse().unwrap()).collect();
                self.told.vips = Some(vips.clone());
                self.take(NetMsg::Fact(Event::Vips(vips)));
            }
            Step::Prefixes(n) => {
                self.told.prefixes = PerFamily {
                    v4: Some(PREFIXES[*n].0.parse().unwrap()),
                    v6: Some(PREFIXES[*n].1.parse().unwrap()),
                };
                self.take(NetMsg::Fact(Event::BridgePrefixes(self.told.prefixes)));
            }
            Step::Foreign(change, told) => {
                let fact = self.kernel.with(|state| make(state, change));
                if !*told {
                    self.lost = true;
                    return;
                }
                self.take(fact.unwrap_or(NetMsg::Foreign));
            }
            Step::Restart => self.restart(),
        }
    }

    /// What carries traffic is the same after the first turn of a new process.
    fn restart(&mut self) {
        let traffic = |state: &State| {
            let routes = PerFamily::from_fn(|family| {
                state.routes.get(family).get(&route_metric(family)).cloned()
            });
            let masters: Vec<_> = state
                .links
                .values()
                .map(|link| (link.index, link.master))
                .collect();
            // A bridge gets a link-local address that has none.
            let mut addresses = state.addresses.clone();
            addresses.retain(|(_, address)| !address.contains(LINK_LOCAL));
            (routes, masters, state.rules.clone(), addresses)
        };
        let before = self.kernel.with(|state| traffic(state));
        let had_bridge = self.kernel.with(|state| state.named(BRIDGE).is_some());
        self.net = new_net(&self.kernel, self.now);
        self.told = Told::default();
        self.lost = false;
        self.net.turn(self.now);
        if had_bridge {
            assert_eq!(before, self.kernel.with(|state| traffic(state)));
        }
    }

    /// One turn reaches a state in which nothing is left to do, and nothing
    /// was refused on the way unless the observation was stale. After the
    /// settling time nothing of a predecessor is left beside what was told.
    fn settle(&mut self) {
        if !self.lost {
            self.kernel.with(|state| state.refused.clear());
            let before = self.kernel.with(|state| state.routes.clone());
            self.net.turn(self.now);
            self.kernel
                .with(|state| self.told.check_settling(&before, state));
            self.now += Duration::from_secs(6);
            self.net.turn(self.now);
            self.at_rest();
            return;
        }
        // Without the events: whatever happens, the next full dump mends it.
        self.net.turn(self.now);
        self.take(NetMsg::Overrun);
        self.kernel.with(|state| state.refused.clear());
        self.net.turn(self.now);
        // What a predecessor left may settle from here only.
        self.now += Duration::from_secs(6);
        self.net.turn(self.now);
        self.lost = false;
        self.at_rest();
    }

    fn at_rest(&mut self) {
        let done = self.kernel.with(|state| {
            assert_eq!(state.refused, []);
            state.done.len()
        });
        self.net.turn(self.now);
        self.kernel.with(|state| {
            assert_eq!(state.done[done..], [], "left over after a turn");
            self.told.check(state);
        });
    }
}

/// A change by somebody else; the link fact it is told by, or none.
fn make(state: &mut State, change: &Foreign) -> Option<NetMsg> {
    let fact = match change {
        Foreign::AddLink(n) if state.named(NAMES[*n]).is_none() => Some(state.add_link(NAMES[*n])),
        Foreign::AddLink(_) => None,
        Foreign::DeleteLink(n) => state.delete_link(NAMES[*n]),
        Foreign::Carrier(n, on) => state.change_link(NAMES[*n], |link| link.carrier = *on),
        Foreign::Detach(n) => state.change_link(NAMES[*n], |link| link.master = None),
        Foreign::BridgeDown => state.bridge_down(),
        Foreign::DeleteBridge => state.delete_link(BRIDGE),
        Foreign::DeleteRule(n) => {
            let victim = state.rules.keys().nth(*n).copied();
            victim.map(|rule| state.rules.remove(&rule));
            None
        }
        Foreign::AddRule(n, ours) => {
            let rule = Rule {
                priority: if *ours { 19_000 } else { 32_000 },
                source: VIPS[*n].parse().unwrap(),
                protocol: if *ours { 77 } else { 0 },
                action: RuleAction::Lookup,
            };
            *state.rules.entry(rule).or_default() += 1;
            None
        }
        Foreign::DeleteRoute(v4) => {
            let family = if *v4 { Family::V4 } else { Family::V6 };
            state.routes.get_mut(family).clear();
            None
        }
        Foreign::DeleteAddress(n) => {
            if *n < state.addresses.len() {
                state.addresses.remove(*n);
            }
            None
        }
        Foreign::Duplicate(n) => {
            let address = state
                .addresses
                .get(*n)
                .filter(|(_, address)| address.is_ipv6());
            state.duplicates.extend(address);
            None
        }
    };
    fact.map(NetMsg::Link)
}

impl Told {
    /// What the kernel must look like, said in another way than the plan says
    /// it.
    fn check(&self, state: &State) {
        let bridge = state.named(BRIDGE).unwrap();
        assert!(bridge.up);
        let link_local = IpNetwork::new(LINK_LOCAL, 64).unwrap();
        for address in self.prefixes.values().chain([&link_local]) {
            let entry = (bridge.index, *address);
            assert!(state.addresses.contains(&entry) && !state.duplicates.contains(&entry));
        }
        if let Some(vips) = &self.vips {
            for vip in VIPS.map(|text| text.parse::<IpNetwork>().unwrap()) {
                let own = state
                    .addresses
                    .iter()
                    .any(|(_, own)| vip.contains(own.ip()))
                    || self.prefixes.values().any(|own| vip.contains(own.ip()));
                let wanted = vips.contains(&vip) && vip.prefix() > 0 && !own;
                let copies: u32 = state
                    .rules
                    .iter()
                    .filter(|(rule, _)| rule.source == vip)
                    .map(|(_, count)| *count)
                    .sum();
                assert_eq!(copies, u32::from(wanted), "rules for {vip}");
            }
        }
        for (name, _, _) in self.ports.values() {
            if *name < 4
                && let Some(link) = state.named(NAMES[*name])
            {
                assert_eq!(link.master, Some(bridge.index), "{}", link.name);
            }
        }
        for family in Family::ALL {
            self.check_routes(state, family);
        }
    }

    /// Beside the hops that were told there are no others than some of those
    /// that were there before.
    fn check_settling(&self, before: &PerFamily<BTreeMap<u32, RouteKind>>, state: &State) {
        for family in Family::ALL {
            let wanted = self.hops(state, family);
            let seen = hops_of(&state.routes, family);
            let before = hops_of(before, family);
            assert!(seen.difference(&wanted).all(|hop| before.contains(hop)));
        }
    }

    fn check_routes(&self, state: &State, family: Family) {
        assert!(state.routes.get(family).contains_key(&u32::MAX));
        let hops = self.hops(state, family);
        if !hops.is_empty() {
            assert_eq!(hops_of(&state.routes, family), hops);
        }
    }

    /// The hops that follow from what was told.
    fn hops(&self, state: &State, family: Family) -> BTreeSet<IpAddr> {
        let bad: BTreeSet<IpAddr> = PEERS[7..]
            .iter()
            .map(|text| text.parse().unwrap())
            .chain(self.prefixes.values().map(IpNetwork::ip))
            .chain(self.prefixes.v4.iter().map(IpNetwork::broadcast))
            .collect();
        let (mut names, mut addresses) = (BTreeSet::new(), BTreeSet::new());
        let (mut up, mut down) = (BTreeSet::new(), BTreeSet::new());
        for n in &self.order {
            let (name, peers, is_down) = &self.ports[n];
            let is_first = names.insert(name);
            let is_lb = *n < 4;
            let mut own: Vec<IpAddr> = peers.iter().copied().collect();
            own.retain(|peer| is_lb && addresses.insert(*peer));
            let carries = *name < 4 && state.named(NAMES[*name]).is_some_and(|link| link.carrier);
            if is_first && carries {
                own.retain(|peer| {
                    Family::from(*peer) == family
                        && self.prefixes.get(family).is_some()
                        && !bad.contains(peer)
                });
                if *is_down { &mut down } else { &mut up }.extend(own);
            }
        }
        // Where all are down, they count as up.
        if up.is_empty() { down } else { up }
    }
}

fn hops_of(routes: &PerFamily<BTreeMap<u32, RouteKind>>, family: Family) -> BTreeSet<IpAddr> {
    match routes.get(family).get(&route_metric(family)) {
        Some(RouteKind::Via(hops)) => hops.iter().map(|(address, _)| *address).collect(),
        _ => BTreeSet::new(),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_kernel_follows_the_facts(steps in steps()) {
        let mut run = Run::new();
        run.net.turn(run.now);
        for step in &steps {
            run.step(step);
            run.settle();
        }
    }

    /// After a restart in which nothing else changes, and all is told again
    /// within the settling time, in whatever order, no hop moves.
    #[test]
    fn a_restart_moves_nothing(
        lbs in prop::collection::vec(any::<[bool; 4]>(), 3),
        order in Just(vec![0, 1, 2, 5]).prop_shuffle(),
    ) {
        let mut run = Run::new();
        run.step(&Step::Prefixes(0));
        run.step(&Step::Foreign(Foreign::AddLink(3), true));
        let tell = |run: &mut Run, n: usize| {
            let Some([_, _, told, down]) = lbs.get(n) else {
                return run.step(&Step::Expect(n, 3, vec![]));
            };
            if *told {
                run.step(&Step::Expect(n, n, [vec![0, 2], vec![1, 3], vec![4]][n].clone()));
            }
            if *down {
                run.step(&Step::Down(n));
            }
        };
        for (n, [there, carrier, _, _]) in lbs.iter().enumerate() {
            if *there {
                run.step(&Step::Foreign(Foreign::AddLink(n), true));
            }
            run.step(&Step::Foreign(Foreign::Carrier(n, *carrier), true));
            tell(&mut run, n);
        }
        tell(&mut run, 5);
        run.settle();
        let routes = run.kernel.with(|state| state.routes.clone());
        run.restart();
        run.step(&Step::Prefixes(0));
        for n in order {
            tell(&mut run, n);
            run.net.turn(run.now);
            let now = run.kernel.with(|state| state.routes.clone());
            prop_assert_eq!(&now, &routes, "after {}", n);
            run.now += Duration::from_millis(500);
        }
        run.settle();
        prop_assert_eq!(&run.kernel.with(|state| state.routes.clone()), &routes);
    }
}
