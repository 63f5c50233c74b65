//! Which VIPs are taken over from NSP, and which are refused. Owned by the
//! `vip-watch` thread.
//!
//! NSP sends the full list of a trench's VIPs at the begin of each stream and
//! at every change (Meridio v1.2.8, pkg/configuration/manager/watcher.go:111).
//! An NSP that was just restarted may send an empty list before it has read
//! its configuration; such a list, at the begin of a stream, is held back for
//! [`HOLD`], so that traffic does not stop for it.

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use ipnetwork::IpNetwork;

use super::family::Family;

/// How long an empty list at the begin of a stream is held back.
pub const HOLD: Duration = Duration::from_secs(5);
/// Refused VIPs of one list that are named one by one.
const NAMED_MAX: usize = 10;

/// What the worker shall do.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub enum VipAction {
    /// Tell `net` this set: it differs from what was told before.
    Tell(BTreeSet<IpNetwork>),
    /// Warn of a VIP that is refused; comes once for as long as it is listed.
    Refused {
        /// NSP's text.
        text: String,
        /// Why.
        fault: VipFault,
    },
    /// Warn that this many more were refused.
    RefusedMore(usize),
    /// Log that an empty list is held back for [`HOLD`].
    Held,
}

/// Why a text is no VIP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VipFault {
    /// Not an address, a slash and a prefix length.
    NoPrefix,
    /// All addresses of a family: a rule for it would catch the pod's own
    /// traffic.
    Everything,
}

impl fmt::Display for VipFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NoPrefix => "it is not of the form address/length",
            Self::Everything => "a prefix length of 0 would catch all traffic of the pod",
        })
    }
}

/// Reads a VIP and masks its host part.
///
/// # Errors
///
/// [`VipFault`].
pub fn parse(text: &str) -> Result<IpNetwork, VipFault> {
    let (address, length) = text.split_once('/').ok_or(VipFault::NoPrefix)?;
    let address: IpAddr = address.parse().map_err(|_| VipFault::NoPrefix)?;
    // `parse` alone would take a sign, too.
    if !length.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(VipFault::NoPrefix);
    }
    let length: u8 = length.parse().map_err(|_| VipFault::NoPrefix)?;
    let masked = |address| IpNetwork::new(address, length).map_err(|_| VipFault::NoPrefix);
    if length == 0 {
        return Err(VipFault::Everything);
    }
    if length > Family::from(address).bits() {
        return Err(VipFault::NoPrefix);
    }
    masked(masked(address)?.network())
}

/// The lists of one trench.
#[derive(Debug, Default)]
pub struct VipBook {
    /// `None` until the first list was told; a predecessor's rules may be in
    /// the kernel then.
    told: Option<BTreeSet<IpNetwork>>,
    refused: BTreeSet<String>,
    is_first_of_stream: bool,
    held_until: Option<Instant>,
}

impl VipBook {
    /// Nothing told yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A stream begins.
    pub fn opened(&mut self) {
        self.is_first_of_stream = true;
    }

    /// The stream ended. What was told stays; a list that was held back is
    /// forgotten, since the next stream begins with a list of its own.
    pub fn ended(&mut self) {
        self.held_until = None;
    }

    /// NSP sent a list.
    pub fn received<'a>(
        &mut self,
        list: impl IntoIterator<Item = &'a str>,
        now: Instant,
    ) -> Vec<VipAction> {
        let mut vips = BTreeSet::new();
        let mut refused = BTreeSet::new();
        let mut actions = Vec::new();
        let mut more = 0;
        for text in list {
            match parse(text) {
                Ok(vip) => {
                    vips.insert(vip);
                }
                Err(fault) => {
                    let is_new = refused.insert(text.to_owned()) && !self.refused.contains(text);
                    if is_new && actions.len() < NAMED_MAX {
                        actions.push(VipAction::Refused {
                            text: text.to_owned(),
                            fault,
                        });
                    } else if is_new {
                        more += 1;
                    }
                }
            }
        }
        if more > 0 {
            actions.push(VipAction::RefusedMore(more));
        }
        self.refused = refused;
        actions.extend(self.changed(vips, now));
        actions
    }

    /// Tells a list that was held back long enough; to be called at
    /// [`VipBook::next_deadline`].
    pub fn tick(&mut self, now: Instant) -> Option<VipAction> {
        if self.held_until.is_some_and(|until| until <= now) {
            self.held_until = None;
            return self.tell(BTreeSet::new());
        }
        None
    }

    /// When [`VipBook::tick`] is to be called.
    #[must_use]
    pub fn next_deadline(&self) -> Option<Instant> {
        self.held_until
    }

    fn changed(&mut self, vips: BTreeSet<IpNetwork>, now: Instant) -> Option<VipAction> {
        let is_first = std::mem::take(&mut self.is_first_of_stream);
        if !vips.is_empty() {
            self.held_until = None;
            return self.tell(vips);
        }
        // A repeated empty list does not prolong the wait.
        if self.held_until.is_some() {
            return None;
        }
        let may_have_rules = self.told.as_ref().is_none_or(|told| !told.is_empty());
        if is_first && may_have_rules {
            self.held_until = Some(now + HOLD);
            return Some(VipAction::Held);
        }
        self.tell(vips)
    }

    fn tell(&mut self, vips: BTreeSet<IpNetwork>) -> Option<VipAction> {
        if self.told.as_ref() == Some(&vips) {
            return None;
        }
        self.told = Some(vips.clone());
        Some(VipAction::Tell(vips))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sync::clock;

    fn set(texts: &[&str]) -> BTreeSet<IpNetwork> {
        texts.iter().map(|text| text.parse().unwrap()).collect()
    }

    fn receive(book: &mut VipBook, list: &[&str], now: Instant) -> Vec<VipAction> {
        book.received(list.iter().copied(), now)
    }

    #[test]
    fn texts() {
        for (text, expected) in [
            ("20.0.0.1/32", Ok("20.0.0.1/32")),
            ("40.0.0.7/24", Ok("40.0.0.0/24")),
            ("2000::1/128", Ok("2000::1/128")),
            ("2000::1/64", Ok("2000::/64")),
            ("0.0.0.1/1", Ok("0.0.0.0/1")),
            ("0.0.0.0/0", Err(VipFault::Everything)),
            ("20.0.0.1/0", Err(VipFault::Everything)),
            ("::/0", Err(VipFault::Everything)),
            ("20.0.0.1", Err(VipFault::NoPrefix)),
            ("20.0.0.1/", Err(VipFault::NoPrefix)),
            ("20.0.0.1/33", Err(VipFault::NoPrefix)),
            ("20.0.0.1/+8", Err(VipFault::NoPrefix)),
            ("20.0.0.1/255.255.255.0", Err(VipFault::NoPrefix)),
            ("20.0.0.1/300", Err(VipFault::NoPrefix)),
            ("2000::1/129", Err(VipFault::NoPrefix)),
            ("020.0.0.1/32", Err(VipFault::NoPrefix)),
            ("fe80::1%eth0/64", Err(VipFault::NoPrefix)),
            ("20.0.0.1/32 ", Err(VipFault::NoPrefix)),
            ("", Err(VipFault::NoPrefix)),
            ("\u{1b}[31m/32", Err(VipFault::NoPrefix)),
        ] {
            let expected = expected.map(|text| text.parse().unwrap());
            assert_eq!(parse(text), expected, "{text:?}");
        }
    }

    #[test]
    fn lists_are_full_sets_told_on_change() {
        let now = clock::now();
        let mut book = VipBook::new();
        book.opened();
        assert_eq!(
            receive(
                &mut book,
                &["20.0.0.1/32", "20.0.0.1/32", "40.0.0.9/24"],
                now
            ),
            [VipAction::Tell(set(&["20.0.0.1/32", "40.0.0.0/24"]))]
        );
        assert_eq!(receive(&mut book, &["40.0.0.0/24", "20.0.0.1/32"], now), []);
        assert_eq!(
            receive(&mut book, &["40.0.0.0/24"], now),
            [VipAction::Tell(set(&["40.0.0.0/24"]))]
        );
        // In the middle of a stream an empty list is meant.
        assert_eq!(receive(&mut book, &[], now), [VipAction::Tell(set(&[]))]);
    }

    #[test]
    fn a_bad_text_is_named_once_while_it_is_listed() {
        let now = clock::now();
        let mut book = VipBook::new();
        book.opened();
        let refused = VipAction::Refused {
            text: "bad".to_owned(),
            fault: VipFault::NoPrefix,
        };
        assert_eq!(
            receive(&mut book, &["bad", "20.0.0.1/32", "bad"], now),
            [refused.clone(), VipAction::Tell(set(&["20.0.0.1/32"]))]
        );
        assert_eq!(receive(&mut book, &["bad", "20.0.0.1/32"], now), []);
        assert_eq!(receive(&mut book, &["20.0.0.1/32"], now), []);
        assert_eq!(receive(&mut book, &["bad", "20.0.0.1/32"], now), [refused]);
    }

    #[test]
    fn a_flood_of_bad_texts_is_counted() {
        let now = clock::now();
        let mut book = VipBook::new();
        let texts: Vec<String> = (0..1000).map(|n| format!("bad{n}")).collect();
        let actions = book.received(texts.iter().map(String::as_str), now);
        assert!(actions.contains(&VipAction::RefusedMore(990)));
        assert_eq!(actions.len(), 12, "{actions:?}");
    }

    #[test]
    fn an_empty_first_list_is_held_back() {
        let now = clock::now();
        let mut book = VipBook::new();
        book.opened();
        let _ = receive(&mut book, &["20.0.0.1/32"], now);
        book.ended();

        // Followed by the real list: nothing is told.
        book.opened();
        assert_eq!(receive(&mut book, &[], now), [VipAction::Held]);
        assert_eq!(book.next_deadline(), Some(now + HOLD));
        assert_eq!(book.tick(now + HOLD / 2), None);
        assert_eq!(receive(&mut book, &["20.0.0.1/32"], now + HOLD / 2), []);
        assert_eq!(book.next_deadline(), None);

        // Interrupted: nothing is removed while NSP is away.
        book.ended();
        book.opened();
        assert_eq!(receive(&mut book, &[], now), [VipAction::Held]);
        book.ended();
        assert_eq!(book.tick(now + HOLD), None);

        // Repeated, it counts from the first one, and then holds.
        book.opened();
        assert_eq!(receive(&mut book, &[], now), [VipAction::Held]);
        assert_eq!(receive(&mut book, &[], now + HOLD / 2), []);
        assert_eq!(
            book.tick(now + HOLD),
            Some(VipAction::Tell(BTreeSet::new()))
        );
        assert_eq!(book.next_deadline(), None);

        // With nothing to lose there is nothing to hold.
        book.ended();
        book.opened();
        assert_eq!(receive(&mut book, &[], now), []);
    }

    #[test]
    fn the_first_list_of_all_may_meet_rules_of_a_predecessor() {
        let now = clock::now();
        let mut book = VipBook::new();
        book.opened();
        assert_eq!(receive(&mut book, &[], now), [VipAction::Held]);
        assert_eq!(
            book.tick(now + HOLD),
            Some(VipAction::Tell(BTreeSet::new()))
        );
    }
}
