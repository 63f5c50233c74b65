//! Requests of targets: so many at once, each from the target's side, with
//! nsmgr, forwarder, and interfaces.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use meridio_lab::target::Target;
use meridio_lab::topology::{LIMIT, Topology, TopologyOptions};
use meridio_proxy::core::lease::Verb;
use meridio_proxy::sync::clock;

use crate::report::{Aim, Report, millis};
use crate::size::cpu;

const REPEATS: usize = 3;

pub fn run(report: &mut Report) -> Result<(), String> {
    for slow in [0, 5] {
        for count in [1, 16, 120] {
            round(report, count, Duration::from_millis(slow))?;
        }
    }
    Ok(())
}

fn round(report: &mut Report, count: usize, slow: Duration) -> Result<(), String> {
    let mut lab = Topology::start(TopologyOptions {
        lbs: 1,
        targets: 0,
        env: [("NSM_LOG_LEVEL".to_owned(), "INFO".to_owned())].into(),
        ..TopologyOptions::default()
    })?;
    lab.ipam.set_delay(Verb::Allocate, slow);
    for _ in 0..count {
        lab.make_target()?;
    }
    let pid = lab.daemon()?.pid();
    let (mut all, mut each, mut used) = (Vec::new(), Vec::new(), Vec::new());
    let mut again = Vec::new();
    for _ in 0..REPEATS {
        let before = cpu(pid);
        let begun = clock::now();
        let tries = AtomicUsize::new(0);
        let mut times = at_once(&lab, |target| connect(target, &tries))?;
        again.push((tries.into_inner() - count) as f64);
        let total = begun.elapsed();
        all.push(total);
        each.append(&mut times);
        used.push(millis(cpu(pid).saturating_sub(before)) / (2 * count) as f64);
        at_once(&lab, |target| target.disconnect())?;
    }
    let what = format!("{count} targets, IPAM {} ms", slow.as_millis());
    let served = format!("{what}: all served");
    let aims: &[Aim] = if (count, slow) == (120, Duration::from_millis(5)) {
        &[Aim::Median(2000.0)]
    } else {
        &[]
    };
    report.add_times(&served, &all, aims);
    report.add_times(&format!("{what}: two Requests of each"), &each, &[]);
    // Each sends two: the connection, and then its VIPs.
    let rates: Vec<f64> = (all.iter())
        .map(|time| 2.0 * count as f64 / time.as_secs_f64())
        .collect();
    report.add(&format!("{what}: rate"), "Requests/s", &rates, &[]);
    report.add(&format!("{what}: tried again"), "targets", &again, &[]);
    report.add(&format!("{what}: daemon's time each"), "CPU ms", &used, &[]);
    Ok(())
}

/// Connects, and tries again where it fails, as Meridio's TAPA does: a
/// forwarder waits 750 ms for an endpoint's handshake and no longer.
fn connect(target: &Target, tries: &AtomicUsize) -> Result<(), String> {
    let deadline = clock::now() + LIMIT;
    loop {
        tries.fetch_add(1, Ordering::SeqCst);
        match target.connect() {
            Err(_) if clock::now() < deadline => {}
            done => return done,
        }
    }
}

/// Does something with all targets at once; returns how long each took.
fn at_once(
    lab: &Topology,
    act: impl Fn(&Target) -> Result<(), String> + Sync,
) -> Result<Vec<Duration>, String> {
    let act = &act;
    std::thread::scope(|scope| {
        let running: Vec<_> = (lab.targets.values())
            .map(|target| {
                let target = Arc::clone(target);
                scope.spawn(move || {
                    let begun = clock::now();
                    act(&target).map(|()| begun.elapsed())
                })
            })
            .collect();
        let joined = running.into_iter().map(|thread| {
            let done = thread.join().map_err(|_| "a target panicked".to_owned());
            done.and_then(|done| done)
        });
        joined.collect()
    })
}
