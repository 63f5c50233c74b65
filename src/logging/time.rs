//! Timestamps in the log's form: local time with its offset, at most three
//! digits of a second, trailing zeros left out (Go's layout
//! `2006-01-02T15:04:05.999-07:00`).
//!
//! One of the few files with `unsafe`: the time zone is libc's to know.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// The moment `at` in local time.
pub(super) fn format(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    let seconds = libc::time_t::try_from(since.as_secs()).unwrap_or(libc::time_t::MAX);
    text(&local(seconds), since.subsec_millis())
}

fn local(seconds: libc::time_t) -> libc::tm {
    // SAFETY: `tm` is plain data for which all zeros is a valid value; its one
    // pointer, the zone's name, is never read here.
    let mut tm: libc::tm = unsafe { std::mem::zeroed() };
    // SAFETY: both pointers refer to live values of this frame, and localtime_r
    // keeps neither. It reads TZ, which nothing in this process changes. On
    // failure (a year beyond `int`) `tm` stays valid.
    unsafe { libc::localtime_r(&raw const seconds, &raw mut tm) };
    tm
}

fn text(tm: &libc::tm, millis: u32) -> String {
    let fraction = match format!("{millis:03}").trim_end_matches('0') {
        "" => String::new(),
        digits => format!(".{digits}"),
    };
    let minutes = tm.tm_gmtoff / 60;
    format!(
        "{:04}-{:02}-{:02}T{:02}:{:02}:{:02}{fraction}{}{:02}:{:02}",
        i64::from(tm.tm_year) + 1900,
        tm.tm_mon + 1,
        tm.tm_mday,
        tm.tm_hour,
        tm.tm_min,
        tm.tm_sec,
        if minutes < 0 { '-' } else { '+' },
        minutes.abs() / 60,
        minutes.abs() % 60,
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn layout() {
        let mut tm = local(0);
        tm.tm_year = 126;
        tm.tm_mon = 10;
        tm.tm_mday = 24;
        (tm.tm_hour, tm.tm_min, tm.tm_sec) = (3, 4, 5);
        for (offset, millis, expected) in [
            (0, 0, "2026-11-24T03:04:05+00:00"),
            (0, 120, "2026-11-24T03:04:05.12+00:00"),
            (3600, 7, "2026-11-24T03:04:05.007+01:00"),
            (-12_600, 999, "2026-11-24T03:04:05.999-03:30"),
        ] {
            tm.tm_gmtoff = offset;
            assert_eq!(text(&tm, millis), expected);
        }
    }

    #[test]
    fn far_times_do_not_fail() {
        assert!(format(UNIX_EPOCH + Duration::from_secs(1 << 60)).contains('T'));
    }
}
