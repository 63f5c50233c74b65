//! What peers that monitor connections are told (NSM: sdk
//! networkservice/common/monitor). A forwarder opens a stream for each
//! connection after its Request and takes the end of the stream, or a DELETE,
//! for the loss of the connection.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use log::error;
use protobuf::Message;

use super::feed::{BYTES_MAX, Entry, Publisher};
use crate::proto::connection::{
    Connection, ConnectionEvent, ConnectionEventType, MonitorScopeSelector, PathSegment,
};
use crate::rpc::encoded::Encoded;

/// Streams at a time: more than this process can have targets, twice.
const STREAMS_MAX: usize = 4096;
/// Bytes that wait for all readers together. Above it those with the most are
/// given up, so that nobody who does not read makes the process grow.
const HELD_MAX: usize = 32 * 1024 * 1024;

/// An event as it waits for a stream: one copy for all streams, counted as long
/// as one of them holds it.
#[derive(Debug, Clone)]
pub struct Told(Arc<Event>);

#[derive(Debug)]
struct Event {
    kind: ConnectionEventType,
    /// The connection that it is about; the first event is about many.
    id: Option<String>,
    encoded: Encoded,
    held: Arc<AtomicUsize>,
}

impl Drop for Event {
    fn drop(&mut self) {
        let size = self.encoded.bytes().len();
        self.held.fetch_sub(size, Ordering::Relaxed);
    }
}

impl Entry for Told {
    type Message = Encoded;

    fn message(&self) -> Encoded {
        self.0.encoded.clone()
    }

    fn size(&self) -> usize {
        self.0.encoded.bytes().len()
    }

    /// The newest state of a connection is enough, but not without the end of
    /// the one before.
    fn replaces(&self, earlier: &Self) -> bool {
        let (new, old) = (&*self.0, &*earlier.0);
        new.id.is_some()
            && new.id == old.id
            && (new.kind == ConnectionEventType::DELETE || old.kind == ConnectionEventType::UPDATE)
    }
}

/// The open streams.
#[derive(Debug, Default)]
pub struct Monitors {
    streams: Vec<Monitor>,
    /// Bytes of the events that wait for a reader.
    held: Arc<AtomicUsize>,
}

#[derive(Debug)]
struct Monitor {
    selector: MonitorScopeSelector,
    publisher: Publisher<Told>,
}

impl Monitors {
    /// Adds a stream and sends it the matching ones of `present`, even if
    /// there is none. Beyond [`STREAMS_MAX`] it ends at once; with more than a
    /// stream may hold, as that of a reader that is too far behind.
    pub fn open<'a>(
        &mut self,
        selector: MonitorScopeSelector,
        publisher: Publisher<Told>,
        present: impl Iterator<Item = &'a Connection>,
    ) {
        self.streams.retain(|monitor| !monitor.publisher.is_gone());
        if self.streams.len() >= STREAMS_MAX {
            return;
        }
        let mut size = 0;
        let matching: Vec<&Connection> = present
            .filter(|connection| matches(&selector, connection))
            // One more than fits is enough to see that it is too much.
            .take_while(|connection| {
                let fits = size <= BYTES_MAX;
                size += usize::try_from(connection.compute_size()).unwrap_or(usize::MAX);
                fits
            })
            .collect();
        if size > BYTES_MAX {
            return publisher.give_up();
        }
        let kind = ConnectionEventType::INITIAL_STATE_TRANSFER;
        if let Some(told) = self.event(kind, None, &matching) {
            publisher.send(told);
        }
        self.streams.push(Monitor {
            selector,
            publisher,
        });
        self.relieve();
    }

    /// The connection is up, or was refreshed.
    pub fn update(&mut self, connection: &Connection) {
        self.publish(ConnectionEventType::UPDATE, connection);
    }

    /// The connection was closed.
    pub fn delete(&mut self, connection: &Connection) {
        self.publish(ConnectionEventType::DELETE, connection);
    }

    fn publish(&mut self, kind: ConnectionEventType, connection: &Connection) {
        self.streams.retain(|monitor| !monitor.publisher.is_gone());
        let wanted = |monitor: &&Monitor| matches(&monitor.selector, connection);
        if !self.streams.iter().any(|monitor| wanted(&monitor)) {
            return;
        }
        let Some(told) = self.event(kind, Some(&connection.id), &[connection]) else {
            return;
        };
        for monitor in self.streams.iter().filter(wanted) {
            monitor.publisher.send(told.clone());
        }
        drop(told);
        self.relieve();
    }

    fn event(
        &self,
        kind: ConnectionEventType,
        id: Option<&str>,
        connections: &[&Connection],
    ) -> Option<Told> {
        let event = ConnectionEvent {
            type_: kind.into(),
            connections: connections
                .iter()
                .map(|connection| (connection.id.clone(), (*connection).clone()))
                .collect(),
            ..ConnectionEvent::default()
        };
        let encoded = match Encoded::of(&event) {
            Ok(encoded) => encoded,
            Err(error) => {
                error!("telling of {} connections: {error}", connections.len());
                return None;
            }
        };
        self.held
            .fetch_add(encoded.bytes().len(), Ordering::Relaxed);
        Some(Told(Arc::new(Event {
            kind,
            id: id.map(str::to_owned),
            encoded,
            held: Arc::clone(&self.held),
        })))
    }

    /// Gives up the readers with the most to read, until what the others hold
    /// is within the bound.
    fn relieve(&mut self) {
        let held = self.held.load(Ordering::Relaxed);
        let Some(mut excess) = held.checked_sub(HELD_MAX + 1) else {
            return;
        };
        let waiting = |monitor: &Monitor| monitor.publisher.waiting();
        self.streams.sort_by_cached_key(waiting);
        while let Some(monitor) = self.streams.pop() {
            let freed = waiting(&monitor);
            monitor.publisher.give_up();
            if freed > excess {
                return;
            }
            excess -= freed;
        }
    }
}

/// Whether a stream is about the connection: it names no service or the
/// connection's, and its segments match a run of the connection's, where an
/// empty field matches anything (api networkservice/connection_helpers.go).
#[must_use]
pub fn matches(selector: &MonitorScopeSelector, connection: &Connection) -> bool {
    let services = &selector.network_services;
    if !services.is_empty() && !services.contains(&connection.network_service) {
        return false;
    }
    let wanted = &selector.path_segments;
    if wanted.is_empty() {
        return true;
    }
    connection
        .path
        .path_segments
        .windows(wanted.len())
        .any(|run| {
            run.iter()
                .zip(wanted)
                .all(|(is, wanted)| segment_matches(wanted, is))
        })
}

fn segment_matches(wanted: &PathSegment, is: &PathSegment) -> bool {
    let field = |wanted: &str, is: &str| wanted.is_empty() || wanted == is;
    field(&wanted.name, &is.name) && field(&wanted.id, &is.id) && field(&wanted.token, &is.token)
}

#[cfg(test)]
pub(super) mod tests {
    use protobuf::MessageField;

    use super::super::feed::tests::drain;
    use super::super::feed::{Outlet, feed};
    use super::*;
    use crate::proto::connection::Path;

    fn segments(list: &[(&str, &str)]) -> Vec<PathSegment> {
        let one = |(name, id): &(&str, &str)| PathSegment {
            name: (*name).to_owned(),
            id: (*id).to_owned(),
            token: format!("t{id}"),
            ..PathSegment::default()
        };
        list.iter().map(one).collect()
    }

    fn connection(id: &str, list: &[(&str, &str)]) -> Connection {
        Connection {
            id: id.to_owned(),
            network_service: "service".to_owned(),
            path: MessageField::some(Path {
                path_segments: segments(list),
                ..Path::default()
            }),
            ..Connection::default()
        }
    }

    fn selector(list: &[(&str, &str)], services: &[&str]) -> MonitorScopeSelector {
        let mut path_segments = segments(list);
        for segment in &mut path_segments {
            segment.token.clear();
        }
        MonitorScopeSelector {
            path_segments,
            network_services: services.iter().map(|s| (*s).to_owned()).collect(),
            ..MonitorScopeSelector::default()
        }
    }

    #[test]
    fn selectors() {
        let path = [("t", "1"), ("mgr", "2"), ("fwd", "3"), ("us", "4")];
        let connection = connection("4", &path);
        for (wanted, services, expected) in [
            (&[][..], &[][..], true),
            (&[], &["service"], true),
            (&[], &["other", "service"], true),
            (&[], &["other"], false),
            (&[("fwd", "3")], &[], true),
            (&[("fwd", "")], &[], true),
            (&[("", "3")], &[], true),
            (&[("", "")], &[], true),
            (&[("fwd", "4")], &[], false),
            (&[("fwd", "3")], &["other"], false),
            (&[("mgr", "2"), ("fwd", "")], &[], true),
            (&[("", ""), ("us", "4")], &[], true),
            (&[("mgr", "2"), ("us", "4")], &[], false),
            (&[("us", "4"), ("", "")], &[], false),
            (&path, &[], true),
            (&[("", ""); 5], &[], false),
        ] {
            let selector = selector(wanted, services);
            assert_eq!(
                matches(&selector, &connection),
                expected,
                "{wanted:?} {services:?}"
            );
        }
        let mut token = selector(&[("fwd", "3")], &[]);
        token.path_segments[0].token = "t3".to_owned();
        assert!(matches(&token, &connection));
        token.path_segments[0].token = "t4".to_owned();
        assert!(!matches(&token, &connection));
        assert!(!matches(&token, &Connection::default()), "no path");
    }

    /// What a stream is to be sent, and whether it ended.
    pub fn events(outlet: &Outlet<Told>) -> (Vec<ConnectionEvent>, bool) {
        let (told, ended) = drain(outlet);
        let event = |told: &Told| ConnectionEvent::parse_from_bytes(told.message().bytes());
        let events = told.iter().map(event).collect::<Result<_, _>>();
        (events.unwrap(), ended)
    }

    fn told(outlet: &Outlet<Told>) -> Vec<(ConnectionEventType, Vec<String>)> {
        let told = |event: ConnectionEvent| {
            let mut ids: Vec<String> = event.connections.into_keys().collect();
            ids.sort();
            (event.type_.enum_value().unwrap(), ids)
        };
        events(outlet).0.into_iter().map(told).collect()
    }

    /// A stream of everything, with nothing present.
    fn all(monitors: &mut Monitors) -> Outlet<Told> {
        let (publisher, outlet) = feed();
        monitors.open(selector(&[], &[]), publisher, std::iter::empty());
        outlet
    }

    fn large(id: &str, bytes: usize) -> Connection {
        Connection {
            payload: "x".repeat(bytes),
            ..connection(id, &[("fwd", id), ("us", id)])
        }
    }

    #[test]
    fn a_stream_is_told_the_present_then_each_change() {
        use ConnectionEventType::{DELETE, INITIAL_STATE_TRANSFER, UPDATE};
        let a = connection("a", &[("fwd", "1"), ("us", "a")]);
        let b = connection("b", &[("fwd", "2"), ("us", "b")]);
        let mut monitors = Monitors::default();
        let (publisher, one) = feed();
        monitors.open(
            selector(&[("fwd", "1")], &[]),
            publisher,
            [&a, &b].into_iter(),
        );
        let (publisher, all) = feed();
        monitors.open(selector(&[], &[]), publisher, [&a, &b].into_iter());
        let (publisher, none) = feed();
        monitors.open(selector(&[("x", "")], &[]), publisher, [&a, &b].into_iter());
        let ids = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
        let first = |of: &[&str]| (INITIAL_STATE_TRANSFER, ids(of));
        assert_eq!(told(&one), [first(&["a"])]);
        assert_eq!(told(&all), [first(&["a", "b"])]);
        monitors.update(&a);
        monitors.update(&b);
        assert_eq!(told(&one), [(UPDATE, ids(&["a"]))]);
        assert_eq!(told(&all), [(UPDATE, ids(&["a"])), (UPDATE, ids(&["b"]))]);
        monitors.delete(&a);
        assert_eq!(told(&one), [(DELETE, ids(&["a"]))]);
        assert_eq!(told(&all), [(DELETE, ids(&["a"]))]);
        assert_eq!(told(&none), [(INITIAL_STATE_TRANSFER, ids(&[]))]);
        drop((one, none));
        monitors.update(&b);
        assert_eq!(monitors.streams.len(), 1, "lost readers are forgotten");
        drop(monitors);
        assert!(drain(&all).1, "the end of the endpoint ends the stream");
    }

    #[test]
    fn streams_are_bounded() {
        let mut monitors = Monitors::default();
        let mut outlets = Vec::new();
        for _ in 0..=STREAMS_MAX {
            let (publisher, outlet) = feed();
            monitors.open(selector(&[], &[]), publisher, std::iter::empty());
            outlets.push(outlet);
        }
        assert_eq!(monitors.streams.len(), STREAMS_MAX);
        assert!(matches!(drain(&outlets[STREAMS_MAX]), (told, true) if told.is_empty()));
    }

    #[test]
    fn a_slow_reader_is_told_the_newest_of_each_connection() {
        use ConnectionEventType::{DELETE, INITIAL_STATE_TRANSFER, UPDATE};
        let (a, b) = (large("a", 10), large("b", 10));
        let mut monitors = Monitors::default();
        let outlet = all(&mut monitors);
        for _ in 0..5000 {
            monitors.update(&a);
            monitors.update(&b);
        }
        monitors.update(&large("a", 20));
        let (events, _) = events(&outlet);
        assert_eq!(events.len(), 3);
        assert_eq!(events[2].connections["a"].payload.len(), 20);

        let kinds = |outlet| told(outlet).into_iter().map(|(kind, _)| kind);
        monitors.update(&a);
        monitors.delete(&a);
        assert!(kinds(&outlet).eq([DELETE]));
        // Another connection of the same name: the end of the first is told.
        monitors.delete(&a);
        monitors.update(&a);
        monitors.update(&a);
        assert!(kinds(&outlet).eq([DELETE, UPDATE]));
        for _ in 0..5000 {
            monitors.update(&a);
            monitors.delete(&a);
        }
        assert!(kinds(&outlet).eq([DELETE]));
        let late = all(&mut monitors);
        monitors.delete(&a);
        assert!(kinds(&late).eq([INITIAL_STATE_TRANSFER, DELETE]));
    }

    #[test]
    fn readers_that_do_not_read_hold_a_bounded_amount() {
        let mib = 1024 * 1024;
        let held = |monitors: &Monitors| monitors.held.load(Ordering::Relaxed);
        let mut monitors = Monitors::default();
        let (deaf, reading): (Vec<_>, _) = (
            (0..100).map(|_| all(&mut monitors)).collect(),
            all(&mut monitors),
        );
        // All of them hold the same one.
        monitors.update(&large("a", mib));
        assert!(held(&monitors) < 2 * mib, "{}", held(&monitors));
        drop(drain(&reading));
        // Each holds one of its own.
        let mut more = Vec::new();
        for n in 0..100 {
            let name = n.to_string();
            let (publisher, outlet) = feed();
            let own = large(&name, mib);
            monitors.open(
                selector(&[("fwd", &name)], &[]),
                publisher,
                [&own].into_iter(),
            );
            more.push(outlet);
            monitors.update(&large("a", 100));
            assert!(!drain(&reading).1, "who reads keeps the stream");
            assert!(held(&monitors) < HELD_MAX + 2 * mib, "{}", held(&monitors));
        }
        assert!(deaf.iter().chain(&more).any(|outlet| drain(outlet).1));
        drop((deaf, more, reading));
        assert_eq!(held(&monitors), 0, "nothing is counted that is not held");
    }

    #[test]
    fn more_than_a_stream_may_hold_is_not_begun() {
        let mut monitors = Monitors::default();
        let many: Vec<Connection> = (0..20).map(|n| large(&n.to_string(), 1 << 19)).collect();
        let (publisher, outlet) = feed();
        monitors.open(selector(&[], &[]), publisher, many.iter());
        assert!(monitors.streams.is_empty());
        assert!(matches!(drain(&outlet), (told, true) if told.is_empty()));
        let (publisher, outlet) = feed();
        monitors.open(selector(&[("fwd", "3")], &[]), publisher, many.iter());
        assert_eq!(events(&outlet).0[0].connections.len(), 1);
    }
}
