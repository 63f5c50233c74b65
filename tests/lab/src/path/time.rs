//! RFC 3339 with up to nine fractional digits, as Go's `RFC3339Nano`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

const DAY: i64 = 86_400;

/// Writes UTC, without trailing zeros of the fraction.
pub fn format_rfc3339(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    let seconds = since.as_secs() as i64;
    let (year, month, day) = civil(seconds.div_euclid(DAY));
    let rest = seconds.rem_euclid(DAY);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    let mut text = format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}");
    if since.subsec_nanos() > 0 {
        let fraction = format!(".{:09}", since.subsec_nanos());
        text.push_str(fraction.trim_end_matches('0'));
    }
    text + "Z"
}

/// Reads a time from 1970 on, in UTC or with an offset.
pub fn parse_rfc3339(text: &str) -> Result<SystemTime, String> {
    parse(text).ok_or_else(|| format!("{text:?} is no RFC 3339 time"))
}

fn parse(text: &str) -> Option<SystemTime> {
    if !text.is_ascii() || text.len() < 20 {
        return None;
    }
    let (head, rest) = text.split_at(19);
    let number = |from: usize, to: usize| digits(&head[from..to]);
    for (at, want) in [(4, b'-'), (7, b'-'), (10, b'T'), (13, b':'), (16, b':')] {
        if head.as_bytes()[at] != want {
            return None;
        }
    }
    let (month, day) = (number(5, 7)?, number(8, 10)?);
    let (hour, minute, second) = (number(11, 13)?, number(14, 16)?, number(17, 19)?);
    let year = number(0, 4)?;
    let sound = (1..=12).contains(&month)
        && (1..=31).contains(&day)
        && hour < 24
        && minute < 60
        && second < 60
        && civil(days(year, month, day)) == (year, month, day);
    if !sound {
        return None;
    }
    let (fraction, zone) = match rest.strip_prefix('.') {
        None => ("", rest),
        Some(rest) => rest.split_at(rest.find(['Z', '+', '-'])?),
    };
    if fraction.len() > 9 || (fraction.is_empty() && rest.starts_with('.')) {
        return None;
    }
    let nanos = digits(&format!("{fraction:0<9}"))?;
    let seconds = days(year, month, day) * DAY + hour * 3600 + minute * 60 + second - offset(zone)?;
    Some(UNIX_EPOCH + Duration::new(u64::try_from(seconds).ok()?, nanos as u32))
}

fn offset(zone: &str) -> Option<i64> {
    if zone == "Z" {
        return Some(0);
    }
    let sign = match zone.as_bytes().first()? {
        b'+' => 1,
        b'-' => -1,
        _ => return None,
    };
    let (hours, minutes) = zone[1..].split_once(':')?;
    if hours.len() != 2 || minutes.len() != 2 {
        return None;
    }
    Some(sign * (digits(hours)? * 3600 + digits(minutes)? * 60))
}

fn digits(text: &str) -> Option<i64> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    text.parse().ok()
}

/// Days from 1970-01-01, with the year starting in March.
fn days(year: i64, month: i64, day: i64) -> i64 {
    let year = if month <= 2 { year - 1 } else { year };
    let era = year.div_euclid(400);
    let of_era = year - era * 400;
    let of_year = (153 * ((month + 9) % 12) + 2) / 5 + day - 1;
    era * 146_097 + of_era * 365 + of_era / 4 - of_era / 100 + of_year - 719_468
}

fn civil(days: i64) -> (i64, i64, i64) {
    let z = days + 719_468;
    let era = z.div_euclid(146_097);
    let of_era = z - era * 146_097;
    let year = (of_era - of_era / 1460 + of_era / 36_524 - of_era / 146_096) / 365;
    let of_year = of_era - (365 * year + year / 4 - year / 100);
    let shifted = (5 * of_year + 2) / 153;
    let day = of_year - (153 * shifted + 2) / 5 + 1;
    let month = if shifted < 10 {
        shifted + 3
    } else {
        shifted - 9
    };
    (year + era * 400 + i64::from(month <= 2), month, day)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn known_times() {
        for (text, seconds, nanos) in [
            ("1970-01-01T00:00:00Z", 0, 0),
            ("2000-02-29T23:59:59Z", 951_868_799, 0),
            ("2026-08-22T10:11:12.123456789Z", 1_787_393_472, 123_456_789),
            ("2026-08-22T12:11:12.5+02:00", 1_787_393_472, 500_000_000),
            ("2100-03-01T00:00:00Z", 4_107_542_400, 0),
        ] {
            let at = UNIX_EPOCH + Duration::new(seconds, nanos);
            assert_eq!(parse_rfc3339(text), Ok(at), "{text}");
            assert_eq!(parse_rfc3339(&format_rfc3339(at)), Ok(at), "{text}");
        }
        for bad in [
            "",
            "2026-08-22",
            "2026-08-22 10:11:12Z",
            "2026-02-29T00:00:00Z",
            "2026-08-22T24:00:00Z",
            "2026-08-22T10:11:12",
            "2026-08-22T10:11:12.Z",
            "2026-08-22T10:11:12.1234567891Z",
            "2026-08-22T10:11:12+2:00",
            "1969-12-31T23:59:59Z",
        ] {
            assert!(parse_rfc3339(bad).is_err(), "{bad}");
        }
    }
}
