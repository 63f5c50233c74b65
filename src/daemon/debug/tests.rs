//! The line of JSON for fixed facts, and the facts of fixed files.

use std::fs;
use std::path::PathBuf;

use super::system::System;
use super::*;
use crate::kernel::error::KernelError;
use crate::kernel::report::Hop;

/// Paths and contents.
type Files<'a> = &'a [(&'a str, &'a str)];

/// A folder that ends with the test.
struct Root(PathBuf);

impl Root {
    fn new(name: &str, files: Files) -> Self {
        let root =
            Self(std::env::temp_dir().join(format!("meridio-debug-{name}-{}", std::process::id())));
        for (path, content) in files {
            let path = root.0.join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, content).unwrap();
        }
        root
    }
}

impl Drop for Root {
    fn drop(&mut self) {
        fs::remove_dir_all(&self.0).unwrap();
    }
}

const FILES: [(&str, &str); 11] = [
    (
        "proc/cpuinfo",
        "processor\t: 0\nvendor_id\t: AuthenticAMD\ncpu family\t: 25\nmodel\t\t: 17\n\
         model name\t: AMD \"EPYC\": 9\nstepping\t: 1\nmicrocode\t: 0x1\ncpu MHz\t\t: 2596.140\n\
         cache size\t: 1024 KB\nphysical id\t: 0\ncore id\t\t: 0\nflags\t\t: fpu vme\n\n\
         processor\t: 1\nCPU implementer\t: 0x41\nstepping\t: unknown\nFeatures\t: fp\n",
    ),
    (
        "sys/devices/system/cpu/cpu1/cpufreq/cpuinfo_max_freq",
        "3000000\n",
    ),
    ("sys/devices/system/cpu/cpu1/topology/core_id", "5\n"),
    ("proc/stat", "cpu  1 2 3\nbtime 1700000000\nprocesses 9\n"),
    ("proc/uptime", "5581.99 1.00\n"),
    ("proc/sys/kernel/hostname", "node-a\n"),
    ("proc/sys/kernel/osrelease", "6.18.1\n"),
    ("proc/sys/kernel/arch", "x86_64\n"),
    ("proc/1/stat", ""),
    ("proc/self/cgroup", "0::/docker/1\n"),
    ("etc/machine-id", "00112233445566778899aabbccddeeff\n"),
];

fn facts() -> Tables {
    let bridge = Interface {
        index: 5,
        name: "bridge0".to_owned(),
        mac: vec![2, 0, 0, 0xab, 0, 1],
        addresses: vec![
            "172.16.0.1/24".parse().unwrap(),
            "fd00::1/64".parse().unwrap(),
        ],
        mtu: 1500,
        up: true,
        master: 0,
        statistics: Some(Statistics {
            rx_packets: 1,
            tx_packets: 2,
            rx_bytes: 3,
            tx_bytes: u64::MAX,
            rx_errors: 5,
            tx_errors: 6,
            rx_dropped: 7,
            tx_dropped: 8,
        }),
    };
    let hop = |gateway: Option<&str>| Hop {
        interface: 5,
        gateway: gateway.map(|address| address.parse().unwrap()),
    };
    Tables {
        interfaces: Ok(vec![bridge]),
        rules: Ok(vec![Rule {
            table: 1,
            priority: 32765,
            mark: 16,
            source: Some("20.0.0.1/32".parse().unwrap()),
            destination: None,
        }]),
        routes: Ok(vec![Route {
            table: 1,
            interface: 5,
            destination: "::/0".parse().unwrap(),
            hops: vec![hop(Some("fd00::2")), hop(None), hop(Some("fd00::3"))],
            gateway: None,
            source: Some("fd00::1".parse().unwrap()),
        }]),
        neighbours: Ok(vec![Neighbour {
            address: "172.16.0.2".parse().unwrap(),
            mac: Vec::new(),
            state: 0x20,
            interface: 5,
        }]),
    }
}

#[test]
fn the_line_has_meridios_keys_in_its_order() {
    let root = Root::new("golden", &FILES);
    let system = System::read(&root.0);
    let environment = ["NSM_NAME=a \"b\"\n".to_owned()];
    let report = render("v1", 1_700_000_001, &facts(), &system, &environment);
    assert_eq!(report.notes, [""; 0]);
    assert_eq!(
        report.json,
        concat!(
            r#"{"version":"v0.0.1","meridio-version":"v1","unix-time":1700000001,"#,
            r#""network-interfaces":[{"index":5,"name":"bridge0","mac":"02:00:00:ab:00:01","#,
            r#""ips":["172.16.0.1/24","fd00::1/64"],"mtu":1500,"up":true,"master-index":0,"#,
            r#""statistics":{"rx-packets":1,"tx-packets":2,"rx-bytes":3,"#,
            r#""tx-bytes":18446744073709551615,"rx-errors":5,"tx-errors":6,"#,
            r#""rx-dropped":7,"tx-dropped":8}}],"#,
            r#""rules":[{"table":1,"priority":32765,"mark":16,"source":"20.0.0.1/32","#,
            r#""destination":""}],"#,
            r#""route":[{"table":1,"interface-index":5,"destination":"::/0","#,
            r#""nexthops":["fd00::2","fd00::3"],"gateway":"","source":"fd00::1"}],"#,
            r#""neighbors":[{"ip":"172.16.0.2","mac":"","state":"Failed","interface-index":5}],"#,
            r#""system":{"cpu-info":[{"cpu":0,"vendorId":"AuthenticAMD","family":"25","#,
            r#""model":"17","stepping":1,"physicalId":"0","coreId":"0","cores":1,"#,
            r#""modelName":"AMD \"EPYC\": 9","mhz":2596.14,"cacheSize":1024,"#,
            r#""flags":["fpu","vme"],"microcode":"0x1"},"#,
            r#"{"cpu":1,"vendorId":"0x41","family":"","model":"","stepping":0,"#,
            r#""physicalId":"","coreId":"5","cores":1,"modelName":"","mhz":3000,"#,
            r#""cacheSize":0,"flags":["fp"],"microcode":""}],"#,
            r#""host-info":{"hostname":"node-a","uptime":5581,"bootTime":1700000000,"#,
            r#""procs":1,"os":"linux","platform":"","platformFamily":"","#,
            r#""platformVersion":"","kernelVersion":"6.18.1","kernelArch":"x86_64","#,
            r#""virtualizationSystem":"docker","virtualizationRole":"guest","#,
            r#""hostId":"00112233-4455-6677-8899-aabbccddeeff"}},"#,
            r#""environment-variables":["NSM_NAME=a \"b\"\n"]}"#,
        )
    );
}

#[test]
fn what_cannot_be_read_is_null_and_noted() {
    let root = Root::new("null", &[("etc/os-release", "")]);
    let refused = |what: &str| KernelError(format!("dump of {what}: denied"));
    let tables = Tables {
        interfaces: Err(refused("Links")),
        rules: Err(refused("Rules")),
        routes: Err(refused("Routes")),
        neighbours: Err(refused("Neighbours")),
    };
    let report = render("v1", 0, &tables, &System::read(&root.0), &[]);
    assert_eq!(
        report.json,
        concat!(
            r#"{"version":"v0.0.1","meridio-version":"v1","unix-time":0,"#,
            r#""network-interfaces":null,"rules":null,"route":null,"neighbors":null,"#,
            r#""system":{"cpu-info":null,"host-info":null},"environment-variables":[]}"#,
        )
    );
    let beginnings = ["Links", "Rules", "Routes", "Neighbours"].map(|what| refused(what).0);
    assert_eq!(report.notes[..4], beginnings);
    assert_eq!(report.notes.len(), 6);
    assert!(report.notes[4].starts_with("/proc/cpuinfo: "), "{report:?}");
    assert!(report.notes[5].starts_with("/proc/stat: "), "{report:?}");
}

#[test]
fn states_have_their_names_and_unknown_ones_their_number() {
    for (state, name) in [(0x80, "Permanent"), (0x40, "No ARP"), (0, "none"), (3, "3")] {
        let row = Neighbour {
            address: "fd00::2".parse().unwrap(),
            mac: vec![2, 0, 0, 0, 0, 9],
            state,
            interface: 7,
        };
        assert_eq!(
            neighbour(&row),
            format!(
                r#"{{"ip":"fd00::2","mac":"02:00:00:00:00:09","state":"{name}","interface-index":7}}"#
            )
        );
    }
}

#[test]
fn platforms_and_where_they_run() {
    let release = "NAME=x\nID=\"centos\"\nVERSION_ID='9'\n";
    let table: [(&str, Files, [&str; 5]); 4] = [
        (
            "debian",
            &[
                ("etc/os-release", "ID=debian\nVERSION_ID=\"12\"\n"),
                ("etc/debian_version", "12.11\n"),
                ("proc/modules", "kvm_amd 1 0\n"),
            ],
            ["debian", "debian", "12.11", "kvm", "host"],
        ),
        (
            "centos",
            &[("etc/os-release", release), (".dockerenv", "")],
            ["centos", "rhel", "9", "docker", "guest"],
        ),
        (
            "alpine",
            &[
                ("etc/os-release", "ID=alpine\nVERSION_ID=3.20.1\n"),
                ("proc/xen/capabilities", "control_d\n"),
            ],
            ["alpine", "alpine", "3.20.1", "xen", "host"],
        ),
        ("none", &[], ["", "", "", "", ""]),
    ];
    for (name, files, expected) in table {
        let root = Root::new(name, &[files, &[("proc/stat", "")]].concat());
        let json = System::read(&root.0).host.unwrap().json();
        let host: serde_json::Value = serde_json::from_str(&json).unwrap();
        let found = [
            "platform",
            "platformFamily",
            "platformVersion",
            "virtualizationSystem",
            "virtualizationRole",
        ]
        .map(|key| host[key].as_str().unwrap());
        assert_eq!(found, expected, "{name}");
    }
}
