//! `--debug`: the state of the system as one line of JSON, with the keys of
//! Meridio's (pkg/debug) in its order. A table that cannot be read is `null`,
//! as there, and a note says why.
//!
//! What Meridio v1.2.8 means to show and does not is shown: the routes of all
//! tables, sources of rules, interfaces of routes, names of neighbours' states.
//! The multicast rules, which no key tells from the others, are left out, and
//! so are secrets.

mod environment;
mod json;
mod system;
#[cfg(test)]
mod tests;

use std::fmt::Display;
use std::path::Path;
use std::time::UNIX_EPOCH;

use ipnetwork::IpNetwork;

use self::json::{list, object, text};
use self::system::System;
use crate::cli::VERSION;
use crate::kernel::report::{self, Interface, Neighbour, Route, Rule, Statistics, Tables};
use crate::sync::clock;

/// The version of the JSON's form.
const FORM: &str = "v0.0.1";

/// `NUD_*` of linux/neighbour.h, as Meridio names them.
const STATES: [(u16, &str); 9] = [
    (0x00, "none"),
    (0x01, "Incomplete"),
    (0x02, "Reachable"),
    (0x04, "Stale"),
    (0x08, "Delay"),
    (0x10, "Probe"),
    (0x20, "Failed"),
    (0x40, "No ARP"),
    (0x80, "Permanent"),
];

/// What `--debug` prints.
#[derive(Debug)]
pub struct Report {
    /// For standard output, without a line feed.
    pub json: String,
    /// For standard error: what could not be read, and why.
    pub notes: Vec<String>,
}

/// Looks at the system. It needs no capability and no setting.
#[must_use]
pub fn report() -> Report {
    let unix_time = clock::wall()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    render(
        VERSION,
        unix_time,
        &report::tables(),
        &System::read(Path::new("/")),
        &environment::shown(std::env::vars_os()),
    )
}

fn render(
    version: &str,
    unix_time: u64,
    tables: &Tables,
    system: &System,
    environment: &[String],
) -> Report {
    let mut notes = Vec::new();
    let interfaces = table(&tables.interfaces, interface, &mut notes);
    let rules = table(&tables.rules, rule, &mut notes);
    let routes = table(&tables.routes, route, &mut notes);
    let neighbours = table(&tables.neighbours, neighbour, &mut notes);
    let cpus = table(&system.cpus, system::Cpu::json, &mut notes);
    let host = match &system.host {
        Ok(host) => host.json(),
        Err(error) => null(error, &mut notes),
    };
    let json = object(&[
        ("version", text(FORM)),
        ("meridio-version", text(version)),
        ("unix-time", unix_time.to_string()),
        ("network-interfaces", interfaces),
        ("rules", rules),
        ("route", routes),
        ("neighbors", neighbours),
        ("system", object(&[("cpu-info", cpus), ("host-info", host)])),
        (
            "environment-variables",
            list(environment, |variable| text(variable)),
        ),
    ]);
    Report { json, notes }
}

/// The rows of a table, or `null` and a note.
fn table<T, E: Display>(
    rows: &Result<Vec<T>, E>,
    row: impl Fn(&T) -> String,
    notes: &mut Vec<String>,
) -> String {
    match rows {
        Ok(rows) => list(rows, row),
        Err(error) => null(error, notes),
    }
}

fn null(error: &impl Display, notes: &mut Vec<String>) -> String {
    notes.push(error.to_string());
    "null".to_owned()
}

fn interface(link: &Interface) -> String {
    object(&[
        ("index", link.index.to_string()),
        ("name", text(&link.name)),
        ("mac", text(&mac(&link.mac))),
        ("ips", list(&link.addresses, shown)),
        ("mtu", link.mtu.to_string()),
        ("up", link.up.to_string()),
        ("master-index", link.master.to_string()),
        (
            "statistics",
            link.statistics
                .as_ref()
                .map_or_else(|| "null".to_owned(), statistics),
        ),
    ])
}

fn statistics(counters: &Statistics) -> String {
    object(&[
        ("rx-packets", counters.rx_packets.to_string()),
        ("tx-packets", counters.tx_packets.to_string()),
        ("rx-bytes", counters.rx_bytes.to_string()),
        ("tx-bytes", counters.tx_bytes.to_string()),
        ("rx-errors", counters.rx_errors.to_string()),
        ("tx-errors", counters.tx_errors.to_string()),
        ("rx-dropped", counters.rx_dropped.to_string()),
        ("tx-dropped", counters.tx_dropped.to_string()),
    ])
}

fn rule(rule: &Rule) -> String {
    let selector = |network: &Option<IpNetwork>| text(&or_empty(network.as_ref()));
    object(&[
        ("table", rule.table.to_string()),
        ("priority", rule.priority.to_string()),
        ("mark", rule.mark.to_string()),
        ("source", selector(&rule.source)),
        ("destination", selector(&rule.destination)),
    ])
}

fn route(route: &Route) -> String {
    let gateways: Vec<_> = route.hops.iter().filter_map(|hop| hop.gateway).collect();
    object(&[
        ("table", route.table.to_string()),
        ("interface-index", route.interface.to_string()),
        ("destination", shown(&route.destination)),
        ("nexthops", list(&gateways, shown)),
        ("gateway", text(&or_empty(route.gateway.as_ref()))),
        ("source", text(&or_empty(route.source.as_ref()))),
    ])
}

fn neighbour(neighbour: &Neighbour) -> String {
    let state = STATES
        .iter()
        .find(|(number, _)| *number == neighbour.state)
        .map_or_else(|| neighbour.state.to_string(), |(_, name)| (*name).into());
    object(&[
        ("ip", shown(&neighbour.address)),
        ("mac", text(&mac(&neighbour.mac))),
        ("state", text(&state)),
        ("interface-index", neighbour.interface.to_string()),
    ])
}

fn mac(bytes: &[u8]) -> String {
    let pairs: Vec<String> = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    pairs.join(":")
}

fn shown(value: &impl Display) -> String {
    text(&value.to_string())
}

fn or_empty(value: Option<&impl Display>) -> String {
    value.map(ToString::to_string).unwrap_or_default()
}
