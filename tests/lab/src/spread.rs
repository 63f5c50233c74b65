//! Spreading flows over next hops, as load balancers do it over targets and
//! the router in front over load balancers: the hash of a flow's addresses and
//! ports names a bucket, a bucket belongs to a member, and a member's packets
//! are routed by a table of its own, with the destination as it is.
//!
//! Every spreader with the same members gives a bucket to the same one, so a
//! flow keeps its target when it comes through another load balancer; and a
//! member that joins or leaves moves its own buckets only (Meridio does the
//! same with Maglev tables in user space). Each change is one transaction.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::hash::{Hash, Hasher};
use std::io;

use crate::link::{Hop, Route, Rtnl, Rule, any};
use crate::netns::Netns;
use crate::nft;

/// Buckets; more make the shares more even.
const BUCKETS: u32 = 128;
/// The first member's mark, which is the number of its table, too.
const FIRST_MARK: u32 = 101;

/// Who gets a share of the flows.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Member {
    pub name: String,
    /// At most one of each family.
    pub hops: Vec<Hop>,
}

/// One namespace's spreader.
pub struct Spread {
    netns: Netns,
    rtnl: Rtnl,
    seed: u32,
    slots: BTreeMap<String, Slot>,
    /// Those that left last: packets on their way still carry their marks.
    retired: Vec<Slot>,
    stamp: Option<u8>,
}

struct Slot {
    mark: u32,
    hops: Vec<Hop>,
}

/// Packets that passed a spreader, per direction and family.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Passed {
    /// Towards the members.
    pub forwarded_v4: u64,
    pub forwarded_v6: u64,
    /// Back to where the flows come from.
    pub returned_v4: u64,
    pub returned_v6: u64,
}

impl Spread {
    /// Spreads the TCP and UDP packets that come in by `inbound`. Spreaders
    /// in a row need different seeds. A `stamp` is written into the DSCP field
    /// of the packets of both directions, so that the ends of a flow can tell
    /// which way it took.
    pub fn new(netns: &Netns, inbound: &str, seed: u32, stamp: Option<u8>) -> io::Result<Self> {
        let (v4, v6) = match stamp {
            Some(number) => (
                format!("ip dscp set {number}"),
                format!("ip6 dscp set {number}"),
            ),
            None => (String::new(), String::new()),
        };
        let ports = "meta l4proto { tcp, udp }";
        nft::apply(
            netns,
            &format!(
                "table inet lab {{
                    counter forwarded4 {{ }}
                    counter forwarded6 {{ }}
                    counter returned4 {{ }}
                    counter returned6 {{ }}
                    chain spread {{ }}
                    chain prerouting {{
                        type filter hook prerouting priority mangle; policy accept;
                        iifname \"{inbound}\" meta nfproto ipv4 {ports} counter name forwarded4 {v4} jump spread
                        iifname \"{inbound}\" meta nfproto ipv6 {ports} counter name forwarded6 {v6} jump spread
                    }}
                    chain forward {{
                        type filter hook forward priority filter; policy accept;
                        oifname \"{inbound}\" meta nfproto ipv4 {ports} counter name returned4 {v4}
                        oifname \"{inbound}\" meta nfproto ipv6 {ports} counter name returned6 {v6}
                    }}
                }}"
            ),
        )?;
        let spread = Self {
            netns: netns.clone(),
            rtnl: Rtnl::open(netns)?,
            seed,
            slots: BTreeMap::new(),
            retired: Vec::new(),
            stamp,
        };
        nft::apply(netns, &spread.buckets())?;
        Ok(spread)
    }

    /// The DSCP value that packets get.
    #[must_use]
    pub fn stamp(&self) -> Option<u8> {
        self.stamp
    }

    /// The members now.
    #[must_use]
    pub fn members(&self) -> Vec<String> {
        self.slots.keys().cloned().collect()
    }

    /// Replaces the members: routes first, then the buckets at once. The routes
    /// of those that left stay until the next change.
    pub fn set(&mut self, members: &[Member]) -> io::Result<()> {
        for slot in std::mem::take(&mut self.retired) {
            self.unroute(&slot)?;
        }
        let before = self.members();
        for member in members {
            self.route(member)?;
        }
        let leaving: Vec<String> = (self.slots.keys())
            .filter(|name| !members.iter().any(|member| &member.name == *name))
            .cloned()
            .collect();
        let gone = leaving.iter().filter_map(|name| self.slots.remove(name));
        self.retired = gone.collect();
        if self.members() != before {
            nft::apply(&self.netns, &self.buckets())?;
        }
        Ok(())
    }

    fn unroute(&self, slot: &Slot) -> io::Result<()> {
        for like in FAMILIES {
            self.rtnl.delete_rule(&slot.rule(), like)?;
            self.rtnl.delete_route(&slot.fallback(like))?;
        }
        for hop in &slot.hops {
            self.rtnl.delete_route(&slot_route(slot.mark, *hop))?;
        }
        Ok(())
    }

    /// What passed so far.
    pub fn passed(&self) -> io::Result<Passed> {
        let counters = nft::counters(&self.netns)?;
        let count = |name: &str| counters.get(name).copied().unwrap_or_default();
        Ok(Passed {
            forwarded_v4: count("forwarded4"),
            forwarded_v6: count("forwarded6"),
            returned_v4: count("returned4"),
            returned_v6: count("returned6"),
        })
    }

    fn route(&mut self, member: &Member) -> io::Result<()> {
        let slots = self.slots.values().chain(&self.retired);
        let used: BTreeSet<u32> = slots.map(|slot| slot.mark).collect();
        let free = (FIRST_MARK..).find(|mark| !used.contains(mark));
        let slot = self.slots.entry(member.name.clone()).or_insert(Slot {
            mark: free.unwrap_or(FIRST_MARK),
            hops: Vec::new(),
        });
        for hop in &member.hops {
            self.rtnl.replace_route(&slot_route(slot.mark, *hop))?;
        }
        for like in FAMILIES {
            // Without it a packet whose member has just lost its interface
            // would go back to where it came from.
            self.rtnl.replace_route(&slot.fallback(like))?;
            self.rtnl.add_rule(&slot.rule(), like)?;
        }
        slot.hops.clone_from(&member.hops);
        Ok(())
    }

    fn buckets(&self) -> String {
        let mut map = String::new();
        for bucket in 0..BUCKETS {
            if let Some(slot) = self.owner(bucket) {
                let comma = if bucket == 0 { "" } else { ", " };
                let _ = write!(map, "{comma}{bucket} : {}", slot.mark);
            }
        }
        if map.is_empty() {
            return "flush chain inet lab spread\nadd rule inet lab spread drop\n".to_owned();
        }
        let mut script = "flush chain inet lab spread\n".to_owned();
        for ip in ["ip", "ip6"] {
            let _ = writeln!(
                script,
                "add rule inet lab spread meta mark set jhash {ip} saddr . {ip} daddr \
                 . th sport . th dport mod {BUCKETS} seed {} map {{ {map} }}",
                self.seed
            );
        }
        script
    }

    /// Rendezvous hashing: the member with the highest draw owns the bucket.
    fn owner(&self, bucket: u32) -> Option<&Slot> {
        let draw = |name: &str| {
            let mut hasher = DefaultHasher::new();
            (bucket, name).hash(&mut hasher);
            hasher.finish()
        };
        let owner = self.slots.iter().max_by_key(|(name, _)| draw(name));
        owner.map(|(_, slot)| slot)
    }
}

const FAMILIES: [std::net::IpAddr; 2] = [
    std::net::IpAddr::V4(std::net::Ipv4Addr::UNSPECIFIED),
    std::net::IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED),
];

fn slot_route(mark: u32, hop: Hop) -> Route {
    Route {
        destination: any(hop.gateway.unwrap_or(FAMILIES[0])),
        table: mark,
        hops: vec![hop],
        metric: Some(100),
    }
}

impl Slot {
    fn rule(&self) -> Rule {
        Rule {
            mark: Some(self.mark),
            priority: self.mark,
            table: self.mark,
            ..Rule::default()
        }
    }

    fn fallback(&self, like: std::net::IpAddr) -> Route {
        Route {
            destination: any(like),
            table: self.mark,
            hops: Vec::new(),
            metric: Some(u32::MAX),
        }
    }
}
