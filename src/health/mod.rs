//! What the probes are told. The facts come from the threads that know them,
//! through [`HealthCell`]; `server` answers from it on gRPC's poll thread;
//! `probe` is the thread that finds out what nobody else does.

pub mod client;
pub mod probe;
pub mod server;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::task::Waker;

use log::info;
use parking_lot::Mutex;

use crate::core::readiness::Readiness;
pub use crate::core::readiness::{ProbeService, SubService};

/// The shared state of the probes; clones refer to the same.
#[derive(Clone, Default)]
pub struct HealthCell {
    inner: Arc<Mutex<Inner>>,
}

#[derive(Default)]
struct Inner {
    facts: Readiness,
    reasons: BTreeMap<SubService, String>,
    watchers: BTreeMap<u64, Option<Waker>>,
    next_watcher: u64,
}

impl HealthCell {
    /// All sub-services NOT_SERVING.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets a sub-service, with the reason that the log and the status show.
    pub fn set(&self, service: SubService, serving: bool, reason: &str) {
        let (changed, woken) = {
            let mut inner = self.inner.lock();
            let changed = inner.facts.set(service, serving);
            if changed || inner.reasons.get(&service).is_none_or(|old| old != reason) {
                inner.reasons.insert(service, reason.to_owned());
            }
            (changed, inner.take_wakers(changed))
        };
        woken.into_iter().for_each(Waker::wake);
        if changed {
            let status = status_name(serving);
            info!(service = service.name(), status, reason; "Health changed");
        }
    }

    /// From now on Readiness and Liveness are NOT_SERVING.
    pub fn stopping(&self) {
        let woken = {
            let mut inner = self.inner.lock();
            inner.facts.stopping();
            inner.take_wakers(true)
        };
        woken.into_iter().for_each(Waker::wake);
    }

    /// Whether `service` is SERVING.
    #[must_use]
    pub fn serving(&self, service: ProbeService) -> bool {
        self.inner.lock().facts.serving(service)
    }

    /// All sub-services with their reasons, for the log:
    /// `IPAMCli=NOT_SERVING (connection refused), …`.
    #[must_use]
    pub fn describe(&self) -> String {
        let inner = self.inner.lock();
        SubService::ALL
            .iter()
            .map(|sub| {
                let status = status_name(inner.facts.serving(ProbeService::Sub(*sub)));
                match inner.reasons.get(sub) {
                    Some(reason) => format!("{sub}={status} ({reason})"),
                    None => format!("{sub}={status}"),
                }
            })
            .collect::<Vec<_>>()
            .join(", ")
    }

    /// A place for a task that wants to be woken on changes; `None` when
    /// `limit` tasks have one.
    fn watch(&self, limit: usize) -> Option<Watcher> {
        let mut inner = self.inner.lock();
        if inner.watchers.len() >= limit {
            return None;
        }
        let id = inner.next_watcher;
        inner.next_watcher += 1;
        inner.watchers.insert(id, None);
        Some(Watcher {
            cell: self.clone(),
            id,
        })
    }
}

impl Inner {
    /// Those to wake, once the lock is given back; none unless `changed`.
    fn take_wakers(&mut self, changed: bool) -> Vec<Waker> {
        self.watchers
            .values_mut()
            .filter_map(|waker| waker.take_if(|_| changed))
            .collect()
    }
}

/// A task's place among those that are woken; given up when dropped.
struct Watcher {
    cell: HealthCell,
    id: u64,
}

impl Watcher {
    /// The present status of `service`; `waker` is woken after the next change
    /// of any service.
    fn serving(&self, service: ProbeService, waker: &Waker) -> bool {
        let mut inner = self.cell.inner.lock();
        inner.watchers.insert(self.id, Some(waker.clone()));
        inner.facts.serving(service)
    }
}

impl Drop for Watcher {
    fn drop(&mut self) {
        self.cell.inner.lock().watchers.remove(&self.id);
    }
}

fn status_name(serving: bool) -> &'static str {
    if serving { "SERVING" } else { "NOT_SERVING" }
}
