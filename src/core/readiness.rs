//! From facts to what the probes are told.
//!
//! The names, and Readiness as the conjunction of all four conditions, are
//! Meridio's (pkg/health/const.go). Liveness is its `NSMEndpoint` too, except
//! that it holds until the endpoint has been up once: waiting for SPIRE, IPAM
//! or nsmgr is no reason to be killed, and a restart would not shorten it.

use std::fmt;

/// The conditions that readiness is made of, with their names on the wire.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum SubService {
    /// `IPAMCli`: the connection to IPAM is up.
    IpamCli,
    /// `NSPCli`: the connection to NSP is up.
    NspCli,
    /// `NSMEndpoint`: the own endpoint answers over mTLS.
    NsmEndpoint,
    /// `Egress`: at least one LB is connected.
    Egress,
}

impl SubService {
    /// All, in the order in which they are listed.
    pub const ALL: [Self; 4] = [Self::IpamCli, Self::NspCli, Self::NsmEndpoint, Self::Egress];

    /// The name on the wire.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::IpamCli => "IPAMCli",
            Self::NspCli => "NSPCli",
            Self::NsmEndpoint => "NSMEndpoint",
            Self::Egress => "Egress",
        }
    }
}

impl fmt::Display for SubService {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// What a probe can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ProbeService {
    /// `""`: the process is there.
    Process,
    /// `Readiness`.
    Readiness,
    /// `Liveness`.
    Liveness,
    /// One condition.
    Sub(SubService),
}

impl ProbeService {
    /// The service of that name; `None` when there is none.
    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        match name {
            "" => Some(Self::Process),
            "Readiness" => Some(Self::Readiness),
            "Liveness" => Some(Self::Liveness),
            _ => SubService::ALL
                .into_iter()
                .find(|sub| sub.name() == name)
                .map(Self::Sub),
        }
    }
}

/// The facts.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Readiness {
    ipam: bool,
    nsp: bool,
    endpoint: bool,
    egress: bool,
    endpoint_was_up: bool,
    stopping: bool,
}

impl Readiness {
    /// Takes a fact; true when it is news.
    pub fn set(&mut self, sub: SubService, serving: bool) -> bool {
        let fact = match sub {
            SubService::IpamCli => &mut self.ipam,
            SubService::NspCli => &mut self.nsp,
            SubService::NsmEndpoint => &mut self.endpoint,
            SubService::Egress => &mut self.egress,
        };
        let changed = *fact != serving;
        *fact = serving;
        self.endpoint_was_up |= self.endpoint;
        changed
    }

    /// The daemon stops: nobody shall count on it any more.
    pub fn stopping(&mut self) {
        self.stopping = true;
    }

    /// What a probe is told.
    #[must_use]
    pub fn serving(&self, service: ProbeService) -> bool {
        match service {
            ProbeService::Process => true,
            ProbeService::Readiness => {
                !self.stopping && SubService::ALL.into_iter().all(|sub| self.fact(sub))
            }
            ProbeService::Liveness => !self.stopping && (self.endpoint || !self.endpoint_was_up),
            ProbeService::Sub(sub) => self.fact(sub),
        }
    }

    fn fact(&self, sub: SubService) -> bool {
        match sub {
            SubService::IpamCli => self.ipam,
            SubService::NspCli => self.nsp,
            SubService::NsmEndpoint => self.endpoint,
            SubService::Egress => self.egress,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn readiness_is_all_four() {
        for missing in SubService::ALL {
            let mut state = Readiness::default();
            for sub in SubService::ALL {
                assert!(!state.serving(ProbeService::Readiness));
                state.set(sub, true);
            }
            assert!(state.serving(ProbeService::Readiness));
            assert!(state.set(missing, false));
            assert!(!state.set(missing, false));
            assert!(!state.serving(ProbeService::Readiness));
            assert!(!state.serving(ProbeService::Sub(missing)));
        }
    }

    #[test]
    fn liveness_waits_for_the_first_success() {
        let mut state = Readiness::default();
        assert!(state.serving(ProbeService::Liveness));
        state.set(SubService::NsmEndpoint, false);
        assert!(state.serving(ProbeService::Liveness));
        state.set(SubService::NsmEndpoint, true);
        assert!(state.serving(ProbeService::Liveness));
        state.set(SubService::NsmEndpoint, false);
        assert!(!state.serving(ProbeService::Liveness));
        state.set(SubService::NsmEndpoint, true);
        assert!(state.serving(ProbeService::Liveness));
        state.stopping();
        assert!(!state.serving(ProbeService::Liveness));
        assert!(state.serving(ProbeService::Process));
    }

    #[test]
    fn names() {
        for (name, service) in [
            ("", Some(ProbeService::Process)),
            ("Readiness", Some(ProbeService::Readiness)),
            ("Liveness", Some(ProbeService::Liveness)),
            ("IPAMCli", Some(ProbeService::Sub(SubService::IpamCli))),
            ("NSPCli", Some(ProbeService::Sub(SubService::NspCli))),
            (
                "NSMEndpoint",
                Some(ProbeService::Sub(SubService::NsmEndpoint)),
            ),
            ("Egress", Some(ProbeService::Sub(SubService::Egress))),
            ("Startup", None),
            ("readiness", None),
        ] {
            assert_eq!(ProbeService::parse(name), service, "{name:?}");
        }
    }
}
