//! Between wire messages and what `core` knows.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use protobuf::MessageField;
use protobuf::well_known_types::timestamp::Timestamp;

use crate::core::ip_context::{IpContext, Policy};
use crate::proto::connection::Connection;

/// A moment as protobuf has it; those before 1970 do not occur.
#[must_use]
pub fn timestamp(at: SystemTime) -> MessageField<Timestamp> {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    MessageField::some(Timestamp {
        seconds: i64::try_from(since.as_secs()).unwrap_or(i64::MAX),
        nanos: i32::try_from(since.subsec_nanos()).unwrap_or(0),
        ..Timestamp::default()
    })
}

/// The moment that a peer sent; `None` when absent, before 1970, or beyond
/// what the system's clock can show.
#[must_use]
pub fn system_time(at: &MessageField<Timestamp>) -> Option<SystemTime> {
    let at = at.as_ref()?;
    let seconds = u64::try_from(at.seconds).ok()?;
    let nanos = u32::try_from(at.nanos)
        .ok()
        .filter(|n| *n < 1_000_000_000)?;
    UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
}

/// Reads a time as Go prints it in RFC 3339 with up to nine digits of
/// fraction; `None` when it is something else.
#[must_use]
pub fn parse_rfc3339(text: &str) -> Option<SystemTime> {
    let number = |from: usize, to: usize| -> Option<i64> {
        let digits = text.get(from..to)?;
        let all = digits.bytes().all(|byte| byte.is_ascii_digit());
        all.then(|| digits.parse().ok()).flatten()
    };
    let shape = [(4, "-"), (7, "-"), (10, "T"), (13, ":"), (16, ":")];
    if !shape
        .iter()
        .all(|(at, mark)| text.get(*at..at + 1) == Some(mark))
    {
        return None;
    }
    let (year, month, day) = (number(0, 4)?, number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    let plausible = (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second <= 60;
    if !plausible {
        return None;
    }
    let (nanos, zone) = fraction(text.get(19..)?)?;
    let seconds = days_since_1970(year, month, day) * 86_400 + hour * 3_600 + minute * 60 + second;
    let seconds = u64::try_from(seconds - offset(zone)?).ok()?;
    UNIX_EPOCH.checked_add(Duration::new(seconds, nanos))
}

/// Nanoseconds of `.123…`, and the rest of the text.
fn fraction(text: &str) -> Option<(u32, &str)> {
    let Some(rest) = text.strip_prefix('.') else {
        return Some((0, text));
    };
    let digits = rest.bytes().take_while(u8::is_ascii_digit).count();
    if !(1..=9).contains(&digits) {
        return None;
    }
    let (fraction, zone) = rest.split_at(digits);
    let nanos: u32 = format!("{fraction:0<9}").parse().ok()?;
    Some((nanos, zone))
}

/// Seconds east of Greenwich of `Z` or `±hh:mm`.
fn offset(zone: &str) -> Option<i64> {
    if zone == "Z" {
        return Some(0);
    }
    let sign = match zone.get(..1)? {
        "+" => 1,
        "-" => -1,
        _ => return None,
    };
    let (hours, minutes) = zone.get(1..)?.split_once(':')?;
    let two = |text: &str, below: i64| -> Option<i64> {
        let digits = text.len() == 2 && text.bytes().all(|byte| byte.is_ascii_digit());
        let number: i64 = digits.then(|| text.parse().ok()).flatten()?;
        (number < below).then_some(number)
    };
    Some(sign * (two(hours, 24)? * 3_600 + two(minutes, 60)? * 60))
}

/// Days from 1970-01-01 in the Gregorian calendar; years begin in March here,
/// so that the leap day is the last of its year.
fn days_since_1970(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let month_from_march = (month + 9) % 12;
    let day_of_year = (153 * month_from_march + 2) / 5 + day - 1;
    let leap_days = year.div_euclid(4) - year.div_euclid(100) + year.div_euclid(400);
    year * 365 + leap_days + day_of_year - 719_468
}

/// The part of a connection's context that the proxy answers.
#[must_use]
pub fn ip_context(connection: &Connection) -> IpContext {
    let context = connection.context.ip_context.get_or_default();
    IpContext {
        src: context.src_ip_addrs.clone(),
        dst: context.dst_ip_addrs.clone(),
        gateways: context.extra_prefixes.clone(),
        policies: context
            .policies
            .iter()
            .map(|policy| Policy {
                from: policy.from.clone(),
                next_hops: policy
                    .routes
                    .iter()
                    .map(|route| route.nextHop.clone())
                    .collect(),
            })
            .collect(),
    }
}

/// Writes the answer back, and leaves all else in the context as it came.
pub fn set_ip_context(connection: &mut Connection, answer: IpContext, mtu: u32) {
    let context = connection.context.mut_or_insert_default();
    context.MTU = mtu;
    let ip = context.ip_context.mut_or_insert_default();
    let IpContext {
        src,
        dst,
        gateways,
        policies,
    } = answer;
    ip.src_ip_addrs = src;
    ip.dst_ip_addrs = dst;
    ip.extra_prefixes = gateways;
    for (policy, answer) in ip.policies.iter_mut().zip(policies) {
        for (route, next_hop) in policy.routes.iter_mut().zip(answer.next_hops) {
            route.nextHop = next_hop;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nsm::caller::rfc3339_nano;

    #[test]
    fn times_as_go_prints_them() {
        let at = |seconds, nanos| Some(UNIX_EPOCH + Duration::new(seconds, nanos));
        for (text, expected) in [
            ("1970-01-01T00:00:00Z", at(0, 0)),
            ("2024-02-29T12:34:56.5Z", at(1_709_210_096, 500_000_000)),
            (
                "2026-11-24T23:50:16.123456789Z",
                at(1_795_564_216, 123_456_789),
            ),
            ("2026-11-25T01:50:16+02:00", at(1_795_564_216, 0)),
            ("2026-11-24T22:20:16-01:30", at(1_795_564_216, 0)),
            ("2000-03-01T00:00:00Z", at(951_868_800, 0)),
            ("1900-03-01T00:00:00Z", None),
            ("", None),
            ("2026-11-24", None),
            ("2026-11-24T23:50:16", None),
            ("2026-11-24 23:50:16Z", None),
            ("2026-13-24T23:50:16Z", None),
            ("2026-11-24T24:00:00Z", None),
            ("2026-11-24T23:50:16.Z", None),
            ("2026-11-24T23:50:16.1234567890Z", None),
            ("2026-11-24T23:50:16+2:00", None),
            ("2026-11-24T23:50:16+99:00", None),
            ("+026-11-24T23:50:16Z", None),
            ("２026-11-24T23:50:16Z", None),
        ] {
            assert_eq!(parse_rfc3339(text), expected, "{text}");
        }
    }

    #[test]
    fn reads_what_this_process_writes() {
        for (seconds, nanos) in [(0, 0), (951_782_399, 1), (4_102_444_800, 120_000_000)] {
            let at = UNIX_EPOCH + Duration::new(seconds, nanos);
            assert_eq!(parse_rfc3339(&rfc3339_nano(at)), Some(at));
        }
    }

    #[test]
    fn hostile_times() {
        let sent = |seconds, nanos| {
            system_time(&MessageField::some(Timestamp {
                seconds,
                nanos,
                ..Timestamp::default()
            }))
        };
        assert_eq!(system_time(&MessageField::none()), None);
        assert_eq!(sent(-1, 0), None);
        assert_eq!(sent(0, -1), None);
        assert_eq!(sent(0, 1_000_000_000), None);
        assert!(sent(i64::MAX, 999_999_999).is_some(), "far, but a time");
        let at = UNIX_EPOCH + Duration::new(5, 6);
        assert_eq!(system_time(&timestamp(at)), Some(at));
    }
}
