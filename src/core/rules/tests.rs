//! Packets of kept VIPs, of VIPs that come or go, and of others, against a
//! model of the kernel's list of rules, after each single operation.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use proptest::prelude::*;

use super::*;

/// The kernel's list: by priority, and within one in the order of arrival
/// (net/core/fib_rules.c).
#[derive(Debug, Clone, Default)]
struct Model(Vec<Rule>);

impl Model {
    fn apply(&mut self, op: &KernelOp) {
        match op {
            KernelOp::AddRule {
                source,
                priority,
                action,
            } => {
                if let RuleAction::Goto(target) = action {
                    let there = |rule: &Rule| rule.priority == *target;
                    assert!(target > priority && self.0.iter().any(there), "{op}");
                }
                let rule = Rule {
                    priority: *priority,
                    source: *source,
                    protocol: PROTOCOL,
                    action: *action,
                };
                let at = self.0.partition_point(|other| other.priority <= *priority);
                self.0.insert(at, rule);
            }
            // `rule_find` does not compare what a goto leads to.
            KernelOp::DeleteRule(rule) => {
                let kind = std::mem::discriminant(&rule.action);
                let found = self.0.iter().position(|other| {
                    (other.priority, other.source, other.protocol)
                        == (rule.priority, rule.source, rule.protocol)
                        && std::mem::discriminant(&other.action) == kind
                });
                self.0.remove(found.expect("a deletion finds its rule"));
            }
            other => panic!("no operation on rules: {other}"),
        }
    }

    /// Whether a packet from `source` is looked up in our table, and how many
    /// rules it meets.
    fn walk(&self, source: IpAddr) -> (bool, usize) {
        let (mut at, mut met) = (0, 0);
        while let Some(rule) = self.0.get(at) {
            met += 1;
            at += 1;
            if !rule.source.contains(source) {
                continue;
            }
            match rule.action {
                RuleAction::Lookup => return (true, met),
                RuleAction::Goto(target) => {
                    // One without its target is passed over.
                    let there = |rule: &Rule| rule.priority == target;
                    at = self.0.iter().position(there).unwrap_or(at);
                }
                RuleAction::Nop | RuleAction::Other => {}
            }
        }
        (false, met)
    }

    fn observed(&self) -> Observed {
        let mut rules: BTreeMap<Rule, u32> = BTreeMap::new();
        for rule in &self.0 {
            *rules.entry(*rule).or_default() += 1;
        }
        let mut observed = Observed::default();
        observed.rules = rules;
        observed
    }

    fn diff(&self, vips: &BTreeSet<IpNetwork>) -> Vec<KernelOp> {
        let mut ops = Vec::new();
        diff(&self.observed(), vips, &mut ops);
        ops
    }

    /// Brings it to `vips`, checking all of `packets` after each operation.
    /// How many operations it took.
    fn change(
        &mut self,
        before: &BTreeSet<IpNetwork>,
        vips: &BTreeSet<IpNetwork>,
        packets: &[IpAddr],
    ) -> usize {
        let within =
            |set: &BTreeSet<IpNetwork>, packet: IpAddr| set.iter().any(|vip| vip.contains(packet));
        let expected: Vec<(IpAddr, bool)> = packets
            .iter()
            .filter(|packet| within(before, **packet) == within(vips, **packet))
            .map(|packet| (*packet, within(vips, *packet)))
            .collect();
        let mut done = 0;
        // A list may have to make room for a tree.
        for _ in 0..3 {
            let ops = self.diff(vips);
            if ops.is_empty() {
                break;
            }
            done += ops.len();
            for (n, op) in ops.iter().enumerate() {
                self.makes_a_node_of_its_own(op);
                self.apply(op);
                for (packet, ours) in &expected {
                    assert_eq!(
                        self.walk(*packet).0,
                        *ours,
                        "{packet} after {n} {op}: {self:?}"
                    );
                }
            }
        }
        assert_eq!(self.diff(vips), [], "not at rest");
        for packet in packets {
            assert_eq!(
                self.walk(*packet).0,
                within(vips, *packet),
                "{packet} at rest"
            );
        }
        done
    }

    /// A new node comes where no rule is, of whatever node: a packet that is led
    /// to one would meet the other's.
    fn makes_a_node_of_its_own(&self, op: &KernelOp) {
        if let KernelOp::AddRule {
            priority,
            action: RuleAction::Goto(rule_tree::END),
            ..
        } = op
        {
            let slot = priority - 1..=*priority;
            assert!(
                !self.0.iter().any(|rule| slot.contains(&rule.priority)),
                "{op}"
            );
        }
    }

    fn is_tree(&self) -> bool {
        self.0.iter().any(|rule| rule.action == RuleAction::Nop)
    }
}

/// From a small space, so that VIPs nest, touch and repeat, or from a wide one.
fn vip(v6: bool) -> impl Strategy<Value = IpNetwork> {
    let lengths = prop_oneof![6 => Just(0u8), 1 => 1..12u8, 1 => 12..24u8];
    (
        any::<u32>(),
        prop_oneof![Just(0x3f), Just(0xff07), Just(u32::MAX)],
        lengths,
    )
        .prop_map(move |(bits, mask, shorter)| {
            let bits = bits & mask;
            let (ip, most): (IpAddr, u8) = if v6 {
                let high = 0xfd20u128 << 112 | u128::from(bits >> 16) << 64;
                (
                    Ipv6Addr::from_bits(high | u128::from(bits & 0xffff)).into(),
                    128,
                )
            } else {
                (Ipv4Addr::from_bits(bits ^ 0x1400_0000).into(), 32)
            };
            let long = IpNetwork::new(ip, most - shorter).unwrap();
            IpNetwork::new(long.network(), most - shorter).unwrap()
        })
}

fn set(v6: bool, most: usize) -> impl Strategy<Value = BTreeSet<IpNetwork>> {
    proptest::collection::btree_set(vip(v6), 0..most)
}

/// The ends of each VIP, and their neighbours outside.
fn packets<'a>(sets: impl IntoIterator<Item = &'a BTreeSet<IpNetwork>>) -> Vec<IpAddr> {
    let step = |ip: IpAddr, by: i8| match ip {
        IpAddr::V4(v4) => Ipv4Addr::from_bits(v4.to_bits().wrapping_add_signed(by.into())).into(),
        IpAddr::V6(v6) => Ipv6Addr::from_bits(v6.to_bits().wrapping_add_signed(by.into())).into(),
    };
    let mut packets: Vec<IpAddr> = sets
        .into_iter()
        .flatten()
        .flat_map(|vip| {
            let (first, last) = (vip.network(), vip.broadcast());
            [first, last, step(first, -1), step(last, 1)]
        })
        .collect();
    packets.sort_unstable();
    packets.dedup();
    packets
}

fn hosts(range: std::ops::Range<u32>, v6: bool) -> BTreeSet<IpNetwork> {
    let host = |n: u32| -> IpAddr {
        if v6 {
            Ipv6Addr::from_bits(0xfd20u128 << 112 | u128::from(n)).into()
        } else {
            Ipv4Addr::from_bits(0x1400_0000 + n).into()
        }
    };
    range.map(|n| host(n).into()).collect()
}

fn stray(priority: u32, source: &str, protocol: u8, action: RuleAction) -> Rule {
    Rule {
        priority,
        source: source.parse().unwrap(),
        protocol,
        action,
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, failure_persistence: None, ..ProptestConfig::default() })]

    /// Any sets one after the other, small and large.
    #[test]
    fn no_packet_is_misled_on_the_way(
        (v6, sets) in any::<bool>().prop_flat_map(|v6| {
            let any_size = prop_oneof![set(v6, 10), set(v6, 40)];
            (Just(v6), proptest::collection::vec(any_size, 1..6))
        }),
        strays in proptest::collection::vec(
            (any::<prop::sample::Index>(), 0..4usize, 20_000..31_100u32), 0..4
        ),
    ) {
        let mut model = Model::default();
        let mut before = BTreeSet::new();
        let packets = packets(&sets);
        for vips in &sets {
            model.change(&before, vips, &packets);
            let _ = v6;
            before = vips.clone();
        }
        // Whatever is broken is mended in the end.
        for (which, what, priority) in strays {
            if model.0.is_empty() {
                break;
            }
            let at = which.index(model.0.len());
            let rule = model.0[at];
            match what {
                0 => drop(model.0.remove(at)),
                1 => model.0.insert(at, rule),
                2 => {
                    let moved = Rule { priority, ..rule };
                    let at = model.0.partition_point(|other| other.priority <= priority);
                    model.0.insert(at, moved);
                }
                _ => {
                    let lookup = Rule { protocol: 3, action: RuleAction::Lookup, ..rule };
                    model.0.insert(at, lookup);
                }
            }
        }
        for _ in 0..8 {
            for op in model.diff(&before) {
                model.apply(&op);
            }
        }
        prop_assert_eq!(model.diff(&before), []);
        for packet in packets {
            let ours = before.iter().any(|vip| vip.contains(packet));
            prop_assert_eq!(model.walk(packet).0, ours, "{}", packet);
        }
    }

    /// One VIP more or less is few operations.
    #[test]
    fn one_vip_costs_little(vips in set(false, 300), one in vip(false)) {
        let mut model = Model::default();
        let mut more = vips.clone();
        more.insert(one);
        let packets: Vec<IpAddr> = packets([&vips]).into_iter().take(40).collect();
        model.change(&BTreeSet::new(), &vips, &packets);
        // One that covers others takes theirs away, too.
        let covered = vips.iter().filter(|vip| one.contains(vip.ip())).count();
        if model.is_tree() && covered == 0 {
            let added = model.change(&vips, &more, &packets);
            prop_assert!(added <= 16, "{} to add {}", added, one);
            let taken = model.change(&more, &vips, &packets);
            prop_assert!(taken <= 16, "{} to take {}", taken, one);
        }
    }
}

#[test]
fn the_form_changes_at_nine_and_at_five() {
    for v6 in [false, true] {
        let mut model = Model::default();
        let mut before = BTreeSet::new();
        for (n, tree) in [
            (8, false),
            (9, true),
            (8, true),
            (6, true),
            (5, false),
            (6, false),
            (8, false),
            (40, true),
            (0, false),
        ] {
            let vips = hosts(0..n, v6);
            model.change(&before, &vips, &packets([&hosts(0..45, v6)]));
            assert_eq!(model.is_tree(), tree, "{n} VIPs");
            before = vips;
        }
        assert_eq!(model.0, []);
    }
}

#[test]
fn many_vips_meet_few_rules() {
    for (n, most, limit) in [(100, 20, 180), (1_000, 28, 1_700), (10_000, 36, 18_000)] {
        for v6 in [false, true] {
            let mut model = Model::default();
            let vips = hosts(0..n, v6);
            model.0 = rule_tree::rules(&vips, if v6 { Family::V6 } else { Family::V4 }, &[])
                .unwrap()
                .into_iter()
                .collect();
            assert!(
                model.0.len() < limit,
                "{} rules for {n} VIPs",
                model.0.len()
            );
            let met = vips.iter().step_by(97).map(|vip| model.walk(vip.ip()));
            let met: Vec<(bool, usize)> = met.collect();
            assert!(
                met.iter().all(|(ours, met)| *ours && *met <= most),
                "{met:?}"
            );
            assert_eq!(model.diff(&vips), []);
        }
    }
}

#[test]
fn more_nodes_than_slots_become_larger_nodes() {
    // Spread so that each is far from the others.
    let vips: BTreeSet<IpNetwork> = (0..16_000u32)
        .map(|n| Ipv4Addr::from_bits(n.wrapping_mul(2_654_435_761) | 1 << 31))
        .map(|ip| IpAddr::from(ip).into())
        .collect();
    let rules = rule_tree::rules(&vips, Family::V4, &[]).unwrap();
    let model = Model(rules.into_iter().collect());
    for vip in vips.iter().step_by(501) {
        let (ours, met) = model.walk(vip.ip());
        assert!(ours && met < 60, "{met}");
    }
    assert!(!model.walk("20.0.0.1".parse().unwrap()).0);
}

#[test]
fn a_predecessor_s_rules_are_replaced_without_a_gap() {
    let vips = hosts(0..30, false);
    let packets = packets([&hosts(0..40, false)]);
    // Meridio's: without a priority and protocol; so many that they reach down
    // between the nodes; of another version of ours, a long list; a tree.
    for (from, protocol) in [(32_765, 0), (31_010, 0), (20_000, PROTOCOL)] {
        let mut model = Model::default();
        for (vip, priority) in vips.iter().zip((0..=from).rev()) {
            let source = vip.to_string();
            model
                .0
                .insert(0, stray(priority, &source, protocol, RuleAction::Lookup));
        }
        model.change(&vips, &vips, &packets);
        assert!(model.is_tree());
    }
}

#[test]
fn others_rules_behind_a_tree_are_reached_and_stay() {
    let vips = hosts(0..30, false);
    let mut model = Model::default();
    model.change(&BTreeSet::new(), &vips, &[]);
    let theirs = stray(31_500, "20.0.9.0/24", 3, RuleAction::Lookup);
    model.0.push(theirs);
    assert!(model.walk("20.0.9.1".parse().unwrap()).0, "not reached");
}
