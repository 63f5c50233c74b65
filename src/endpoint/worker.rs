//! Thread `nse`: takes jobs in order of arrival and watches the clock.

use std::sync::Arc;

use crossbeam_channel::{Receiver, at, never, select};

use super::desk::Desk;
use super::jobs::JobQueue;
use crate::sync::clock::Now;
use crate::sync::stop::Stop;

/// Runs until stopped; what is unanswered then is answered UNAVAILABLE, and
/// all streams end. Connections, ports and leases stay.
pub fn run(mut desk: Desk, queue: &Arc<JobQueue>, woken: &Receiver<()>, stop: &Stop) {
    loop {
        let timer = desk.next_deadline().map_or_else(never, at);
        select! {
            recv(woken) -> _ => {}
            recv(timer) -> _ => {}
            recv(stop.receiver()) -> _ => break,
        }
        while let Some(job) = queue.pop() {
            if stop.is_set() {
                break;
            }
            desk.handle(job, Now::read());
        }
        desk.tick(Now::read());
    }
    queue.close();
}
