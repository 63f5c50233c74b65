//! Golden transcripts of the data plane: what is told, and which operations
//! follow, as `ip` commands.
//!
//! A file of `tests/golden/dataplane` has an input on each line that begins at
//! the margin; the indented lines after it are what it leads to, `!` before a
//! warning. `UPDATE_GOLDEN=1 cargo test --test dataplane` rewrites them.
//!
//! | input | meaning |
//! |---|---|
//! | `link INDEX NAME [nocarrier] [down] [nobridge] [master INDEX]` | a link is seen |
//! | `gone INDEX` | a link is gone |
//! | `address INDEX PREFIX`, `route FAMILY METRIC HOP%INDEX…`, `rule PRIORITY PREFIX PROTOCOL` | what a predecessor left |
//! | `prefixes PREFIX…`, `lb NAME IFNAME PEER…`, `target …`, `down lb NAME`, `release lb NAME`, `vips PREFIX…` | facts |
//! | `duplicate INDEX PREFIX` | an address that failed duplicate address detection |
//! | `silent ADDRESS` | a neighbour does not answer |
//! | `lost v4` | the kernel has taken the family's routes away |
//! | `pass SECONDS` | time passes |
//! | `refused IFNAME` | the kernel did not take the port |

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests, which fail that way"
)]

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::IpAddr;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;
use meridio_proxy::core::dataplane::Dataplane;
use meridio_proxy::core::event::Event;
use meridio_proxy::core::family::{Family, IpFamilies, PerFamily};
use meridio_proxy::core::ids::{EndpointName, IfIndex, IfName, PortKey, SegmentId};
use meridio_proxy::core::observed::{Link, LinkFact, Observed, RouteKind, Rule, RuleAction};
use meridio_proxy::core::op::{BRIDGE, KernelOp};
use meridio_proxy::core::plan;
use meridio_proxy::sync::clock;

struct Machine {
    dataplane: Dataplane,
    observed: Observed,
    warned: BTreeSet<String>,
    now: Instant,
}

fn parsed<T: FromStr<Err: std::fmt::Debug>>(word: &str) -> T {
    word.parse()
        .unwrap_or_else(|error| panic!("{word:?}: {error:?}"))
}

fn set<T: FromStr<Err: std::fmt::Debug> + Ord>(words: &[&str]) -> BTreeSet<T> {
    words.iter().map(|word| parsed(word)).collect()
}

fn index(word: &str) -> IfIndex {
    IfIndex::new(parsed(word)).unwrap()
}

fn key(kind: &str, name: &str) -> PortKey {
    match kind {
        "lb" => PortKey::Lb(EndpointName::new(name)),
        "target" => PortKey::Target(SegmentId::new(name)),
        other => panic!("{other:?} is neither lb nor target"),
    }
}

fn link(number: &str, name: &str, flags: &[&str]) -> Link {
    let master = flags
        .iter()
        .position(|flag| *flag == "master")
        .map(|at| index(flags[at + 1]));
    Link {
        index: index(number),
        name: IfName::parse(name).unwrap(),
        alias: None,
        master,
        up: !flags.contains(&"down"),
        carrier: !flags.contains(&"nocarrier"),
        is_bridge: name == BRIDGE && !flags.contains(&"nobridge"),
    }
}

impl Machine {
    fn new() -> Self {
        Self {
            dataplane: Dataplane::new(IpFamilies::Dual, [2, 0, 0, 0, 0, 1]),
            observed: Observed::default(),
            warned: BTreeSet::new(),
            now: clock::now(),
        }
    }

    fn input(&mut self, line: &str) {
        let words: Vec<&str> = line.split_whitespace().collect();
        match words.as_slice() {
            ["link", number, name, flags @ ..] => {
                let _ = self
                    .observed
                    .link(LinkFact::Seen(link(number, name, flags)));
            }
            ["gone", number] => {
                let _ = self.observed.link(LinkFact::Gone(index(number)));
            }
            ["address", number, prefix] => {
                self.observed
                    .addresses
                    .insert((index(number), parsed(prefix)));
            }
            ["duplicate", number, prefix] => {
                let entry = (index(number), parsed(prefix));
                self.observed.addresses.insert(entry);
                self.observed.duplicates.insert(entry);
            }
            ["route", family, metric, hops @ ..] => {
                let family = if *family == "v4" {
                    Family::V4
                } else {
                    Family::V6
                };
                let hops = hops
                    .iter()
                    .map(|hop| hop.split_once('%').unwrap())
                    .map(|(hop, number)| (parsed(hop), parsed(number)))
                    .collect();
                self.observed
                    .routes
                    .get_mut(family)
                    .insert(parsed(metric), RouteKind::Via(hops));
            }
            ["rule", priority, source, protocol] => {
                let rule = Rule {
                    priority: parsed(priority),
                    source: parsed(source),
                    protocol: parsed(protocol),
                    action: RuleAction::Lookup,
                };
                *self.observed.rules.entry(rule).or_default() += 1;
            }
            ["silent", address] => {
                self.observed.silent.insert(parsed(address));
            }
            ["pass", seconds] => self.now += Duration::from_secs(parsed(seconds)),
            ["lost", family] if *family == "v4" => self.observed.routes.v4.clear(),
            ["refused", port] => self.dataplane.failed(&KernelOp::Attach {
                port: IfName::parse(port).unwrap(),
                bridge: index("1"),
            }),
            _ => self.dataplane.apply(fact(&words)),
        }
    }

    /// Does what is planned, round after round, and writes it down.
    fn output(&mut self, text: &mut String) {
        loop {
            let desired = self.dataplane.desired(&self.observed, self.now);
            let warnings: BTreeSet<String> =
                desired.warnings.iter().map(ToString::to_string).collect();
            for warning in warnings.difference(&self.warned) {
                writeln!(text, "    ! {warning}").unwrap();
            }
            self.warned = warnings;
            let ops = plan::diff(&self.observed, &desired);
            if ops.is_empty() {
                return;
            }
            for op in ops {
                writeln!(text, "    {op}").unwrap();
                self.observed.apply(&op);
                self.dataplane.succeeded(&op);
                if matches!(op, KernelOp::CreateBridge { .. }) {
                    self.observed.insert_link(link("100", BRIDGE, &["down"]));
                }
            }
        }
    }
}

fn fact(words: &[&str]) -> Event {
    match words {
        ["prefixes", prefixes @ ..] => {
            let all: BTreeSet<IpNetwork> = set(prefixes);
            Event::BridgePrefixes(PerFamily::from_fn(|family| {
                all.iter()
                    .find(|prefix| Family::from(**prefix) == family)
                    .copied()
            }))
        }
        ["down", kind, name] => Event::PeerDown {
            key: key(kind, name),
        },
        ["release", kind, name] => Event::PortReleased {
            key: key(kind, name),
        },
        ["vips", vips @ ..] => Event::Vips(set(vips)),
        [kind, name, ifname, peers @ ..] => Event::PortExpected {
            key: key(kind, name),
            ifname: IfName::parse(ifname).unwrap(),
            peers: set::<IpAddr>(peers),
        },
        other => panic!("no input: {other:?}"),
    }
}

fn transcript(golden: &str) -> String {
    let mut machine = Machine::new();
    let mut text = String::new();
    for line in golden.lines().filter(|line| !line.starts_with(' ')) {
        writeln!(text, "{line}").unwrap();
        // Several inputs at once, as in one turn, end with a comma.
        let (input, more) = match line.strip_suffix(',') {
            Some(input) => (input, true),
            None => (line, false),
        };
        if input.is_empty() || input.starts_with('#') {
            continue;
        }
        machine.input(input);
        if !more {
            machine.output(&mut text);
        }
    }
    text
}

#[test]
fn transcripts_are_as_written_down() {
    let folder = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/golden/dataplane");
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    let mut cases = 0;
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let golden = std::fs::read_to_string(&path).unwrap();
        let now = transcript(&golden);
        if update {
            std::fs::write(&path, &now).unwrap();
        }
        assert_eq!(now, golden, "{}", path.display());
        cases += 1;
    }
    assert!(cases > 0);
}
