//! Thread `nse`: takes jobs in order of arrival and watches the clock.

use std::sync::Arc;

use crossbeam_channel::{Receiver, at, never, select};

use super::desk::Desk;
use super::jobs::JobQueue;
use crate::sync::clock::Now;
use crate::sync::stop::Stop;

/// Jobs between two looks at the clock: a flood of them delays no expiry.
const BATCH: usize = 256;

/// Runs until stopped; what is unanswered then is answered UNAVAILABLE, and
/// all streams end. Connections, ports and leases stay.
pub fn run(mut desk: Desk, queue: &Arc<JobQueue>, woken: &Receiver<()>, stop: &Stop) {
    let mut more = false;
    while !stop.is_set() {
        if !more {
            let timer = desk.next_deadline().map_or_else(never, at);
            select! {
                recv(woken) -> _ => {}
                recv(timer) -> _ => {}
                recv(stop.receiver()) -> _ => break,
            }
        }
        let jobs = std::iter::from_fn(|| queue.pop()).take(BATCH);
        more = jobs.map(|job| desk.handle(job, Now::read())).count() == BATCH;
        desk.tick(Now::read());
    }
    queue.close();
}
