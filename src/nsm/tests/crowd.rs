//! Many LBs at once: nsmgr is not flooded, and a stuck one starves nobody.

use std::collections::BTreeSet;

use super::world::Answer;
use super::*;
use crate::nsm::REQUESTS_MOST;
use crate::proto::networkservice::NetworkServiceRequest;

const LBS: usize = 40;
/// Nothing comes for so long: all that may be under way is. Less than the time
/// after which a Request keeps no others waiting.
const QUIET: Duration = Duration::from_millis(250);

type Waiting = Vec<(NetworkServiceRequest, Answer<Connection>)>;

/// A played nsmgr that has forgotten everything, or never knew anything.
struct Nsmgr<'a> {
    world: &'a World,
    /// Of the streams of connected LBs; they end with this.
    streams: Vec<world::Feed<crate::proto::connection::ConnectionEvent>>,
    /// Never answered.
    stuck: BTreeSet<String>,
    held: Waiting,
}

impl Nsmgr<'_> {
    /// Answers all LBs but those that are stuck, in turns: as soon as no more
    /// Requests come. Returns how many were under way at most.
    fn answer_all(&mut self, lbs: usize) -> usize {
        let (mut open, mut most, mut done) = (Waiting::new(), 0, BTreeSet::new());
        while done.len() < lbs {
            // `net` and IPAM would read them.
            self.world.facts.try_iter().for_each(drop);
            self.world.acquired.try_iter().for_each(drop);
            match self.world.calls.recv_timeout(QUIET) {
                Ok(Call::Monitor(_, reply)) => {
                    let (feed, stream) = feed();
                    feed.message(event(ConnectionEventType::INITIAL_STATE_TRANSFER, &[]));
                    self.streams.push(feed);
                    let _ = reply.send(Ok(stream));
                }
                Ok(Call::Request(request, reply)) => {
                    let lb = &request.connection.network_service_endpoint_name;
                    if self.stuck.contains(lb) {
                        self.held.push((request, reply));
                    } else {
                        open.push((request, reply));
                        most = most.max(open.len());
                    }
                }
                Ok(_) => panic!("neither monitor nor Request"),
                Err(_) => {
                    for (request, reply) in open.drain(..) {
                        let connection = answer(&request);
                        done.insert(connection.id.clone());
                        reply.send(Ok(connection)).unwrap();
                    }
                }
            }
        }
        most
    }
}

fn nsmgr(world: &World) -> Nsmgr<'_> {
    Nsmgr {
        world,
        streams: Vec::new(),
        stuck: BTreeSet::new(),
        held: Waiting::new(),
    }
}

#[test]
fn a_restarted_nsmgr_gets_eight_requests_at_once() {
    let world = world();
    for number in 0..LBS {
        world.registers(&format!("lb-{number}"));
    }
    let mut nsmgr = nsmgr(&world);
    assert_eq!(nsmgr.answer_all(LBS), REQUESTS_MOST, "first Requests");
    // It forgets all: each stream starts with a list that has nothing. That
    // was told to those above, too, so all are told it again within a second.
    nsmgr.streams.clear();
    assert_eq!(nsmgr.answer_all(LBS), REQUESTS_MOST, "refreshes");
}

#[test]
fn stuck_lbs_starve_nobody() {
    let world = world();
    let mut nsmgr = nsmgr(&world);
    nsmgr.stuck = (0..REQUESTS_MOST * 2)
        .map(|n| format!("stuck-{n}"))
        .collect();
    for lb in &nsmgr.stuck {
        world.registers(lb);
    }
    // All permits are with those that are stuck, and some of those wait.
    while nsmgr.held.len() < REQUESTS_MOST {
        match world.calls.recv_timeout(PATIENCE).unwrap() {
            Call::Request(request, reply) => nsmgr.held.push((request, reply)),
            Call::Monitor(_, reply) => {
                let (feed, stream) = feed();
                feed.message(event(ConnectionEventType::INITIAL_STATE_TRANSFER, &[]));
                reply.send(Ok(stream)).unwrap();
            }
            _ => panic!("neither monitor nor Request"),
        }
    }
    for number in 0..LBS {
        world.registers(&format!("lb-{number}"));
    }
    let begun = clock::now();
    nsmgr.answer_all(LBS);
    // Two rounds of stuck ones, a second each, and the turns of the others.
    let turns = u32::try_from(LBS / REQUESTS_MOST + 1).unwrap();
    let limit = Duration::from_secs(4) + QUIET * turns;
    assert!(begun.elapsed() < limit, "{:?}", begun.elapsed());
    let stuck = nsmgr.held.len();
    assert_eq!(stuck, REQUESTS_MOST * 2, "each asked once, and still waits");
}
