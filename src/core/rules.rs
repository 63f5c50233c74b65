//! The rules that send what comes from VIPs to our table: a list of one for
//! each, or, where they are many, a tree.
//!
//! What is missing is added by falling priority, then what is too much is
//! deleted by rising priority. A packet meets rules by rising priority, and a
//! tree's nodes lead to nodes of higher ones: whatever it meets on its way is
//! whole, so that no packet of a kept VIP is misled at any moment, and none of
//! another address either.

use std::cmp::Reverse;
use std::collections::BTreeSet;

use ipnetwork::IpNetwork;

use super::family::Family;
use super::observed::{Observed, Rule, RuleAction};
use super::op::{KernelOp, PROTOCOL};
use super::rule_tree;

/// Priority of the first rule of a list; those that follow get falling numbers,
/// which the kernel inserts at the head of its list without a walk. Far above
/// the numbers that the kernel gives to rules without one, which are just below
/// the main table's 32766.
pub const FIRST_PRIORITY: u32 = 20_000;
/// The smallest priority that a rule gets; all further ones share it.
pub const LAST_PRIORITY: u32 = 1_000;

/// A list holds at most so many VIPs of a family: there the costs of both forms
/// are the same.
const LIST_MOST: usize = 8;
/// A tree with so many or fewer becomes a list again. Apart from the other
/// limit, so that a VIP that comes and goes does not change the form each time.
const TREE_LEAST: usize = 5;

/// The operations on rules, in the order in which they must be done.
pub(super) fn diff(observed: &Observed, vips: &BTreeSet<IpNetwork>, ops: &mut Vec<KernelOp>) {
    let mut surplus: Vec<Rule> = Vec::new();
    for family in Family::ALL {
        let of_family = |rule: &&Rule| rule.family() == family;
        let seen: Vec<Rule> = observed.rules.keys().filter(of_family).copied().collect();
        let vips: BTreeSet<IpNetwork> = vips
            .iter()
            .filter(|vip| Family::from(**vip) == family)
            .copied()
            .collect();
        let tree = wants_tree(vips.len(), &seen)
            .then(|| rule_tree::rules(&vips, family, &seen))
            .flatten();
        // Where the slots do not suffice the list makes room for a new tree.
        let wanted = tree.unwrap_or_else(|| list(&vips, &seen));
        let mut missing: Vec<&Rule> = wanted
            .iter()
            .filter(|rule| !observed.rules.contains_key(rule))
            .collect();
        missing.sort_by_key(|rule| Reverse(rule.priority));
        ops.extend(missing.into_iter().map(|rule| KernelOp::AddRule {
            source: rule.source,
            priority: rule.priority,
            action: rule.action,
        }));
        for rule in seen {
            let count = observed.rules.get(&rule).copied().unwrap_or_default();
            let copies = count.saturating_sub(u32::from(wanted.contains(&rule)));
            surplus.extend((0..copies).map(|_| rule));
        }
    }
    surplus.sort_unstable();
    ops.extend(surplus.into_iter().map(KernelOp::DeleteRule));
}

/// Whether so many VIPs of a family shall be a tree, given what is there.
fn wants_tree(vips: usize, seen: &[Rule]) -> bool {
    let is_tree = seen.iter().any(|rule| {
        rule.priority == rule_tree::END
            && rule.protocol == PROTOCOL
            && rule.action == RuleAction::Nop
    });
    if is_tree {
        return vips > TREE_LEAST;
    }
    // A half-made tree would lead past a predecessor's rules that are between
    // its nodes; a list first takes them away.
    let between = |rule: &Rule| {
        is_in_tree(rule.priority) && rule.action == RuleAction::Lookup && rule.protocol != PROTOCOL
    };
    vips > LIST_MOST && !seen.iter().any(between)
}

fn is_in_tree(priority: u32) -> bool {
    (rule_tree::ROOT..=rule_tree::END).contains(&priority)
}

/// One rule for each VIP; what is there stays where it is.
fn list(vips: &BTreeSet<IpNetwork>, seen: &[Rule]) -> BTreeSet<Rule> {
    let mut wanted: BTreeSet<Rule> = BTreeSet::new();
    let mut kept: BTreeSet<IpNetwork> = BTreeSet::new();
    // Ours first: of several copies, a predecessor's without our protocol id
    // goes.
    let (ours, others): (Vec<&Rule>, Vec<&Rule>) =
        seen.iter().partition(|rule| rule.protocol == PROTOCOL);
    for rule in ours.into_iter().chain(others) {
        if rule.action == RuleAction::Lookup
            && !is_in_tree(rule.priority)
            && vips.contains(&rule.source)
            && kept.insert(rule.source)
        {
            wanted.insert(*rule);
        }
    }
    let used: BTreeSet<u32> = seen.iter().map(|rule| rule.priority).collect();
    let mut free = (LAST_PRIORITY..=FIRST_PRIORITY)
        .rev()
        .filter(|priority| !used.contains(priority));
    for vip in vips.iter().filter(|vip| !kept.contains(vip)) {
        wanted.insert(Rule {
            priority: free.next().unwrap_or(LAST_PRIORITY),
            source: *vip,
            protocol: PROTOCOL,
            action: RuleAction::Lookup,
        });
    }
    wanted
}

#[cfg(test)]
mod tests;
