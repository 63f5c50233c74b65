//! From exec to Ready, with all peers up and one load balancer registered.

use std::time::Duration;

use meridio_lab::topology::{LIMIT, Topology, TopologyOptions};
use meridio_proxy::sync::clock;
use meridio_proxy::sync::stop::stop_pair;

use crate::report::{Aim, Report};

const STARTS: usize = 10;
/// Between two probes.
const PERIOD: Duration = Duration::from_millis(5);

pub fn run(report: &mut Report) -> Result<(), String> {
    let mut times = Vec::new();
    for _ in 0..STARTS {
        let mut lab = Topology::peers(TopologyOptions::default())?;
        lab.make_lb()?;
        let begun = clock::now();
        lab.start_daemon()?;
        let (_stopper, pause) = stop_pair();
        while let Err(error) = lab.daemon()?.health("Readiness") {
            if begun.elapsed() > LIMIT {
                return Err(format!("{error}\n{}", lab.daemon()?.tail(20)));
            }
            let _ = pause.wait(PERIOD);
        }
        times.push(begun.elapsed());
    }
    report.add_times("start to Ready", &times, &[Aim::Max(1000.0)]);
    Ok(())
}
