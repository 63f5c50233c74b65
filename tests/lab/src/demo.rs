//! The demonstration: real packets through the daemon while everything around
//! it changes, and a verdict.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::{self, Write};
use std::net::IpAddr;
use std::time::Duration;

use meridio_proxy::sync::clock;

use crate::burst::{self, Burst};
use crate::spread::Passed;
use crate::topology::{LIMIT, Topology, TopologyOptions, destination};
use crate::traffic::{Flows, Pace, Step};

/// Distinct flows per protocol and family.
const FLOWS: usize = 1000;
/// Steady flows per VIP.
const STEADY: usize = 100;
/// Intervals of steady traffic before and after a change.
const REST: usize = 12;
/// Packets of a step that may meet the gap in which the kernel has no IPv6
/// route, while it replaces one hop by hop.
const GAP_MAX: usize = 3;
const INTERVAL: Duration = Duration::from_millis(25);

/// What the demonstration found.
#[derive(Default)]
pub struct Verdict {
    checks: Vec<(bool, String)>,
}

impl Verdict {
    /// Whether everything held.
    #[must_use]
    pub fn held(&self) -> bool {
        self.checks.iter().all(|(held, _)| *held)
    }

    fn check(&mut self, held: bool, what: String) {
        say(&format!("  {} {what}", if held { "ok  " } else { "FAIL" }));
        self.checks.push((held, what));
    }

    fn failures(&self) -> impl Iterator<Item = &str> {
        (self.checks.iter())
            .filter(|(held, _)| !held)
            .map(|(_, what)| what.as_str())
    }
}

/// Who answers for packets that were lost in a step.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Demand {
    /// No packet at all may be lost, but in the gap of the kernel's IPv6
    /// multipath replace.
    Nothing,
    /// None of flows that kept their way; flows that were given another load
    /// balancer or target are counted apart.
    Steady,
    /// What is lost is the peers' doing; it is only reported.
    Report,
}

/// Runs it; an error is something that could not even be tried.
pub fn run() -> Result<Verdict, String> {
    let begun = clock::now();
    let mut verdict = Verdict::default();
    heading("Start: 2 load balancers, 3 targets, IPv4 and IPv6");
    let mut lab = Topology::start(TopologyOptions::default())?;
    let pid = lab.daemon()?.pid();
    say(&format!(
        "  daemon ready after {:.1} s, process {pid}, {} kB resident",
        begun.elapsed().as_secs_f64(),
        resident(pid)
    ));
    many_flows(&mut lab, &mut verdict)?;
    let pace = Pace {
        interval: INTERVAL,
        limit: Duration::from_secs(90),
    };
    let traffic = lab.steady(&pace, STEADY)?;
    changes(&mut lab, &traffic, &mut verdict)?;
    restart(&mut lab, &traffic, &mut verdict)?;
    drop(traffic);
    end(&mut lab, &mut verdict)?;
    say(&drawing(&lab));
    heading("Result");
    for failure in verdict.failures() {
        say(&format!("  FAIL {failure}"));
    }
    let failed = verdict.failures().count();
    say(&format!(
        "  {} of {} checks held, {:.1} s",
        verdict.checks.len() - failed,
        verdict.checks.len(),
        begun.elapsed().as_secs_f64()
    ));
    Ok(verdict)
}

/// Many distinct flows, each of which must be answered.
fn many_flows(lab: &mut Topology, verdict: &mut Verdict) -> Result<(), String> {
    heading("Many flows: every one must be answered");
    let before = passed(lab)?;
    for vip in lab.vips().to_vec() {
        let client = lab.router.client();
        for (protocol, burst) in [
            ("TCP", burst::tcp(client, destination(vip), FLOWS)),
            ("UDP", burst::udp(client, destination(vip), FLOWS)),
        ] {
            let burst: Burst = burst.map_err(|error| error.to_string())?;
            verdict.check(burst.complete(), format!("{protocol} to {vip}: {burst}"));
        }
    }
    let after = passed(lab)?;
    for v4 in [true, false] {
        let family = if v4 { "IPv4" } else { "IPv6" };
        let returned = |name: &str| {
            let count = |passed: &BTreeMap<String, Passed>| {
                passed.get(name).map_or(0, |passed| match v4 {
                    true => passed.returned_v4,
                    false => passed.returned_v6,
                })
            };
            count(&after) - count(&before)
        };
        let total: u64 = lab.lbs.keys().map(|name| returned(name)).sum();
        let mut text = format!("{family} return traffic:");
        let mut fair = total > 0;
        for name in lab.lbs.keys() {
            let share = 100.0 * returned(name) as f64 / total.max(1) as f64;
            let _ = write!(text, " {name} {share:.0} %");
            fair &= (30.0..=70.0).contains(&share);
        }
        verdict.check(fair, format!("{text} (30 to 70 wanted)"));
    }
    Ok(())
}

/// Load balancers, VIPs and targets come and go under steady traffic.
fn changes(lab: &mut Topology, traffic: &Flows, verdict: &mut Verdict) -> Result<(), String> {
    heading("Changes under steady traffic: flows that keep their way lose nothing");
    let mut watch = Watch {
        lab,
        traffic,
        verdict,
    };
    watch.step("nothing changes", Demand::Nothing, |_| Ok(()))?;
    watch.step("a third load balancer joins", Demand::Steady, |lab| {
        lab.add_lb().map(drop)
    })?;
    watch.step("a load balancer leaves", Demand::Steady, |lab| {
        lab.remove_lb("lb-1")
    })?;
    let vip = IpAddr::from([20, 0, 0, 2]);
    watch.step("a VIP is added", Demand::Nothing, |lab| lab.add_vip(vip))?;
    let added = destination(vip);
    (traffic.add(added, STEADY)).map_err(|error| error.to_string())?;
    watch.step("it carries traffic", Demand::Nothing, |_| Ok(()))?;
    traffic.end_flows(added);
    watch.step("the VIP is removed", Demand::Nothing, |lab| {
        lab.remove_vip(vip)
    })?;
    let target = "target-2";
    watch.step("a target leaves", Demand::Nothing, |lab| {
        lab.unregister(target)?;
        // What is on its way is still answered.
        rest(traffic)?;
        lab.stop_target(target)
    })?;
    watch.step("the target comes back", Demand::Nothing, |lab| {
        lab.start_target(target)
    })
}

/// The daemon is killed and started again.
fn restart(lab: &mut Topology, traffic: &Flows, verdict: &mut Verdict) -> Result<(), String> {
    heading("The daemon is killed (SIGKILL) and started again");
    let mut watch = Watch {
        lab,
        traffic,
        verdict,
    };
    let made = watch.lab.datapath.made();
    watch.step("killed, peers do not react", Demand::Nothing, |lab| {
        lab.kill_daemon()?;
        rest(traffic)
    })?;
    watch.step(
        "started again, adopts what is there",
        Demand::Nothing,
        |lab| {
            lab.start_daemon()?;
            lab.wait_ready()?;
            rest(traffic)
        },
    )?;
    let rebuilt = watch.lab.datapath.made() - made;
    watch.verdict.check(
        rebuilt == 0,
        format!("no interface was made anew by the restart ({rebuilt} were)"),
    );
    // NSM heals a connection whose endpoint went away, and rebuilds its
    // interface; that costs packets whatever the daemon does.
    watch.step(
        "targets heal, by rebuilding their interfaces",
        Demand::Report,
        |lab| {
            for name in lab.targets.keys().cloned().collect::<Vec<_>>() {
                lab.targets[&name].connect()?;
                lab.unregister(&name)?;
                lab.register(&name)?;
            }
            Ok(())
        },
    )?;
    watch.step("afterwards", Demand::Nothing, |_| Ok(()))
}

fn end(lab: &mut Topology, verdict: &mut Verdict) -> Result<(), String> {
    heading("End");
    let leaked = lab.infra.leaked().map_err(|error| error.to_string())?;
    verdict.check(
        leaked == 0,
        format!("{leaked} packets of VIPs left by the pod's primary interface"),
    );
    let refusals = lab.nsmgr.refusals();
    verdict.check(
        refusals.is_empty(),
        match refusals.len() {
            0 => "nsmgr refused no call".to_owned(),
            count => format!("nsmgr refused {count} calls: {}", refusals.join("; ")),
        },
    );
    let begun = clock::now();
    let daemon = lab.stop_daemon(Duration::from_secs(28))?;
    let status = daemon.wait_exit(Duration::ZERO);
    let how = status.map_or("no end".to_owned(), |status| status.to_string());
    verdict.check(
        status.is_some_and(|status| status.success()),
        format!(
            "SIGTERM: stopped after {:.1} s, {}",
            begun.elapsed().as_secs_f64(),
            how.replace(": ", " ")
        ),
    );
    Ok(())
}

/// Runs changes under traffic and judges them.
struct Watch<'a> {
    lab: &'a mut Topology,
    traffic: &'a Flows,
    verdict: &'a mut Verdict,
}

impl Watch<'_> {
    fn step(
        &mut self,
        what: &str,
        demand: Demand,
        change: impl FnOnce(&mut Topology) -> Result<(), String>,
    ) -> Result<(), String> {
        let before = self.lab.without_ipv6_route()?;
        let begun = clock::now();
        let mark = self.traffic.mark();
        rest(self.traffic)?;
        change(self.lab).map_err(|error| format!("{what}: {error}"))?;
        let changed = begun.elapsed();
        rest(self.traffic)?;
        // Otherwise the lost packets of one step would be the next one's, too.
        let recovered = (self.traffic).all_answered_since(self.traffic.mark(), LIMIT);
        let step = self.traffic.step(mark);
        let gap = self.lab.without_ipv6_route()?.saturating_sub(before);
        let excused = usize::try_from(gap).unwrap_or_default().min(GAP_MAX);
        let held = recovered
            && match demand {
                Demand::Nothing => step.lost <= excused,
                Demand::Steady => step.lost_steady <= excused,
                Demand::Report => true,
            };
        let mut text = describe(&step, demand, changed);
        if gap > 0 {
            let _ = write!(text, " [{gap} met the gap of an IPv6 multipath replace]");
        }
        self.verdict.check(held, format!("{what}: {text}"));
        Ok(())
    }
}

fn describe(step: &Step, demand: Demand, took: Duration) -> String {
    let mut text = format!("{} of {} packets lost", step.lost, step.sent);
    if step.lost > 0 {
        let _ = write!(
            text,
            " ({} of flows that kept their way, {} of flows that moved)",
            step.lost_steady, step.lost_moved
        );
    }
    if step.discarded > 0 {
        let _ = write!(text, ", {} maybe discarded by the machine", step.discarded);
    }
    if step.lost_steady > 0 {
        let worst = step.worst_run as u128 * INTERVAL.as_millis();
        let _ = write!(text, ", one for {worst} ms");
    }
    let moved = [
        (step.moved_there, "arrived over another LB"),
        (step.moved_back, "returned over another LB"),
        (step.moved_target, "got another target"),
    ];
    for (count, how) in moved.iter().filter(|(count, _)| *count > 0) {
        let _ = write!(text, ", {count} of {} flows {how}", step.flows);
    }
    if demand == Demand::Report {
        text.push_str(" [the peers' doing: reported, not judged]");
    }
    if let (Some(error), true) = (&step.error, step.lost > 0) {
        let _ = write!(text, "; {error}");
    }
    let _ = write!(text, " [{:.1} s]", took.as_secs_f64());
    text
}

fn rest(traffic: &Flows) -> Result<(), String> {
    if traffic.run_for(REST, LIMIT) {
        Ok(())
    } else {
        Err("the traffic's time is over".to_owned())
    }
}

fn passed(lab: &Topology) -> Result<BTreeMap<String, Passed>, String> {
    (lab.lbs.iter())
        .map(|(name, lb)| {
            let passed = lb.passed().map_err(|error| error.to_string())?;
            Ok((name.clone(), passed))
        })
        .collect()
}

fn resident(pid: u32) -> String {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    (status.lines())
        .find_map(|line| line.strip_prefix("VmRSS:"))
        .map_or("?".to_owned(), |text| {
            text.trim().trim_end_matches(" kB").to_owned()
        })
}

/// What was there, with the packets that it passed.
fn drawing(lab: &Topology) -> String {
    let lbs: Vec<[String; 2]> = (lab.lbs.iter())
        .map(|(name, lb)| {
            let passed = lb.passed().unwrap_or_default();
            let there = passed.forwarded_v4 + passed.forwarded_v6;
            let back = passed.returned_v4 + passed.returned_v6;
            [name.clone(), format!("> {there} < {back}")]
        })
        .collect();
    let targets: Vec<[String; 2]> = (lab.targets.iter())
        .map(|(name, target)| {
            let own: Vec<String> = target.addresses().iter().map(ToString::to_string).collect();
            let (datagrams, connections) = target.answered();
            let answered = format!("{datagrams} UDP, {connections} TCP answered");
            [format!("{name}  {}", own.join(" ")), answered]
        })
        .collect();
    let pod = [
        "pod: the daemon",
        "bridge0, 172.16.0.1",
        "         fd00::1",
        "table 1: ECMP back",
        "eth0: IPAM, NSP",
        "and no VIP packet",
    ];
    let outside = ["client", "  |", "router", "(buckets)"];
    let mut text = format!(
        "\n  {:10}   {:18}   +{:-<22}+   targets\n",
        "outside", "load balancers", ""
    );
    for row in 0..pod.len().max(2 * lbs.len()).max(2 * targets.len()) {
        let cell = |list: &[[String; 2]]| {
            let cell = list.get(row / 2).map(|cell| cell[row % 2].clone());
            cell.unwrap_or_default()
        };
        // The line with a name is the one that the link is drawn on.
        let link = |list: &[[String; 2]]| match row % 2 == 0 && row / 2 < list.len() {
            true => "---",
            false => "   ",
        };
        let _ = writeln!(
            text,
            "  {:10}{}{:18}{}| {:20} |{}{}",
            outside.get(row).unwrap_or(&""),
            link(&lbs),
            cell(&lbs),
            link(&lbs),
            pod.get(row).unwrap_or(&""),
            link(&targets),
            cell(&targets),
        );
    }
    let _ = writeln!(text, "  {:34}+{:-<22}+", "", "");
    text.push_str("  > packets to targets, < packets back\n");
    text
}

fn heading(text: &str) {
    say(&format!("\n{text}"));
}

/// A closed standard output is no reason to stop.
fn say(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}
