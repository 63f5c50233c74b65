//! What the machine itself discards. Every packet of a veth pair waits in the
//! queue of a CPU that all namespaces share (`net.core.netdev_max_backlog`); when
//! somebody's burst has filled it, the next packet is dropped, whosever it is.

/// The most lost packets of a window that are put down to the machine.
const EXCUSED_MAX: usize = 5;

/// How many of so many lost packets may be those that the machine discarded
/// `since` the one count until the other: they are not of the daemon's doing.
#[must_use]
pub fn excused(since: u64, until: u64, lost: usize) -> usize {
    let discarded = usize::try_from(until.saturating_sub(since)).unwrap_or(usize::MAX);
    discarded.min(EXCUSED_MAX).min(lost)
}

/// Packets that did not fit into the queue since the machine was started, of all
/// CPUs: the second column of `/proc/net/softnet_stat` (net/core/net-procfs.c).
/// 0 where it cannot be read.
#[must_use]
pub fn discarded() -> u64 {
    let table = std::fs::read_to_string("/proc/net/softnet_stat").unwrap_or_default();
    total(&table)
}

fn total(table: &str) -> u64 {
    let second = |line: &str| {
        let column = line.split_whitespace().nth(1)?;
        u64::from_str_radix(column, 16).ok()
    };
    table.lines().filter_map(second).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_is_blamed_for_no_more_than_it_discarded() {
        for (discarded, lost, expected) in [(0, 3, 0), (2, 3, 2), (200, 1, 1), (200, 90, 5)] {
            assert_eq!(excused(7, 7 + discarded, lost), expected);
        }
        assert_eq!(excused(7, 0, 3), 0);
    }

    #[test]
    fn the_second_columns_are_added() {
        let table = "112c7f24 00002043 0000000b 00000000\n0f5f8e35 0000000a 0000000d 00000000\n";
        assert_eq!(total(table), 0x2043 + 10);
        assert_eq!(total("nonsense\n"), 0);
    }
}
