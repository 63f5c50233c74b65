//! What peers that monitor connections are told (NSM: sdk
//! networkservice/common/monitor). A forwarder opens a stream for each
//! connection after its Request and takes the end of the stream, or a DELETE,
//! for the loss of the connection.

use super::feed::Publisher;
use crate::proto::connection::{
    Connection, ConnectionEvent, ConnectionEventType, MonitorScopeSelector, PathSegment,
};

/// Streams at a time: more than this process can have targets, twice.
const STREAMS_MAX: usize = 4096;

/// The open streams.
#[derive(Debug, Default)]
pub struct Monitors(Vec<Monitor>);

#[derive(Debug)]
struct Monitor {
    selector: MonitorScopeSelector,
    publisher: Publisher<ConnectionEvent>,
}

impl Monitors {
    /// Adds a stream and sends it the matching ones of `present`, even if
    /// there is none. Beyond [`STREAMS_MAX`] it ends at once.
    pub fn open<'a>(
        &mut self,
        selector: MonitorScopeSelector,
        publisher: Publisher<ConnectionEvent>,
        present: impl Iterator<Item = &'a Connection>,
    ) {
        self.0.retain(|monitor| !monitor.publisher.is_gone());
        if self.0.len() >= STREAMS_MAX {
            return;
        }
        let matching = present.filter(|connection| matches(&selector, connection));
        publisher.send(event(ConnectionEventType::INITIAL_STATE_TRANSFER, matching));
        self.0.push(Monitor {
            selector,
            publisher,
        });
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
        self.0.retain(|monitor| !monitor.publisher.is_gone());
        for monitor in &self.0 {
            if matches(&monitor.selector, connection) {
                let one = std::iter::once(connection);
                monitor.publisher.send(event(kind, one));
            }
        }
    }
}

fn event<'a>(
    kind: ConnectionEventType,
    connections: impl Iterator<Item = &'a Connection>,
) -> ConnectionEvent {
    ConnectionEvent {
        type_: kind.into(),
        connections: connections
            .map(|connection| (connection.id.clone(), connection.clone()))
            .collect(),
        ..ConnectionEvent::default()
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
mod tests {
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

    fn told(outlet: &Outlet<ConnectionEvent>) -> Vec<(ConnectionEventType, Vec<String>)> {
        let told = |event: ConnectionEvent| {
            let mut ids: Vec<String> = event.connections.into_keys().collect();
            ids.sort();
            (event.type_.enum_value().unwrap(), ids)
        };
        drain(outlet).0.into_iter().map(told).collect()
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
        monitors.update(&a);
        monitors.update(&b);
        monitors.delete(&a);
        let ids = |ids: &[&str]| ids.iter().map(|id| (*id).to_owned()).collect::<Vec<_>>();
        assert_eq!(
            told(&one),
            [
                (INITIAL_STATE_TRANSFER, ids(&["a"])),
                (UPDATE, ids(&["a"])),
                (DELETE, ids(&["a"]))
            ]
        );
        assert_eq!(
            told(&all),
            [
                (INITIAL_STATE_TRANSFER, ids(&["a", "b"])),
                (UPDATE, ids(&["a"])),
                (UPDATE, ids(&["b"])),
                (DELETE, ids(&["a"])),
            ]
        );
        assert_eq!(told(&none), [(INITIAL_STATE_TRANSFER, ids(&[]))]);
        drop((one, none));
        monitors.update(&b);
        assert_eq!(monitors.0.len(), 1, "lost readers are forgotten");
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
        assert_eq!(monitors.0.len(), STREAMS_MAX);
        assert_eq!(drain(&outlets[STREAMS_MAX]), (vec![], true));
    }
}
