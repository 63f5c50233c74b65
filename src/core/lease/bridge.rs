//! The bridge's own addresses, one a family.

use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;

use super::check;
use crate::core::family::{Family, IpFamilies, PerFamily};

/// Pause before the next try while a family has no address (Meridio v1.2.8,
/// pkg/proxy/proxy.go:767).
const FIRST_PAUSE: Duration = Duration::from_millis(200);
/// Pause before a failed renewal is tried again.
const RENEW_PAUSE: Duration = Duration::from_secs(10);
/// Least interval of renewals, whatever was configured.
const RENEW_MIN: Duration = Duration::from_secs(1);

/// The address of one family.
#[derive(Debug, Clone)]
struct Own {
    address: Option<IpNetwork>,
    call: Option<u64>,
    due: Instant,
    /// The call in flight is too old to count: another follows it at once.
    is_asked_again: bool,
    is_failing: bool,
}

/// What a call's end changed.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Change {
    /// Nothing that anybody must hear of.
    None,
    /// The address of the family is new.
    Address,
    /// The first failure in a row.
    Failing,
    /// The first success after failures, the address being the old one.
    Recovered,
}

/// All families.
#[derive(Debug)]
pub(super) struct Bridge {
    own: PerFamily<Own>,
    families: IpFamilies,
    renew_interval: Duration,
    last_failure: Option<String>,
}

impl Bridge {
    /// Nothing known, everything due.
    pub(super) fn new(families: IpFamilies, renew_interval: Duration, now: Instant) -> Self {
        Self {
            own: PerFamily::from_fn(|_| Own {
                address: None,
                call: None,
                due: now,
                is_asked_again: false,
                is_failing: false,
            }),
            families,
            renew_interval: renew_interval.max(RENEW_MIN),
            last_failure: None,
        }
    }

    /// The addresses known.
    pub(super) fn addresses(&self) -> PerFamily<Option<IpNetwork>> {
        PerFamily::from_fn(|family| self.own.get(family).address)
    }

    /// Whether every family has one.
    pub(super) fn is_complete(&self) -> bool {
        self.addresses().covers(self.families)
    }

    /// Whether a call is in flight.
    pub(super) fn is_asking(&self) -> bool {
        self.own.iter().any(|(_, own)| own.call.is_some())
    }

    /// What the last call met, if it failed.
    pub(super) fn last_failure(&self) -> Option<&str> {
        self.last_failure.as_deref()
    }

    /// Makes a renewal of all families due.
    pub(super) fn renew_now(&mut self, now: Instant) {
        for family in Family::ALL {
            let own = self.own.get_mut(family);
            own.due = own.due.min(now);
        }
    }

    /// As [`Bridge::renew_now`], but what is in flight does not count as a
    /// renewal.
    pub(super) fn renew_anew(&mut self, now: Instant) {
        self.renew_now(now);
        for family in Family::ALL {
            let own = self.own.get_mut(family);
            own.is_asked_again = own.call.is_some();
        }
    }

    /// The families to ask for now.
    pub(super) fn due(&self, now: Instant) -> Vec<Family> {
        self.families
            .iter()
            .filter(|family| {
                let own = self.own.get(*family);
                own.call.is_none() && own.due <= now
            })
            .collect()
    }

    /// When [`Bridge::due`] will next have something.
    pub(super) fn wakes_at(&self, now: Instant) -> Option<Instant> {
        self.families
            .iter()
            .map(|family| self.own.get(family))
            .filter(|own| own.call.is_none())
            .map(|own| own.due)
            .filter(|at| *at > now)
            .min()
    }

    /// A call was begun.
    pub(super) fn asked(&mut self, family: Family, call: u64) {
        self.own.get_mut(family).call = Some(call);
    }

    /// A call ended. A call that is not the one in flight changes nothing.
    pub(super) fn answered(
        &mut self,
        family: Family,
        call: u64,
        result: Result<IpNetwork, String>,
        now: Instant,
    ) -> Change {
        let renew_interval = self.renew_interval;
        let own = self.own.get_mut(family);
        if own.call != Some(call) {
            return Change::None;
        }
        own.call = None;
        let is_asked_again = std::mem::take(&mut own.is_asked_again);
        let checked = result.and_then(|address| check::bridge(family, address).map(|()| address));
        let change = match checked {
            Ok(address) => {
                own.due = now + renew_interval;
                let was_failing = std::mem::replace(&mut own.is_failing, false);
                let before = own.address.replace(address);
                self.last_failure = None;
                if before != Some(address) {
                    Change::Address
                } else if was_failing {
                    Change::Recovered
                } else {
                    Change::None
                }
            }
            Err(why) => {
                own.due = now
                    + if own.address.is_none() {
                        FIRST_PAUSE
                    } else {
                        RENEW_PAUSE.min(renew_interval)
                    };
                self.last_failure = Some(why);
                if std::mem::replace(&mut own.is_failing, true) {
                    Change::None
                } else {
                    Change::Failing
                }
            }
        };
        if is_asked_again {
            own.due = now;
        }
        change
    }
}
