//! `--debug` against what iproute2 says of the same namespace.

use std::collections::BTreeMap;
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::harness::{enter_netns, eventually, ip, json as ip_json, veth};

const COUNTERS: [&str; 4] = ["packets", "bytes", "errors", "dropped"];

/// Runs a program without any capability, and without any environment but the
/// search path.
fn powerless(program: &str, arguments: &[&str]) -> Output {
    Command::new("setpriv")
        .args(["--bounding-set=-all", "--inh-caps=-all", program])
        .args(arguments)
        .env_clear()
        .env("PATH", std::env::var_os("PATH").unwrap())
        .output()
        .expect("util-linux is installed")
}

fn report() -> Value {
    let output = powerless(env!("CARGO_BIN_EXE_proxy"), &["--debug"]);
    assert!(output.status.success(), "{output:?}");
    assert!(output.stderr.is_empty(), "{output:?}");
    assert_eq!(output.stdout.iter().filter(|c| **c == b'\n').count(), 1);
    serde_json::from_slice(&output.stdout).unwrap()
}

/// The rows of a list in an order of their own, to be compared.
fn sorted(rows: impl IntoIterator<Item = Value>) -> Vec<String> {
    let mut rows: Vec<String> = rows.into_iter().map(|row| row.to_string()).collect();
    rows.sort();
    rows
}

fn rows(report: &Value, key: &str) -> Vec<Value> {
    report[key].as_array().expect(key).clone()
}

fn text(value: &Value) -> &str {
    value.as_str().unwrap_or_default()
}

/// Of both families, with numbers in place of names.
fn of_both(arguments: &str) -> Vec<(u8, Value)> {
    [("-4", 32), ("-6", 128)]
        .into_iter()
        .flat_map(|(family, bits)| {
            ip_json(&format!("-N {family} {arguments}"))
                .into_iter()
                .map(move |row| (bits, row))
        })
        .collect()
}

/// The indexes of the links by name; 0 for no name.
fn indexes() -> BTreeMap<String, Value> {
    let mut indexes: BTreeMap<String, Value> = ip_json("link show")
        .iter()
        .map(|link| (text(&link["ifname"]).to_owned(), link["ifindex"].clone()))
        .collect();
    indexes.insert(String::new(), 0.into());
    indexes
}

fn links() -> Vec<Value> {
    let indexes = indexes();
    let address = |info: &Value| {
        // With a peer, iproute2 gives the length of the peer's network.
        let length = match info["address"] {
            Value::Null => info["prefixlen"].clone(),
            _ => 32.into(),
        };
        json!(format!("{}/{length}", text(&info["local"])))
    };
    ip_json("address show")
        .iter()
        .map(|link| {
            let mac = text(&link["address"]).trim_start_matches("00:00:00:00:00:00");
            let infos = link["addr_info"].as_array().unwrap();
            let flags = link["flags"].as_array().unwrap();
            json!({
                "index": link["ifindex"],
                "name": link["ifname"],
                "mac": mac,
                "ips": infos.iter().map(address).collect::<Vec<_>>(),
                "mtu": link["mtu"],
                "up": flags.contains(&json!("UP")),
                "master-index": indexes[text(&link["master"])],
            })
        })
        .collect()
}

/// A network as iproute2 shows it: a host's without its length.
fn network(address: &Value, length: &Value, bits: u8) -> String {
    match (text(address), length.as_u64()) {
        ("" | "all", _) => String::new(),
        (address, Some(length)) => format!("{address}/{length}"),
        (address, None) => format!("{address}/{bits}"),
    }
}

fn rules() -> Vec<Value> {
    of_both("rule show")
        .into_iter()
        .map(|(bits, rule)| {
            let mark = text(&rule["fwmark"]).trim_start_matches("0x");
            json!({
                "table": text(&rule["table"]).parse::<u32>().unwrap(),
                "priority": rule["priority"],
                "mark": u32::from_str_radix(mark, 16).unwrap_or_default(),
                "source": network(&rule["src"], &rule["srclen"], bits),
                "destination": network(&rule["dst"], &rule["dstlen"], bits),
            })
        })
        .collect()
}

/// Without interfaces that differ between the hops.
fn routes() -> Vec<Value> {
    let indexes = indexes();
    of_both("route show table all")
        .into_iter()
        .map(|(bits, route)| {
            let gateway = |row: &Value| match &row["via"] {
                Value::Null => text(&row["gateway"]).to_owned(),
                via => text(&via["host"]).to_owned(),
            };
            let hops = route["nexthops"].as_array().cloned().unwrap_or_default();
            let dev = hops.first().map_or(&route["dev"], |hop| &hop["dev"]);
            let destination = match (text(&route["dst"]), bits) {
                ("default", 32) => "0.0.0.0/0".to_owned(),
                ("default", _) => "::/0".to_owned(),
                (dst, _) if dst.contains('/') => dst.to_owned(),
                (dst, _) => format!("{dst}/{bits}"),
            };
            let table = match &route["table"] {
                Value::Null => 254,
                table => text(table).parse::<u32>().unwrap(),
            };
            json!({
                "table": table,
                "interface-index": indexes[text(dev)],
                "destination": destination,
                "nexthops": hops.iter().map(gateway).collect::<Vec<_>>(),
                "gateway": gateway(&route),
                "source": text(&route["prefsrc"]),
            })
        })
        .collect()
}

fn neighbours() -> Vec<Value> {
    let indexes = indexes();
    let name = |state: &Value| match text(state) {
        "NOARP" => "No ARP".to_owned(),
        upper => format!("{}{}", &upper[..1], upper[1..].to_lowercase()),
    };
    of_both("neighbour show nud all")
        .into_iter()
        .map(|(_, row)| {
            json!({
                "ip": row["dst"],
                "mac": text(&row["lladdr"]),
                "state": name(&row["state"][0]),
                "interface-index": indexes[text(&row["dev"])],
            })
        })
        .collect()
}

/// A data plane as of the daemon, and around it what else it shows.
fn populate() {
    veth("veth0");
    veth("veth1");
    ip("link add bridge0 type bridge");
    ip("link set veth0 master bridge0");
    ip("link set bridge0 up");
    ip("link set veth1-p down mtu 1300");
    ip("address add 172.16.0.1/24 dev bridge0");
    ip("address add 10.9.0.1 peer 10.9.0.2/24 dev veth1-p");
    ip("address add 10.1.0.1/16 dev veth1");
    ip("-6 address add fd00::1/64 dev bridge0 nodad");
    for (family, net, vip) in [("-4", "172.16.0.", "20.0.0.1"), ("-6", "fd00::", "fd20::1")] {
        ip(&format!(
            "{family} route add default table 1 nexthop via {net}2 dev bridge0 \
             nexthop via {net}3 dev bridge0 nexthop via {net}4 dev bridge0"
        ));
        ip(&format!(
            "{family} route add unreachable default table 1 metric 4278198272"
        ));
        ip(&format!("{family} rule add from {vip} table 1"));
        ip(&format!(
            "{family} neighbour add {net}2 lladdr 02:00:00:00:00:02 dev bridge0 nud permanent"
        ));
        ip(&format!(
            "{family} neighbour add {net}3 lladdr 02:00:00:00:00:03 dev bridge0 nud noarp"
        ));
        ip(&format!(
            "{family} route add default via {net}9 dev bridge0"
        ));
    }
    ip("rule add from 20.0.1.0/24 to 1.2.3.4 fwmark 0x10/0xff table 1000");
    ip("-6 rule add to fd21::/48 table 400000");
    ip("route add 8.0.0.0/8 via 10.1.0.9 src 10.1.0.1 table 1000");
    ip("route add 7.0.0.0/8 via inet6 fd00::7 dev bridge0");
    ip("-6 route add fd08::/16 table 400000 dev veth1");
}

#[test]
fn the_report_is_what_iproute2_says() {
    enter_netns();
    populate();
    let denied = powerless("ip", &["link", "set", "lo", "mtu", "1280"]);
    assert!(!denied.status.success(), "the capabilities are still there");
    // Until link-local addresses are settled, both change.
    eventually("what iproute2 says", || {
        let report = report();
        let mut interfaces = rows(&report, "network-interfaces");
        for link in &mut interfaces {
            link.as_object_mut().unwrap().remove("statistics");
        }
        let found = [
            sorted(interfaces),
            sorted(rows(&report, "rules")),
            sorted(rows(&report, "route")),
            sorted(rows(&report, "neighbors")),
        ];
        let said = [
            sorted(links()),
            sorted(rules()),
            sorted(routes()),
            sorted(neighbours()),
        ];
        let differ = || {
            let ours = found
                .iter()
                .flatten()
                .filter(|row| !said.iter().flatten().any(|r| r == *row));
            let theirs = said
                .iter()
                .flatten()
                .filter(|row| !found.iter().flatten().any(|r| r == *row));
            (
                ours.cloned().collect::<Vec<_>>(),
                theirs.cloned().collect::<Vec<_>>(),
            )
        };
        if found == said { Ok(()) } else { Err(differ()) }
    });
    let report = report();
    let ours = rows(&report, "route")
        .into_iter()
        .filter(|route| route["table"] == 1)
        .count();
    assert_eq!(ours, 4, "{report}");
    let rule = json!({
        "table": 1, "priority": 32765, "mark": 0, "source": "20.0.0.1/32", "destination": "",
    });
    assert!(rows(&report, "rules").contains(&rule), "{report}");
    // Route lookups have made neighbours of their own, maybe; ours are named.
    let named = rows(&report, "neighbors");
    for state in ["Permanent", "No ARP"] {
        assert!(named.iter().any(|row| row["state"] == state), "{report}");
    }
}

/// All counters of `ip -s link` by link and direction.
fn counters() -> BTreeMap<(String, String), u64> {
    let mut counters = BTreeMap::new();
    for link in ip_json("-s link show") {
        for direction in ["rx", "tx"] {
            for counter in COUNTERS {
                counters.insert(
                    (
                        text(&link["ifname"]).to_owned(),
                        format!("{direction}-{counter}"),
                    ),
                    link["stats64"][direction][counter].as_u64().unwrap(),
                );
            }
        }
    }
    counters
}

#[test]
fn the_counters_lie_between_two_looks_of_iproute2() {
    enter_netns();
    veth("veth0");
    let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
    for _ in 0..3 {
        socket
            .send_to(b"12345", socket.local_addr().unwrap())
            .unwrap();
    }
    let before = counters();
    let report = report();
    let after = counters();
    let mut seen = 0;
    for link in rows(&report, "network-interfaces") {
        for (counter, value) in link["statistics"].as_object().unwrap() {
            let key = (text(&link["name"]).to_owned(), counter.clone());
            let range = before[&key]..=after[&key];
            let value = value.as_u64().unwrap();
            assert!(range.contains(&value), "{key:?}: {value}, not in {range:?}");
            seen += 1;
        }
    }
    assert_eq!(seen, before.len());
    let lo = &rows(&report, "network-interfaces")[0];
    assert_eq!(lo["name"], "lo");
    assert_eq!(lo["statistics"]["rx-packets"], 3);
    assert_eq!(lo["statistics"]["tx-bytes"], 3 * (20 + 8 + 5));
}
