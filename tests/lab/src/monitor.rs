//! Server streams, and the connections that MonitorConnections tells of
//! (networkservice/common/monitor).

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::task::Poll;

use futures_util::SinkExt;
use futures_util::future::poll_fn;
use futures_util::sink::Sink;
use futures_util::task::AtomicWaker;
use grpcio::{RpcContext, RpcStatus, ServerStreamingSink, WriteFlags};
use meridio_proxy::proto::connection::{
    Connection, ConnectionEvent, ConnectionEventType, MonitorScopeSelector, PathSegment, State,
};
use meridio_proxy::rpc::status::Code;
use parking_lot::Mutex;

/// Messages that may wait for a slow client.
const BOUND: usize = 4096;

/// The server's end of one stream; any thread may push.
pub struct Outbox<T>(Arc<Inner<T>>);

struct Inner<T> {
    queue: Mutex<Queue<T>>,
    waker: AtomicWaker,
}

struct Queue<T> {
    items: VecDeque<T>,
    end: Option<RpcStatus>,
    gone: bool,
}

impl<T> Clone for Outbox<T> {
    fn clone(&self) -> Self {
        Self(Arc::clone(&self.0))
    }
}

impl<T> Default for Outbox<T> {
    fn default() -> Self {
        Self(Arc::new(Inner {
            queue: Mutex::new(Queue {
                items: VecDeque::new(),
                end: None,
                gone: false,
            }),
            waker: AtomicWaker::new(),
        }))
    }
}

enum Step<T> {
    Gone,
    Item(T),
    End(RpcStatus),
}

impl<T: Send + 'static> Outbox<T> {
    /// False when the stream has ended. A client that is `BOUND` messages
    /// behind loses it.
    pub fn push(&self, item: T) -> bool {
        let mut queue = self.0.queue.lock();
        if queue.gone || queue.end.is_some() {
            return false;
        }
        if queue.items.len() >= BOUND {
            let text = format!("client is {BOUND} messages behind");
            queue.end = Some(RpcStatus::with_message(Code::RESOURCE_EXHAUSTED, text));
        } else {
            queue.items.push_back(item);
        }
        drop(queue);
        self.0.waker.wake();
        true
    }

    /// Ends the stream after what was pushed.
    pub fn end(&self, status: RpcStatus) {
        self.0.queue.lock().end.get_or_insert(status);
        self.0.waker.wake();
    }

    /// Whether the stream has ended, or will once it is drained.
    pub fn is_over(&self) -> bool {
        let queue = self.0.queue.lock();
        queue.gone || queue.end.is_some()
    }

    /// Sends what is pushed, on gRPC's thread, until an end or the client goes.
    pub fn serve(&self, context: &RpcContext<'_>, sink: ServerStreamingSink<T>) {
        context.spawn(pump(sink, Arc::clone(&self.0)));
    }
}

async fn pump<T: Send + 'static>(mut sink: ServerStreamingSink<T>, inner: Arc<Inner<T>>) {
    loop {
        let step = poll_fn(|context| {
            inner.waker.register(context.waker());
            // Only to learn that the client has gone.
            if let Poll::Ready(Err(_)) = Pin::new(&mut sink).poll_ready(context) {
                return Poll::Ready(Step::Gone);
            }
            let mut queue = inner.queue.lock();
            match (queue.items.pop_front(), queue.end.clone()) {
                (Some(item), _) => Poll::Ready(Step::Item(item)),
                (None, Some(status)) => Poll::Ready(Step::End(status)),
                (None, None) => Poll::Pending,
            }
        })
        .await;
        match step {
            Step::Item(item) => {
                if sink.send((item, WriteFlags::default())).await.is_ok() {
                    continue;
                }
            }
            Step::End(status) if status.code() == Code::OK => {
                let _ = sink.close().await;
            }
            Step::End(status) => {
                let _ = sink.fail(status).await;
                inner.queue.lock().gone = true;
                return;
            }
            Step::Gone => {}
        }
        inner.queue.lock().gone = true;
        return;
    }
}

/// The connections of one hop, and the streams that follow them.
#[derive(Default)]
pub struct Monitors(Mutex<Table>);

#[derive(Default)]
struct Table {
    /// By the hop's own segment id, as seen inside the hop: own id, own index.
    connections: BTreeMap<String, Connection>,
    streams: Vec<(MonitorScopeSelector, Outbox<ConnectionEvent>)>,
}

impl Monitors {
    /// Opens a stream, which starts with the initial transfer, even if empty.
    pub fn open(&self, selector: MonitorScopeSelector) -> Outbox<ConnectionEvent> {
        let mut table = self.0.lock();
        let selected = table.connections.values().filter(|c| selects(&selector, c));
        let event = event(ConnectionEventType::INITIAL_STATE_TRANSFER, selected);
        let outbox = Outbox::default();
        outbox.push(event);
        table.streams.push((selector, outbox.clone()));
        outbox
    }

    /// Stores a connection and tells of it.
    pub fn update(&self, connection: Connection) {
        self.0.lock().update(connection);
    }

    /// Marks a connection DOWN; false when there is none of that id.
    pub fn down(&self, id: &str) -> bool {
        let mut table = self.0.lock();
        let Some(mut connection) = table.connections.get(id).cloned() else {
            return false;
        };
        connection.state = State::DOWN.into();
        table.update(connection);
        true
    }

    /// Forgets a connection and tells of it; returns what it was.
    pub fn delete(&self, id: &str) -> Option<Connection> {
        let mut table = self.0.lock();
        let connection = table.connections.remove(id)?;
        table.tell(ConnectionEventType::DELETE, &connection);
        Some(connection)
    }

    /// Forgets everything without telling.
    pub fn clear(&self) {
        self.0.lock().connections.clear();
    }

    pub fn get(&self, id: &str) -> Option<Connection> {
        self.0.lock().connections.get(id).cloned()
    }

    pub fn all(&self) -> Vec<Connection> {
        self.0.lock().connections.values().cloned().collect()
    }

    /// Open streams.
    pub fn streams(&self) -> usize {
        let mut table = self.0.lock();
        table.streams.retain(|(_, outbox)| !outbox.is_over());
        table.streams.len()
    }

    /// Ends all streams with `status`.
    pub fn end_streams(&self, status: &RpcStatus) {
        for (_, outbox) in self.0.lock().streams.drain(..) {
            outbox.end(status.clone());
        }
    }
}

impl Table {
    fn update(&mut self, connection: Connection) {
        self.tell(ConnectionEventType::UPDATE, &connection);
        self.connections.insert(connection.id.clone(), connection);
    }

    fn tell(&mut self, what: ConnectionEventType, connection: &Connection) {
        self.streams.retain(|(selector, outbox)| {
            if selects(selector, connection) {
                outbox.push(event(what, std::iter::once(connection)))
            } else {
                !outbox.is_over()
            }
        });
    }
}

fn event<'a>(
    what: ConnectionEventType,
    connections: impl Iterator<Item = &'a Connection>,
) -> ConnectionEvent {
    let connections: HashMap<_, _> = connections.map(|c| (c.id.clone(), c.clone())).collect();
    ConnectionEvent {
        type_: what.into(),
        connections,
        ..Default::default()
    }
}

/// Whether a selector means the connection: one of its services, and a
/// contiguous run of its segments, where empty fields match all.
pub fn selects(selector: &MonitorScopeSelector, connection: &Connection) -> bool {
    let services = &selector.network_services;
    if !services.is_empty() && !services.contains(&connection.network_service) {
        return false;
    }
    let wanted = &selector.path_segments;
    let field = |wanted: &str, is: &str| wanted.is_empty() || wanted == is;
    let same = |(wanted, is): (&PathSegment, &PathSegment)| {
        field(&wanted.name, &is.name)
            && field(&wanted.id, &is.id)
            && field(&wanted.token, &is.token)
    };
    wanted.is_empty()
        || connection
            .path
            .path_segments
            .windows(wanted.len())
            .any(|run| wanted.iter().zip(run).all(same))
}

#[cfg(test)]
mod tests {
    use super::*;
    use meridio_proxy::proto::connection::Path;

    fn segment(name: &str, id: &str) -> PathSegment {
        PathSegment {
            name: name.to_owned(),
            id: id.to_owned(),
            ..Default::default()
        }
    }

    #[test]
    fn selectors_match_runs() {
        let connection = Connection {
            network_service: "lb".to_owned(),
            path: Some(Path {
                path_segments: vec![segment("a", "1"), segment("b", "2"), segment("c", "3")],
                ..Default::default()
            })
            .into(),
            ..Default::default()
        };
        let select = |segments: &[(&str, &str)], services: &[&str]| {
            let selector = MonitorScopeSelector {
                path_segments: segments.iter().map(|(n, i)| segment(n, i)).collect(),
                network_services: services.iter().map(|&s| s.to_owned()).collect(),
                ..Default::default()
            };
            selects(&selector, &connection)
        };
        assert!(select(&[], &[]));
        assert!(select(&[("", "2")], &["x", "lb"]));
        assert!(select(&[("a", ""), ("", "2")], &[]));
        assert!(!select(&[("a", ""), ("", "3")], &[]));
        assert!(!select(&[("", "2")], &["x"]));
        assert!(!select(&[("", ""), ("", ""), ("", ""), ("", "")], &[]));
    }
}
