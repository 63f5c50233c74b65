//! The rules of many VIPs of one family, as a tree.
//!
//! The kernel walks its list of rules for every packet, three times for one
//! that it forwards through a bridge, so that the time for a packet grows with
//! a rule for each VIP: sevenfold at a thousand. `goto` rules make a tree of the
//! list, and a packet meets a few rules for each level.
//!
//! A node has a priority, its *slot*. There it has a rule `lookup` for each of
//! its VIPs and a rule `goto` for each of its children, by the child's prefix;
//! at the next priority it has a `goto` to the end for what matched none of
//! them. The end is a rule that does nothing, behind all nodes: what no VIP
//! matches goes on to all rules behind it, as it would without a tree. Jumps go
//! forward only (net/core/fib_rules.c, `fib_nl_newrule`), so a child's slot is
//! above its parent's.
//!
//! Prefixes of nodes have an even length, and a node is where more than a few
//! VIPs part: the tree is the same however the VIPs came, and one more or less
//! changes one node, or adds or takes one. A node keeps the slot that the rules
//! in the kernel give it.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

use super::family::Family;
use super::observed::{Rule, RuleAction};
use super::op::PROTOCOL;

/// The slot of the root, behind all rules of the list form, which therefore
/// goes on working while a tree is made or taken away.
pub(super) const ROOT: u32 = 20_002;
/// Priority of the end. Before those that the kernel gives to rules without
/// one, just below the main table's 32766.
pub(super) const END: u32 = 31_000;
/// So many nodes the priorities between hold beside the root.
const CAPACITY: usize = ((END - ROOT) / 2 - 1) as usize;
/// So many VIPs are one node, not to be divided.
const UNDIVIDED: usize = 4;

/// A VIP or a node's prefix, its bits at the upper end.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Prefix {
    bits: u128,
    length: u8,
}

impl Prefix {
    fn of(network: IpNetwork) -> Self {
        let bits = match network.ip() {
            IpAddr::V4(v4) => u128::from(v4.to_bits()) << 96,
            IpAddr::V6(v6) => v6.to_bits(),
        };
        Self {
            bits,
            length: network.prefix(),
        }
    }

    fn network(self, family: Family) -> Option<IpNetwork> {
        let address = match family {
            Family::V4 => Ipv4Addr::from_bits(u32::try_from(self.bits >> 96).ok()?).into(),
            Family::V6 => Ipv6Addr::from_bits(self.bits).into(),
        };
        IpNetwork::new(address, self.length).ok()
    }

    fn covers(self, other: Self) -> bool {
        let common = (self.bits ^ other.bits).leading_zeros();
        self.length <= other.length && common >= u32::from(self.length)
    }

    /// The longest prefix of even length that covers both.
    fn common(self, other: Self) -> Self {
        let common = (self.bits ^ other.bits).leading_zeros();
        let length = common.min(self.length.min(other.length).into()) & !1;
        let mask = u128::MAX.checked_shl(128 - length).unwrap_or(0);
        Self {
            bits: self.bits & mask,
            length: u8::try_from(length).unwrap_or(0),
        }
    }
}

#[derive(Debug)]
struct Node {
    prefix: Prefix,
    parent: usize,
    children: Vec<usize>,
    vips: Vec<Prefix>,
}

/// The rules for `vips`, all of `family`, where the kernel has the rules `seen`
/// of it. `None` when the slots that are free do not suffice.
pub(super) fn rules(
    vips: &BTreeSet<IpNetwork>,
    family: Family,
    seen: &[Rule],
) -> Option<BTreeSet<Rule>> {
    let vips = disjoint(vips);
    let mut undivided = UNDIVIDED;
    let mut nodes = tree(&vips, undivided);
    while nodes.len() > CAPACITY {
        undivided *= 2;
        nodes = tree(&vips, undivided);
    }
    let slots = slots(&nodes, family, seen)?;
    let rule = |priority, source, action| Rule {
        priority,
        source,
        protocol: PROTOCOL,
        action,
    };
    let all = Prefix { bits: 0, length: 0 }.network(family)?;
    let mut rules = BTreeSet::from([rule(END, all, RuleAction::Nop)]);
    for (node, slot) in nodes.iter().zip(&slots) {
        for vip in &node.vips {
            rules.insert(rule(*slot, vip.network(family)?, RuleAction::Lookup));
        }
        for child in &node.children {
            let action = RuleAction::Goto(*slots.get(*child)?);
            let source = nodes.get(*child)?.prefix.network(family)?;
            rules.insert(rule(*slot, source, action));
        }
        rules.insert(rule(*slot + 1, all, RuleAction::Goto(END)));
    }
    Some(rules)
}

/// Without those that another covers, in order.
fn disjoint(vips: &BTreeSet<IpNetwork>) -> Vec<Prefix> {
    let mut sorted: Vec<Prefix> = vips.iter().copied().map(Prefix::of).collect();
    sorted.sort_unstable();
    let mut kept: Vec<Prefix> = Vec::with_capacity(sorted.len());
    for vip in sorted {
        if !kept.last().is_some_and(|last| last.covers(vip)) {
            kept.push(vip);
        }
    }
    kept
}

/// The nodes, each after its parent, the root first. The root has no prefix, so
/// that it is there whatever the VIPs are.
fn tree(vips: &[Prefix], undivided: usize) -> Vec<Node> {
    let node = |prefix, parent| Node {
        prefix,
        parent,
        children: Vec::new(),
        vips: Vec::new(),
    };
    let mut nodes = vec![node(Prefix { bits: 0, length: 0 }, 0)];
    let mut parts = vec![vips];
    let mut at = 0;
    while let Some(part) = parts.get(at).copied() {
        let prefix = nodes[at].prefix;
        if part.len() <= undivided {
            nodes[at].vips = part.to_vec();
        } else {
            // The two bits behind the prefix; no VIP of several ends before.
            let key = |vip: &Prefix| vip.bits >> 126u32.saturating_sub(prefix.length.into()) & 3;
            for group in part.chunk_by(|a, b| key(a) == key(b)) {
                match group {
                    [vip] => nodes[at].vips.push(*vip),
                    [first, .., last] => {
                        let child = nodes.len();
                        nodes[at].children.push(child);
                        nodes.push(node(first.common(*last), at));
                        parts.push(group);
                    }
                    [] => {}
                }
            }
        }
        at += 1;
    }
    nodes
}

/// A slot for each node. One that has a slot keeps it where it can; a new one
/// gets a slot in which there is nothing yet, so that old and new tree can be
/// in the kernel together.
fn slots(nodes: &[Node], family: Family, seen: &[Rule]) -> Option<Vec<u32>> {
    let is_slot = |slot: &u32| (ROOT + 2..END).contains(slot) && slot.is_multiple_of(2);
    let mut had: BTreeMap<Prefix, u32> = BTreeMap::new();
    for rule in seen.iter().filter(|rule| rule.protocol == PROTOCOL) {
        if let RuleAction::Goto(slot) = rule.action
            && is_slot(&slot)
        {
            had.entry(Prefix::of(rule.source)).or_insert(slot);
        }
    }
    let used: BTreeSet<u32> = seen.iter().map(|rule| rule.priority).collect();
    let mut free: BTreeSet<u32> = (ROOT + 2..END)
        .step_by(2)
        .filter(|slot| !used.contains(slot) && !used.contains(&(slot + 1)))
        .collect();
    let mut taken: BTreeSet<u32> = BTreeSet::new();
    let mut slots = vec![ROOT];
    for (n, node) in nodes.iter().enumerate().skip(1) {
        let above = *slots.get(node.parent)?;
        let kept = had
            .get(&node.prefix)
            .copied()
            .filter(|slot| *slot > above && !taken.contains(slot));
        let slot = match kept {
            Some(slot) => slot,
            None => {
                let below = node
                    .children
                    .iter()
                    .filter_map(|child| had.get(&nodes.get(*child)?.prefix).copied())
                    .filter(|slot| *slot > above)
                    .min()
                    .unwrap_or(END);
                // Spread out, so that there is room for others between.
                let share = u32::try_from(n * CAPACITY / nodes.len()).ok()?;
                let hint = (ROOT + 2 * share).clamp(above + 1, below);
                let slot = free
                    .range(hint..below)
                    .next()
                    .or_else(|| free.range(above + 1..hint).next_back())
                    // Then the children move, too.
                    .or_else(|| free.range(below..).next())
                    .copied()?;
                free.remove(&slot);
                slot
            }
        };
        debug_assert!(is_slot(&slot), "family {family}: slot {slot}");
        taken.insert(slot);
        slots.push(slot);
    }
    Some(slots)
}
