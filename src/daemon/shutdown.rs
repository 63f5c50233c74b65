//! The order in which the daemon stops, as data.
//!
//! Kubernetes kills the process 30 s after the signal unless the pod says
//! otherwise, and Meridio's template does not. The budgets add up to less, so
//! that even with every peer dead each stage gets its turn.

use std::fmt;
use std::time::Duration;

/// A step of the orderly stop. The order of the variants is the order in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stage {
    /// Probes answer NOT_SERVING; VIPs, probes and the connection log stop.
    Quiet,
    /// The endpoint leaves the registry: no new targets come.
    Unregister,
    /// The endpoint's server ends, open requests are answered UNAVAILABLE.
    Endpoint,
    /// All LB connections are closed, in parallel.
    LoadBalancers,
    /// The kernel gets what was told so far; bridge, addresses, rules and the
    /// ports of targets stay, so that traffic outlives the process.
    Kernel,
    /// Addresses whose release is pending are released.
    Ipam,
    /// Connections and identity: their last user has ended.
    Transport,
}

/// A stage with the longest time it may take.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Budget {
    /// Which.
    pub stage: Stage,
    /// How long.
    pub limit: Duration,
}

const fn budget(stage: Stage, millis: u64) -> Budget {
    Budget {
        stage,
        limit: Duration::from_millis(millis),
    }
}

/// All stages in order, with their budgets.
pub const STAGES: [Budget; 7] = [
    budget(Stage::Quiet, 500),
    budget(Stage::Unregister, 3_000),
    budget(Stage::Endpoint, 1_000),
    budget(Stage::LoadBalancers, 10_000),
    budget(Stage::Kernel, 1_000),
    budget(Stage::Ipam, 7_000),
    budget(Stage::Transport, 500),
];

impl fmt::Display for Stage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Quiet => "quiet",
            Self::Unregister => "unregister",
            Self::Endpoint => "endpoint",
            Self::LoadBalancers => "load balancers",
            Self::Kernel => "kernel",
            Self::Ipam => "IPAM",
            Self::Transport => "transport",
        })
    }
}

/// The longest that the last two steps may take each: the thread of the signals
/// ends, and the log's queue is written.
pub const LAST_LIMIT: Duration = Duration::from_millis(500);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_stages_are_in_order_and_fit_into_the_grace_period() {
        assert!(STAGES.windows(2).all(|pair| pair[0].stage < pair[1].stage));
        let stages: Duration = STAGES.iter().map(|budget| budget.limit).sum();
        let total = stages + LAST_LIMIT * 2;
        assert!(total < Duration::from_secs(25), "{total:?}");
    }
}
