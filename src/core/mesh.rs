//! Which load balancers exist: the registry's answers, as connections that
//! shall be made and ended.
//!
//! The registry repeats itself, loses deletions, may end its stream every few
//! seconds, and a registry that was restarted forgets endpoints that are well.
//! So an endpoint goes only when it is said to be deleted, or when its
//! registration has been expired for [`GRACE`] **and** a list that was asked
//! for after that does not show it renewed. Absence alone proves nothing.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use super::ids::EndpointName;

/// How long an endpoint outlives its registration before the registry is asked
/// whether it is really gone.
pub const GRACE: Duration = Duration::from_secs(90);

/// Pause between two full lists while nothing is suspected. Some registries
/// show a new endpoint only to a query that starts later.
pub const LIST_INTERVAL: Duration = Duration::from_secs(60);

/// Pause before a list is asked for again that failed, or was not enough.
const LIST_RETRY: Duration = Duration::from_secs(10);

/// Endpoints that are connected at most: each costs a thread, and a registry
/// must not be able to exhaust them.
pub const MOST: usize = 512;

/// Longest name that is taken, in bytes.
const NAME_MAX: usize = 253;

/// The end of a registration.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Expiry {
    /// As the registry told it. Ends are compared by this, so that a step of
    /// our wall clock makes no renewal look like old news.
    pub told: SystemTime,
    /// Carried over to the monotonic clock; may be past.
    pub at: Instant,
}

/// What an answer of the registry says of one endpoint.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sighting {
    /// The endpoint's name, as sent.
    pub name: String,
    /// When its registration ends. `None`: it has no end, which the registry
    /// uses for endpoints that are gone.
    pub expires: Option<Expiry>,
    /// The registry said that it is deleted.
    pub deleted: bool,
    /// Stands for the registration's address and first time: differs when another
    /// process is registered under the name. Kept for each LB, so it is no text
    /// of the peer's.
    pub incarnation: u64,
}

/// What shall be done.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub enum MeshAction {
    /// Start a session for this LB.
    Connect(EndpointName),
    /// Stop the session of this LB; tell [`Mesh::ended`] when it is over.
    Disconnect(EndpointName, Gone),
    /// Tell the session of this LB that another process has its name now: what
    /// waits for the one before waits in vain.
    Replaced(EndpointName),
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
        /// The latest end of the registration that was told.
        told: SystemTime,
        /// From then on a list that does not renew it is its end.
        doubtful_at: Instant,
        incarnation: u64,
    },
    /// Its session is closing; `again` when the endpoint was seen meanwhile.
    /// Two sessions must never share the connection's id.
    Closing { again: Option<Registered> },
}

/// A registration that has an end.
#[derive(Debug, Clone, Copy)]
struct Registered {
    expires: Expiry,
    incarnation: u64,
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
            Some(expires) if !sighting.deleted => {
                let registered = Registered {
                    expires,
                    incarnation: sighting.incarnation,
                };
                self.alive(name, registered, now)
            }
            _ => Ok(self.gone(&name, Gone::Deleted)),
        }
    }

    fn alive(
        &mut self,
        name: EndpointName,
        registered: Registered,
        now: Instant,
    ) -> Result<Option<MeshAction>, Refused> {
        let Registered {
            expires,
            incarnation,
        } = registered;
        let full = self.entries.len() >= MOST;
        match self.entries.get_mut(&name) {
            Some(Entry::Connected {
                told: known,
                doubtful_at,
                incarnation: before,
            }) => {
                // A list and the stream may cross, so an older one is no news.
                let is_news = expires.told >= *known && incarnation != *before;
                // A later end is a sign of life even if it is past by our
                // clock: clocks differ.
                if expires.told > *known {
                    *known = expires.told;
                    *doubtful_at = expires.at.max(now) + GRACE;
                }
                if is_news {
                    *before = incarnation;
                }
                Ok(is_news.then_some(MeshAction::Replaced(name)))
            }
            Some(Entry::Closing { again }) => {
                let is_news = again.replace(registered).is_none();
                Ok(is_news.then_some(MeshAction::Replaced(name)))
            }
            None if full => Err(Refused::TooMany),
            None => Ok(Some(self.connect(name, registered, now))),
        }
    }

    fn connect(&mut self, name: EndpointName, new: Registered, now: Instant) -> MeshAction {
        let entry = Entry::Connected {
            told: new.expires.told,
            doubtful_at: new.expires.at.max(now) + GRACE,
            incarnation: new.incarnation,
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
                again: Some(registered),
            } => Some(self.connect(name.clone(), registered, now)),
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
mod tests;
