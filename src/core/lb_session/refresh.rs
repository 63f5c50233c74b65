//! When a connection is refreshed.

use std::time::Duration;

/// A refresh is due after this part of the shortest life on the path.
const PART: u32 = 5;
/// No two Requests of an established connection are closer than this.
pub(super) const LEAST: Duration = Duration::from_secs(1);
/// IPAM forgets leases that are not renewed for 40 minutes, and every refresh
/// renews; so none is later than this, however long tokens live.
pub(super) const MOST: Duration = Duration::from_secs(600);
/// The refresh of a path whose lives are missing or over: some clock is wrong,
/// or a certificate has just expired.
const UNKNOWN: Duration = Duration::from_secs(10);

/// The shortest life that is told and not over.
pub(super) fn shortest(lives: &[Option<Duration>]) -> Option<Duration> {
    lives
        .iter()
        .flatten()
        .filter(|life| !life.is_zero())
        .min()
        .copied()
}

/// When a connection with these lives of its path segments is refreshed,
/// before jitter: after a fifth of the shortest, as NSM's client does
/// (sdk pkg/networkservice/common/refresh), but never at once and again.
pub(super) fn refresh_after(lives: &[Option<Duration>]) -> Duration {
    let known = shortest(lives).map_or(UNKNOWN, |life| (life / PART).clamp(LEAST, MOST));
    let doubtful = lives
        .iter()
        .any(|life| life.is_none_or(|life| life.is_zero()));
    if doubtful { known.min(UNKNOWN) } else { known }
}
