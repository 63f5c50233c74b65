//! Which load balancers exist: the registry's answers, as connections that
//! shall be made and ended.
//!
//! The registry repeats itself, loses deletions, may end its stream every few
//! seconds, and a registry that was restarted forgets endpoints that are well.
//! So an endpoint goes only when it is said to be deleted, or when its
//! registration has been expired for [`GRACE`] **and** a list that was asked
//! for after that does not show it renewed. Absence alone proves nothing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::ids::EndpointName;

/// How long an endpoint outlives its registration before the registry is asked
/// whether it is really gone.
pub const GRACE: Duration = Duration::from_secs(90);

/// Pause between two full lists while nothing is suspected. Some registries
/// show a new endpoint only to a query that starts later.
pub const LIST_INTERVAL: Duration = Duration::from_secs(60);

/// Pause before a list is asked for again that failed, or was not enough.
const LIST_RETRY: Duration = Duration::from_secs(10);

/// Two ends of a registration that are closer than this are the same: they
/// were carried over from the wall clock at different moments.
const SAME: Duration = Duration::from_secs(1);

/// Endpoints that are connected at most: each costs a thread, and a registry
/// must not be able to exhaust them.
pub const MOST: usize = 512;

/// Longest name that is taken, in bytes.
const NAME_MAX: usize = 253;

/// What an answer of the registry says of one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sighting {
    /// The endpoint's name, as sent.
    pub name: String,
    /// When its registration ends; may be past. `None`: it has no end, which
    /// the registry uses for endpoints that are gone.
    pub expires: Option<Instant>,
    /// The registry said that it is deleted.
    pub deleted: bool,
}

/// What shall be done.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub enum MeshAction {
    /// Start a session for this LB.
    Connect(EndpointName),
    /// Stop the session of this LB; tell [`Mesh::ended`] when it is over.
    Disconnect(EndpointName, Gone),
}

/// Why an LB is taken to be gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Gone {
    /// The registry said so.
    Deleted,
    /// Its registration expired and was not renewed.
    Expired,
}

impl std::fmt::Display for Gone {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Deleted => "deleted from the registry",
            Self::Expired => "its registration expired and was not renewed",
        })
    }
}

/// Why a sighting was not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Refused {
    /// The name is empty, too long, or has blanks, control or non-ASCII
    /// characters.
    Name,
    /// There are [`MOST`] endpoints already.
    TooMany,
}

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Name => write!(f, "the name is not 1 to {NAME_MAX} printable ASCII bytes"),
            Self::TooMany => write!(f, "{MOST} load balancers are connected already"),
        }
    }
}

#[derive(Debug)]
enum Entry {
    Connected {
        /// The end of the registration as last told.
        expires: Instant,
        /// From then on a list that does not renew it is its end.
        doubtful_at: Instant,
    },
    /// Its session is closing; `again` when the endpoint was seen meanwhile.
    /// Two sessions must never share the connection's id.
    Closing { again: Option<Instant> },
}

/// The set of LBs, owned by `lb-watch`.
#[derive(Debug)]
pub struct Mesh {
    entries: BTreeMap<EndpointName, Entry>,
    /// When the next list is due although nothing is suspected.
    list_at: Instant,
    /// A doubt does not make a list due before this.
    not_before: Instant,
    /// When the list that is under way was asked for.
    listing_since: Option<Instant>,
}

impl Mesh {
    /// No LB yet; the first list is due after an interval, since the watch
    /// stream starts with one.
    #[must_use]
    pub fn new(now: Instant) -> Self {
        Self {
            entries: BTreeMap::new(),
            list_at: now + LIST_INTERVAL,
            not_before: now,
            listing_since: None,
        }
    }

    /// The LBs that are, or shall be, connected.
    pub fn names(&self) -> impl Iterator<Item = &EndpointName> {
        self.entries
            .iter()
            .filter(|(_, entry)| !matches!(entry, Entry::Closing { again: None }))
            .map(|(name, _)| name)
    }

    /// Takes one answer of the registry.
    ///
    /// # Errors
    ///
    /// When the endpoint is not to be connected.
    pub fn seen(
        &mut self,
        sighting: &Sighting,
        now: Instant,
    ) -> Result<Option<MeshAction>, Refused> {
        if !is_usable(&sighting.name) {
            return Err(Refused::Name);
        }
        let name = EndpointName::new(sighting.name.as_str());
        match sighting.expires {
            Some(expires) if !sighting.deleted => self.alive(name, expires, now),
            _ => Ok(self.gone(&name, Gone::Deleted)),
        }
    }

    fn alive(
        &mut self,
        name: EndpointName,
        expires: Instant,
        now: Instant,
    ) -> Result<Option<MeshAction>, Refused> {
        let full = self.entries.len() >= MOST;
        match self.entries.get_mut(&name) {
            Some(Entry::Connected {
                expires: known,
                doubtful_at,
            }) => {
                // A later end is a sign of life even if it is past by our
                // clock: clocks differ.
                if expires > *known + SAME {
                    *known = expires;
                    *doubtful_at = expires.max(now) + GRACE;
                }
                Ok(None)
            }
            Some(Entry::Closing { again }) => {
                *again = Some(expires);
                Ok(None)
            }
            None if full => Err(Refused::TooMany),
            None => Ok(Some(self.connect(name, expires, now))),
        }
    }

    fn connect(&mut self, name: EndpointName, expires: Instant, now: Instant) -> MeshAction {
        let entry = Entry::Connected {
            expires,
            doubtful_at: expires.max(now) + GRACE,
        };
        self.entries.insert(name.clone(), entry);
        MeshAction::Connect(name)
    }

    fn gone(&mut self, name: &EndpointName, why: Gone) -> Option<MeshAction> {
        let entry = self.entries.get_mut(name)?;
        match entry {
            Entry::Connected { .. } => {
                *entry = Entry::Closing { again: None };
                Some(MeshAction::Disconnect(name.clone(), why))
            }
            Entry::Closing { again } => {
                *again = None;
                None
            }
        }
    }

    /// The session of `name` is over.
    pub fn ended(&mut self, name: &EndpointName, now: Instant) -> Option<MeshAction> {
        match self.entries.remove(name)? {
            Entry::Closing {
                again: Some(expires),
            } => Some(self.connect(name.clone(), expires, now)),
            _ => None,
        }
    }

    /// When [`Mesh::list_due`] has to be asked again.
    #[must_use]
    pub fn next_deadline(&self) -> Instant {
        let doubt = self.entries.values().filter_map(|entry| match entry {
            Entry::Connected { doubtful_at, .. } => Some(*doubtful_at),
            Entry::Closing { .. } => None,
        });
        doubt.fold(self.list_at, |at, doubtful| {
            at.min(doubtful.max(self.not_before))
        })
    }

    /// Whether the registry shall be asked for the full list now; notes that
    /// it is. Nothing is due while a list is under way.
    pub fn list_due(&mut self, now: Instant) -> bool {
        if self.listing_since.is_some() || self.next_deadline() > now {
            return false;
        }
        self.listing_since = Some(now);
        self.list_at = now + LIST_INTERVAL;
        self.not_before = now + LIST_RETRY;
        true
    }

    /// Whether a list is under way.
    #[must_use]
    pub fn is_listing(&self) -> bool {
        self.listing_since.is_some()
    }

    /// The list that was due has been told to the end through [`Mesh::seen`]:
    /// what was doubtful before it began, and was not renewed, is gone.
    pub fn listed(&mut self) -> Vec<MeshAction> {
        let Some(since) = self.listing_since.take() else {
            return Vec::new();
        };
        let expired: Vec<EndpointName> = self
            .entries
            .iter()
            .filter(|(_, entry)| {
                matches!(entry, Entry::Connected { doubtful_at, .. } if *doubtful_at <= since)
            })
            .map(|(name, _)| name.clone())
            .collect();
        expired
            .iter()
            .filter_map(|name| self.gone(name, Gone::Expired))
            .collect()
    }

    /// The list failed half-way, so it proves nothing.
    pub fn list_failed(&mut self, now: Instant) {
        self.listing_since = None;
        self.not_before = now + LIST_RETRY;
        self.list_at = self.list_at.min(self.not_before);
    }
}

/// Names appear in connection ids, log lines and the path: nothing but
/// printable ASCII without blanks gets in.
fn is_usable(name: &str) -> bool {
    !name.is_empty() && name.len() <= NAME_MAX && name.bytes().all(|byte| byte.is_ascii_graphic())
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    struct Registry {
        mesh: Mesh,
        zero: Instant,
    }

    impl Registry {
        #[expect(clippy::disallowed_methods, reason = "the start of virtual time")]
        fn new() -> Self {
            let zero = Instant::now();
            Self {
                mesh: Mesh::new(zero),
                zero,
            }
        }

        fn at(&self, second: u32) -> Instant {
            self.zero + SECOND * second
        }

        /// At `second` the registry shows `name` until `expires`.
        fn shows(&mut self, second: u32, name: &str, expires: u32) -> Option<MeshAction> {
            let sighting = Sighting {
                name: name.to_owned(),
                expires: Some(self.at(expires)),
                deleted: false,
            };
            self.mesh.seen(&sighting, self.at(second)).unwrap()
        }

        fn deletes(&mut self, second: u32, name: &str) -> Option<MeshAction> {
            let sighting = Sighting {
                name: name.to_owned(),
                expires: Some(self.at(second + 60)),
                deleted: true,
            };
            self.mesh.seen(&sighting, self.at(second)).unwrap()
        }
    }

    fn connect(name: &str) -> Option<MeshAction> {
        Some(MeshAction::Connect(EndpointName::new(name)))
    }

    fn disconnect(name: &str, why: Gone) -> Option<MeshAction> {
        Some(MeshAction::Disconnect(EndpointName::new(name), why))
    }

    #[test]
    fn repeated_sightings_connect_once_and_a_deletion_ends() {
        let mut r = Registry::new();
        assert_eq!(r.shows(0, "a", 60), connect("a"));
        assert_eq!(r.shows(0, "a", 60), None);
        assert_eq!(r.shows(1, "b", 60), connect("b"));
        assert_eq!(r.deletes(2, "a"), disconnect("a", Gone::Deleted));
        assert_eq!(r.deletes(2, "a"), None);
        assert_eq!(r.deletes(2, "never-seen"), None);
        assert_eq!(r.mesh.names().count(), 1);
        assert_eq!(r.deletes(3, "b"), disconnect("b", Gone::Deleted));
        assert_eq!(r.mesh.names().count(), 0);
        let now = r.at(4);
        assert_eq!(r.mesh.ended(&EndpointName::new("b"), now), None);
    }

    #[test]
    fn an_endpoint_without_an_end_is_gone() {
        let mut r = Registry::new();
        let _ = r.shows(0, "a", 60);
        let sighting = Sighting {
            name: "a".to_owned(),
            expires: None,
            deleted: false,
        };
        let now = r.at(1);
        assert_eq!(
            r.mesh.seen(&sighting, now),
            Ok(disconnect("a", Gone::Deleted))
        );
    }

    #[test]
    fn an_endpoint_that_returns_waits_for_the_close_of_its_old_session() {
        let mut r = Registry::new();
        let a = EndpointName::new("a");
        let _ = r.shows(0, "a", 60);
        let _ = r.deletes(1, "a");
        assert_eq!(r.shows(2, "a", 90), None);
        let now = r.at(3);
        assert_eq!(r.mesh.ended(&a, now), connect("a"));
        let _ = r.deletes(4, "a");
        let _ = r.shows(5, "a", 90);
        assert_eq!(r.deletes(6, "a"), None, "gone again before the close ended");
        assert_eq!(r.mesh.ended(&a, now), None);
        assert_eq!(r.mesh.names().count(), 0);
        assert_eq!(r.mesh.ended(&a, now), None);
    }

    #[test]
    fn expiry_needs_grace_and_a_fresh_list() {
        let mut r = Registry::new();
        let _ = r.shows(0, "a", 30);
        let _ = r.shows(0, "b", 600);
        // Periodic lists that begin before the grace is over prove nothing.
        let t = r.at(60);
        assert!(r.mesh.list_due(t) && !r.mesh.list_due(t));
        assert!(r.mesh.listed().is_empty());
        let t = r.at(120);
        assert_eq!(r.mesh.next_deadline(), t, "30 s plus the grace");
        assert!(r.mesh.list_due(t));
        assert_eq!(r.shows(120, "b", 600), None);
        assert_eq!(
            r.mesh.listed(),
            vec![disconnect("a", Gone::Expired).unwrap()]
        );
    }

    #[test]
    fn a_renewal_in_the_list_saves_and_absence_alone_proves_nothing() {
        let mut r = Registry::new();
        let _ = r.shows(0, "a", 30);
        let _ = r.shows(0, "absent", 3600);
        let t = r.at(120);
        assert!(r.mesh.list_due(t));
        assert_eq!(r.shows(121, "a", 180), None);
        assert!(r.mesh.listed().is_empty());
        assert_eq!(r.mesh.names().count(), 2);
    }

    #[test]
    fn a_renewal_by_a_clock_that_is_behind_is_a_sign_of_life() {
        let mut r = Registry::new();
        let base = r.zero;
        let _ = r.shows(200, "a", 100);
        for k in 0..10u32 {
            // Always expired by our clock, but renewed every 40 s.
            assert_eq!(r.shows(240 + 40 * k, "a", 140 + 40 * k), None);
            let t = base + SECOND * (241 + 40 * k);
            if r.mesh.list_due(t) {
                assert!(r.mesh.listed().is_empty());
            }
        }
        // The same end, carried over a moment later, is none.
        let mut r = Registry::new();
        let _ = r.shows(200, "a", 100);
        let sighting = Sighting {
            name: "a".to_owned(),
            expires: Some(r.at(100) + Duration::from_micros(30)),
            deleted: false,
        };
        let t = r.at(289);
        let _ = r.mesh.seen(&sighting, t);
        let t = r.at(290);
        assert!(r.mesh.list_due(t));
        assert_eq!(r.mesh.listed().len(), 1);
    }

    #[test]
    fn a_failed_list_proves_nothing_and_is_not_repeated_at_once() {
        let mut r = Registry::new();
        let _ = r.shows(0, "a", 10);
        let t = r.at(100);
        assert!(r.mesh.list_due(t));
        r.mesh.list_failed(t);
        assert!(r.mesh.listed().is_empty());
        let soon = r.at(109);
        assert!(!r.mesh.list_due(soon));
        let later = r.at(110);
        assert_eq!(r.mesh.next_deadline(), later);
        assert!(r.mesh.list_due(later));
        assert_eq!(r.mesh.listed().len(), 1);
    }

    #[test]
    fn hostile_names_and_floods_are_refused() {
        let mut r = Registry::new();
        let now = r.at(0);
        let long = "x".repeat(NAME_MAX + 1);
        for name in ["", "a b", "a\nb", "\u{1b}[0m", "é", long.as_str()] {
            let sighting = Sighting {
                name: name.to_owned(),
                expires: Some(now),
                deleted: false,
            };
            assert_eq!(r.mesh.seen(&sighting, now), Err(Refused::Name), "{name:?}");
        }
        for n in 0..MOST {
            assert!(r.shows(0, &format!("lb-{n}"), 60).is_some());
        }
        let sighting = Sighting {
            name: "one-more".to_owned(),
            expires: Some(r.at(60)),
            deleted: false,
        };
        assert_eq!(r.mesh.seen(&sighting, now), Err(Refused::TooMany));
    }
}
