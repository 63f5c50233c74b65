//! The connections of targets: in which order their operations run, which of
//! them are up, when they expire, and who holds which lease.
//!
//! Operations of one connection run one at a time, in order of arrival; those
//! of different connections do not wait for each other (NSM's `begin`). Two
//! connections can have one lease, since the lease is named by the target: a
//! killed target that comes back through another nsmgr leaves its old
//! connection behind. A lease is released when the last holder is gone
//! (Meridio issue 584).

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Instant;

use super::ids::{IfName, LeaseId, SegmentId};

/// All connections; `J` is an operation, `C` what is kept of a connection.
#[derive(Debug)]
pub struct Targets<J, C> {
    entries: BTreeMap<SegmentId, Entry<J, C>>,
    /// Leases that a closed connection left to another holder, which has to
    /// release them if it does not come up.
    owed: BTreeSet<LeaseId>,
}

#[derive(Debug)]
struct Entry<J, C> {
    waiting: VecDeque<J>,
    running: bool,
    asking: Option<Claim>,
    up: Option<Up<C>>,
    /// The expiry of `up` was handed out and not answered by a refresh.
    expiring: bool,
}

/// What a running Request will hold if it succeeds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Claim {
    /// The lease.
    pub lease: LeaseId,
    /// The interface, unless the mechanism has none.
    pub ifname: Option<IfName>,
}

/// A connection that is up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Up<C> {
    /// Its lease and interface.
    pub claim: Claim,
    /// The connection as the endpoint sees it.
    pub connection: C,
    /// When it is closed unless it is refreshed.
    pub expires: Instant,
}

/// A connection that was closed.
#[derive(Debug, PartialEq, Eq)]
#[must_use]
pub struct Closed<C> {
    /// What it was.
    pub up: Up<C>,
    /// The lease to release: nobody else holds it.
    pub release: Option<LeaseId>,
}

impl<J, C> Default for Targets<J, C> {
    fn default() -> Self {
        Self {
            entries: BTreeMap::new(),
            owed: BTreeSet::new(),
        }
    }
}

impl<J, C> Targets<J, C> {
    /// An operation arrived: returned if it shall run now, else kept until
    /// those before it have [finished](Self::finish).
    #[must_use]
    pub fn arrive(&mut self, id: &SegmentId, job: J) -> Option<J> {
        let entry = self.entries.entry(id.clone()).or_insert_with(|| Entry {
            waiting: VecDeque::new(),
            running: false,
            asking: None,
            up: None,
            expiring: false,
        });
        if entry.running {
            entry.waiting.push_back(job);
            return None;
        }
        entry.running = true;
        Some(job)
    }

    /// The running operation ended; returns the one that shall run now. A
    /// connection that is not up and has nothing to do is forgotten.
    #[must_use]
    pub fn finish(&mut self, id: &SegmentId) -> Option<J> {
        let entry = self.entries.get_mut(id)?;
        if let Some(next) = entry.waiting.pop_front() {
            return Some(next);
        }
        entry.running = false;
        if entry.up.is_none() {
            self.entries.remove(id);
        }
        None
    }

    /// The running Request asks for `claim`, which counts as held until it
    /// comes up or is given up. False, and nothing is changed, when another
    /// connection has the interface.
    #[must_use]
    pub fn ask(&mut self, id: &SegmentId, claim: Claim) -> bool {
        let taken = claim
            .ifname
            .as_ref()
            .is_some_and(|name| self.is_taken(id, name));
        if let (false, Some(entry)) = (taken, self.entries.get_mut(id)) {
            entry.asking = Some(claim);
        }
        !taken
    }

    /// Whether a connection other than `id` has, or asks for, the interface.
    #[must_use]
    pub fn is_taken(&self, id: &SegmentId, name: &IfName) -> bool {
        self.entries
            .iter()
            .filter(|(other, _)| *other != id)
            .any(|(_, entry)| {
                entry
                    .claims()
                    .any(|claim| claim.ifname.as_ref() == Some(name))
            })
    }

    /// The running Request succeeded with what it asked for. Returns a lease
    /// to release: the one held before, if it was another.
    #[must_use]
    pub fn establish(
        &mut self,
        id: &SegmentId,
        connection: C,
        expires: Instant,
    ) -> Option<LeaseId> {
        let entry = self.entries.get_mut(id)?;
        let claim = entry.asking.take()?;
        self.owed.remove(&claim.lease);
        entry.expiring = false;
        let before = entry.up.replace(Up {
            claim,
            connection,
            expires,
        });
        self.unless_held(before?.claim.lease)
    }

    /// The running Request failed: a connection that was up stays as it was.
    /// Returns a lease to release: one that a closed connection left to this
    /// Request. A lease that was only asked for is not released: after a
    /// restart of this process its target may still be using it.
    #[must_use]
    pub fn give_up(&mut self, id: &SegmentId) -> Option<LeaseId> {
        let claim = self.entries.get_mut(id)?.asking.take()?;
        if !self.owed.contains(&claim.lease) || self.is_held(&claim.lease) {
            return None;
        }
        self.owed.remove(&claim.lease);
        Some(claim.lease)
    }

    /// Closes a connection that is up.
    pub fn close(&mut self, id: &SegmentId) -> Option<Closed<C>> {
        let entry = self.entries.get_mut(id)?;
        let up = entry.up.take()?;
        entry.expiring = false;
        let release = self.unless_held(up.claim.lease.clone());
        Some(Closed { up, release })
    }

    /// The connection, if it is up.
    #[must_use]
    pub fn up(&self, id: &SegmentId) -> Option<&Up<C>> {
        self.entries.get(id)?.up.as_ref()
    }

    /// All connections that are up.
    pub fn iter(&self) -> impl Iterator<Item = (&SegmentId, &Up<C>)> {
        self.entries
            .iter()
            .filter_map(|(id, entry)| entry.up.as_ref().map(|up| (id, up)))
    }

    /// How many connections are known, up or with something to do.
    #[must_use]
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether none is known.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }

    /// The connections that expired, each told once; the caller lets an
    /// operation [arrive](Self::arrive) that closes it if it
    /// [still is expired](Self::is_expiring) then.
    #[must_use]
    pub fn take_expired(&mut self, now: Instant) -> Vec<SegmentId> {
        let mut expired = Vec::new();
        for (id, entry) in &mut self.entries {
            let over = entry.up.as_ref().is_some_and(|up| up.expires <= now);
            if over && !entry.expiring {
                entry.expiring = true;
                expired.push(id.clone());
            }
        }
        expired
    }

    /// Whether the connection expired and was not refreshed since.
    #[must_use]
    pub fn is_expiring(&self, id: &SegmentId) -> bool {
        self.entries.get(id).is_some_and(|entry| entry.expiring)
    }

    /// When [`Targets::take_expired`] has something to tell next.
    #[must_use]
    pub fn next_expiry(&self) -> Option<Instant> {
        self.entries
            .values()
            .filter(|entry| !entry.expiring)
            .filter_map(|entry| entry.up.as_ref().map(|up| up.expires))
            .min()
    }

    /// Whether a connection has, or asks for, the lease.
    #[must_use]
    pub fn is_held(&self, lease: &LeaseId) -> bool {
        self.entries
            .values()
            .flat_map(Entry::claims)
            .any(|claim| claim.lease == *lease)
    }

    fn unless_held(&mut self, lease: LeaseId) -> Option<LeaseId> {
        if self.is_held(&lease) {
            self.owed.insert(lease);
            return None;
        }
        self.owed.remove(&lease);
        Some(lease)
    }
}

impl<J, C> Entry<J, C> {
    fn claims(&self) -> impl Iterator<Item = &Claim> {
        self.asking
            .iter()
            .chain(self.up.as_ref().map(|up| &up.claim))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use proptest::prelude::*;

    use super::*;

    #[expect(clippy::disallowed_methods, reason = "any origin of virtual time")]
    fn start() -> Instant {
        Instant::now()
    }

    fn id(text: &str) -> SegmentId {
        SegmentId::new(text)
    }

    fn claim(lease: &str, ifname: &str) -> Claim {
        Claim {
            lease: LeaseId::new(lease),
            ifname: Some(IfName::parse(ifname).unwrap()),
        }
    }

    /// Runs a whole Request that succeeds.
    fn connect(
        targets: &mut Targets<u8, ()>,
        who: &str,
        lease: &str,
        at: Instant,
    ) -> Option<LeaseId> {
        let who_id = id(who);
        assert_eq!(targets.arrive(&who_id, 0), Some(0));
        assert!(targets.ask(&who_id, claim(lease, who)));
        let release = targets.establish(&who_id, (), at);
        assert_eq!(targets.finish(&who_id), None);
        release
    }

    #[test]
    fn the_last_holder_releases_a_lease() {
        let t = start();
        let mut targets = Targets::default();
        assert_eq!(connect(&mut targets, "old", "L", t), None);
        assert_eq!(connect(&mut targets, "new", "L", t), None);
        assert_eq!(targets.close(&id("old")).unwrap().release, None);
        assert!(targets.close(&id("old")).is_none());
        let closed = targets.close(&id("new")).unwrap();
        assert_eq!(closed.release, Some(LeaseId::new("L")));
        assert_eq!(closed.up.claim, claim("L", "new"));
    }

    #[test]
    fn a_running_request_holds_its_lease() {
        let t = start();
        let mut targets = Targets::default();
        connect(&mut targets, "old", "L", t);
        assert_eq!(targets.arrive(&id("new"), 1), Some(1));
        assert!(targets.ask(&id("new"), claim("L", "new")));
        assert_eq!(targets.close(&id("old")).unwrap().release, None);
        // It fails: the lease that the closed one left is released now.
        assert_eq!(targets.give_up(&id("new")), Some(LeaseId::new("L")));
        assert_eq!(targets.give_up(&id("new")), None);
    }

    #[test]
    fn a_failed_request_of_an_unknown_connection_releases_nothing() {
        let mut targets: Targets<u8, ()> = Targets::default();
        let _ = targets.arrive(&id("a"), 0);
        assert!(targets.ask(&id("a"), claim("L", "a")));
        assert_eq!(targets.give_up(&id("a")), None);
        assert_eq!(targets.finish(&id("a")), None);
        assert!(targets.is_empty());
    }

    #[test]
    fn close_then_request_keeps_the_lease_or_pays_it_back() {
        let t = start();
        for succeeds in [true, false] {
            let mut targets = Targets::default();
            connect(&mut targets, "a", "L", t);
            let _ = targets.arrive(&id("a"), 1);
            assert!(targets.ask(&id("a"), claim("L", "b")));
            assert_eq!(targets.close(&id("a")).unwrap().release, None);
            if succeeds {
                assert_eq!(targets.establish(&id("a"), (), t), None);
                assert_eq!(targets.give_up(&id("a")), None);
                let release = targets.close(&id("a")).unwrap().release;
                assert_eq!(release, Some(LeaseId::new("L")));
            } else {
                assert_eq!(targets.give_up(&id("a")), Some(LeaseId::new("L")));
            }
        }
    }

    #[test]
    fn a_connection_that_changes_its_lease_releases_the_old_one() {
        let t = start();
        let mut targets = Targets::default();
        connect(&mut targets, "a", "L", t);
        assert_eq!(connect(&mut targets, "a", "M", t), Some(LeaseId::new("L")));
        assert_eq!(connect(&mut targets, "a", "M", t), None);
    }

    #[test]
    fn interfaces_are_unique() {
        let t = start();
        let mut targets = Targets::default();
        connect(&mut targets, "a", "L", t);
        let _ = targets.arrive(&id("b"), 0);
        assert!(!targets.ask(&id("b"), claim("M", "a")));
        assert!(targets.ask(&id("b"), claim("M", "b")));
        assert!(targets.is_taken(&id("c"), &IfName::parse("b").unwrap()));
        let _ = targets.arrive(&id("a"), 0);
        assert!(targets.ask(&id("a"), claim("L", "a")), "its own");
    }

    #[test]
    fn expiry_is_told_once_and_undone_by_a_refresh() {
        let t = start();
        let later = t + Duration::from_secs(10);
        let mut targets = Targets::default();
        connect(&mut targets, "a", "L", t);
        connect(&mut targets, "b", "M", later);
        assert_eq!(targets.next_expiry(), Some(t));
        assert_eq!(targets.take_expired(t), [id("a")]);
        assert!(targets.take_expired(t).is_empty());
        assert_eq!(targets.next_expiry(), Some(later));
        assert!(targets.is_expiring(&id("a")));
        connect(&mut targets, "a", "L", later);
        assert!(!targets.is_expiring(&id("a")));
        assert_eq!(targets.take_expired(later), [id("a"), id("b")]);
    }

    proptest! {
        /// Operations of one connection run in order of arrival, one at a
        /// time; those of others never wait for it.
        #[test]
        fn order_within_parallel_between(script in prop::collection::vec((0u8..4, any::<bool>()), 0..200)) {
            let mut targets: Targets<usize, ()> = Targets::default();
            let mut arrived: BTreeMap<u8, Vec<usize>> = BTreeMap::new();
            let mut begun: BTreeMap<u8, Vec<usize>> = BTreeMap::new();
            let mut running: BTreeSet<u8> = BTreeSet::new();
            for (job, (who, arrives)) in script.into_iter().enumerate() {
                let name = id(&who.to_string());
                if arrives {
                    arrived.entry(who).or_default().push(job);
                    let now = targets.arrive(&name, job);
                    prop_assert_eq!(now.is_some(), running.insert(who));
                    begun.entry(who).or_default().extend(now);
                } else if running.contains(&who) {
                    match targets.finish(&name) {
                        Some(next) => begun.entry(who).or_default().push(next),
                        None => { running.remove(&who); }
                    }
                }
            }
            for who in running {
                while let Some(next) = targets.finish(&id(&who.to_string())) {
                    begun.entry(who).or_default().push(next);
                }
            }
            begun.retain(|_, jobs| !jobs.is_empty());
            prop_assert_eq!(arrived, begun);
            prop_assert!(targets.is_empty(), "nothing is kept of connections that are not up");
        }

        /// Whatever happens, a lease is released exactly when its last holder
        /// that was ever up goes, and never while somebody holds it.
        #[test]
        fn leases_are_released_once(script in prop::collection::vec((0u8..3, 0u8..2, 0u8..4), 0..200)) {
            let t = start();
            let mut targets: Targets<u8, ()> = Targets::default();
            let mut asking: BTreeMap<u8, u8> = BTreeMap::new();
            let mut up: BTreeMap<u8, u8> = BTreeMap::new();
            // Leases that were up at some time and not released since.
            let mut live: BTreeSet<u8> = BTreeSet::new();
            for (who, lease, step) in script {
                let name = id(&who.to_string());
                let release = match step {
                    0 => {
                        if asking.contains_key(&who) { continue; }
                        let _ = targets.arrive(&name, 0);
                        let asked = claim(&lease.to_string(), &format!("i{who}"));
                        prop_assert!(targets.ask(&name, asked));
                        asking.insert(who, lease);
                        None
                    }
                    1 => {
                        let Some(lease) = asking.remove(&who) else { continue };
                        up.insert(who, lease);
                        live.insert(lease);
                        let release = targets.establish(&name, (), t);
                        let _ = targets.finish(&name);
                        release
                    }
                    2 => {
                        if asking.remove(&who).is_none() { continue }
                        let release = targets.give_up(&name);
                        let _ = targets.finish(&name);
                        release
                    }
                    _ => {
                        up.remove(&who);
                        targets.close(&name).and_then(|closed| closed.release)
                    }
                };
                let held: BTreeSet<u8> = asking.values().chain(up.values()).copied().collect();
                let due: BTreeSet<u8> = live.difference(&held).copied().collect();
                let released: BTreeSet<u8> =
                    release.iter().map(|lease| lease.as_str().parse().unwrap()).collect();
                prop_assert_eq!(&due, &released);
                for lease in due { live.remove(&lease); }
            }
        }
    }
}
