//! Ending a gRPC server within a time.

use std::sync::Arc;
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use crossbeam_channel::{Receiver, Sender, bounded};
use grpcio::{Server, ShutdownFuture};
use log::warn;

use crate::sync::clock;

/// How long cancelled calls may take to go away.
const CANCEL_LIMIT: Duration = Duration::from_millis(500);

/// Refuses new calls, lets running ones end until `deadline`, then cancels
/// them. True when all had ended in time. Blocks; not for gRPC's own threads,
/// which are what the end is waited for.
pub fn shut_down(mut server: Server, deadline: Instant) -> bool {
    let mut ended = server.shutdown();
    let (waker, woken) = waker();
    let in_time = wait(&mut ended, &waker, &woken, deadline);
    if in_time {
        return true;
    }
    server.cancel_all_calls();
    if !wait(&mut ended, &waker, &woken, clock::now() + CANCEL_LIMIT) {
        // The C core aborts when a server is destroyed before its calls are;
        // somebody still holds one.
        warn!("gRPC server still has calls {CANCEL_LIMIT:?} after they were cancelled; leaving it");
        std::mem::forget(server);
    }
    false
}

/// True when the future is ready by `deadline`.
fn wait(
    ended: &mut ShutdownFuture,
    waker: &Waker,
    woken: &Receiver<()>,
    deadline: Instant,
) -> bool {
    let mut context = Context::from_waker(waker);
    loop {
        if let Poll::Ready(_result) = std::pin::Pin::new(&mut *ended).poll(&mut context) {
            return true;
        }
        if woken.recv_deadline(deadline).is_err() {
            return false;
        }
    }
}

/// A waker that puts a token into a channel.
fn waker() -> (Waker, Receiver<()>) {
    struct Token(Sender<()>);
    impl Wake for Token {
        fn wake(self: Arc<Self>) {
            let _ = self.0.try_send(());
        }
    }
    let (tx, rx) = bounded(1);
    (Waker::from(Arc::new(Token(tx))), rx)
}
