//! What the daemon takes with 16 load balancers and 120 targets.

use std::time::Duration;

use meridio_lab::topology::{Topology, TopologyOptions};

use meridio_proxy::core::family::IpFamilies;

use crate::report::{Aim, Report};

const LBS: usize = 16;

/// A node's /24 has no room for 120 targets beside 16 load balancers: each
/// has two addresses.
pub fn run(report: &mut Report) -> Result<(), String> {
    with(report, IpFamilies::V6, 120)?;
    with(report, IpFamilies::Dual, 108)
}

fn with(report: &mut Report, families: IpFamilies, targets: usize) -> Result<(), String> {
    let mut lab = Topology::start(TopologyOptions {
        lbs: 1,
        targets: 0,
        families,
        env: [("NSM_LOG_LEVEL".to_owned(), "INFO".to_owned())].into(),
        ..TopologyOptions::default()
    })?;
    let pid = lab.daemon()?.pid();
    let idle = status(pid, "VmRSS");
    report.add(
        &format!("resident, 1 LB, {families:?}"),
        "MiB",
        &[idle],
        &[Aim::Max(20.0)],
    );
    for _ in 1..LBS {
        lab.add_lb()?;
    }
    for _ in 0..targets {
        let name = lab.make_target()?;
        lab.targets[&name].connect()?;
    }
    let what = format!("{LBS} LBs, {targets} targets, {families:?}");
    for (name, field, aims) in [
        ("resident", "VmRSS", &[Aim::Max(25.0)][..]),
        ("resident at most", "VmHWM", &[]),
        ("of its own", "RssAnon", &[]),
        ("of files", "RssFile", &[]),
    ] {
        let found = [status(pid, field)];
        report.add(&format!("{name}, {what}"), "MiB", &found, aims);
    }
    for (name, folder) in [("threads", "task"), ("descriptors", "fd")] {
        let path = format!("/proc/{pid}/{folder}");
        let entries = std::fs::read_dir(&path).map_err(|error| format!("{path}: {error}"))?;
        let found = [entries.count() as f64];
        report.add(&format!("{name}, {what}"), "", &found, &[]);
    }
    if let Some(path) = std::env::var_os("MERIDIO_BENCH_SMAPS") {
        std::fs::copy(format!("/proc/{pid}/smaps"), path).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// A field of the process's status, in MiB.
fn status(pid: u32, field: &str) -> f64 {
    let text = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let value = (text.lines())
        .find_map(|line| line.strip_prefix(field)?.strip_prefix(':'))
        .and_then(|value| value.trim().split(' ').next()?.parse::<f64>().ok());
    value.map_or(f64::NAN, |kib| kib / 1024.0)
}

/// The time that the process has used so far.
pub fn cpu(pid: u32) -> Duration {
    let text = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Behind the name, which may hold anything, the 12th and 13th field.
    let fields: Vec<&str> = text
        .rsplit_once(')')
        .map_or_else(Vec::new, |(_, rest)| rest.split_whitespace().collect());
    let ticks = |place: usize| fields.get(place).and_then(|text| text.parse::<u64>().ok());
    let ticks = ticks(11).unwrap_or_default() + ticks(12).unwrap_or_default();
    // USER_HZ is 100 on every architecture that Linux runs Kubernetes on.
    Duration::from_millis(ticks * 10)
}
