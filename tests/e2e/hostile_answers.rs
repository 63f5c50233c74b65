//! An nsmgr whose answers to a Request can be decoded, but not be used: none
//! of them touches the pod's interfaces or another connection.

use meridio_proxy::proto::connection::Connection;

use super::hostile::{Hostile, assert_held, held, lines, says};
use super::{during, lab, steady};

/// An answer, and a word of what is said of it.
type Odd = (&'static str, &'static str, fn(&mut Connection));

fn named(connection: &mut Connection, ifname: &str) {
    let mechanism = connection.mechanism.mut_or_insert_default();
    mechanism
        .parameters
        .insert("name".to_owned(), ifname.to_owned());
}

fn peers(connection: &mut Connection, addresses: &[&str]) {
    let context = connection.context.mut_or_insert_default();
    let ip = context.ip_context.mut_or_insert_default();
    ip.dst_ip_addrs = addresses.iter().map(|&text| text.to_owned()).collect();
}

fn own_addresses(connection: &mut Connection) {
    let context = connection.context.mut_or_insert_default();
    let ip = context.ip_context.mut_or_insert_default();
    ip.dst_ip_addrs.clone_from(&ip.src_ip_addrs);
}

/// The bridge has 172.16.0.1/24 and fd00::1/64.
#[rustfmt::skip]
const ODD: [Odd; 24] = [
    ("loopback", "the pod's own", |c| named(c, "lo")),
    ("primary", "the pod's own", |c| named(c, "eth0")),
    ("bridge", "the pod's own", |c| named(c, "bridge0")),
    ("empty", "interface name", |c| named(c, "")),
    ("slash", "interface name", |c| named(c, "a/b")),
    ("parent", "interface name", |c| named(c, "..")),
    ("long", "interface name", |c| named(c, "sixteen-bytes-ok")),
    ("space", "interface name", |c| named(c, "a b")),
    ("nul", "interface name", |c| named(c, "a\0b")),
    ("newline", "interface name", |c| named(c, "a\nb")),
    ("letters", "interface name", |c| named(c, "é")),
    ("pattern", "interface name", |c| named(c, "eth%d")),
    ("nameless", "no interface name", |c| c.mechanism.mut_or_insert_default().parameters.clear()),
    ("memif", "MEMIF", |c| "MEMIF".clone_into(&mut c.mechanism.mut_or_insert_default().type_)),
    ("pathless", "the path", |c| c.path.clear()),
    ("index", "the path has index", |c| c.path.mut_or_insert_default().index = u32::MAX),
    ("stranger", "the connection's id", |c| "x".repeat(30_000).clone_into(&mut c.id)),
    ("elsewhere", "connected to endpoint", |c| "lb-1".clone_into(&mut c.network_service_endpoint_name)),
    ("no-address", "is no address", |c| peers(c, &["rubbish", "fd00::9/64"])),
    ("outside", "no neighbour", |c| peers(c, &["10.1.2.3/24", "fd00::9/64"])),
    ("all", "no neighbour", |c| peers(c, &["0.0.0.0/0", "::/0"])),
    ("gateway", "no neighbour", |c| peers(c, &["172.16.0.1/24", "fd00::1/64"])),
    ("own", "no neighbour", own_addresses),
    ("one-family", "no IPv4 address", |c| peers(c, &["fd00::9/64", "fd00::9/64"])),
];

/// What another LB has is well formed, and that of the one that had it first.
#[test]
fn an_lb_that_names_what_another_has_takes_nothing_from_it() {
    let mut lab = lab(2, 1);
    let traffic = steady(&lab);
    let before = held(&lab);
    let links = lab.rtnl.links().unwrap();
    let port = links.iter().find(|link| link.alias.ends_with("-lb-1"));
    let ifname = port.unwrap().name.clone();
    let addresses: Vec<String> = (lab.ipam.allocations().iter())
        .filter(|(child, _)| child.child.ends_with("-lb-1-src"))
        .map(|(_, address)| address.to_string())
        .collect();
    assert_eq!(addresses.len(), 2, "{addresses:?}");
    let step = during(&traffic, || {
        for (name, says_so) in [
            ("lb-port", "several connections name the interface"),
            ("lb-twin", "is that of LB lb-1"),
        ] {
            let since = lines(&lab);
            let (ifname, addresses) = (ifname.clone(), addresses.clone());
            lab.nsmgr.tamper(move |connection| {
                match connection.network_service_endpoint_name.as_str() {
                    "lb-port" => named(connection, &ifname),
                    "lb-twin" => {
                        let context = connection.context.mut_or_insert_default();
                        let ip = context.ip_context.mut_or_insert_default();
                        ip.dst_ip_addrs.clone_from(&addresses);
                    }
                    _ => {}
                }
            });
            (lab.nsmgr).add_endpoint(&lab.lb_service(), Hostile::endpoint(name, "nse"));
            says(&lab, since, &[says_so]);
            lab.nsmgr.remove_endpoint(name);
        }
        lab.nsmgr.tamper(|_| {});
    });
    assert_eq!(step.lost_steady, 0, "{step}");
    assert_held(&lab, &before);
    lab.add_lb().unwrap();
}

#[test]
fn answers_that_cannot_be_used_disturb_nobody() {
    let mut lab = lab(2, 1);
    let traffic = steady(&lab);
    let before = held(&lab);
    let step = during(&traffic, || {
        for (what, word, change) in ODD {
            let since = lines(&lab);
            let name = format!("lb-{what}");
            let wanted = name.clone();
            lab.nsmgr.tamper(move |connection| {
                if connection.network_service_endpoint_name == wanted {
                    change(connection);
                }
            });
            (lab.nsmgr).add_endpoint(&lab.lb_service(), Hostile::endpoint(&name, "nse"));
            says(&lab, since, &["nsmgr's answer is not used", word, &name]);
            lab.nsmgr.remove_endpoint(&name);
        }
        let daemon = lab.daemon().unwrap();
        daemon.health("Readiness").unwrap();
        lab.nsmgr.tamper(|_| {});
    });
    assert_eq!(step.lost_steady, 0, "{step}");
    assert_held(&lab, &before);
    assert_eq!(lab.infra.leaked().unwrap(), 0);
    lab.add_lb().unwrap();
}
