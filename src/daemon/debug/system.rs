//! The machine: processors and host, from /proc, /sys and /etc, with the keys
//! and sources of gopsutil (v3), which Meridio uses. A fact that is not to be
//! had is empty or 0, as there.

use std::fs;
use std::io;
use std::path::Path;

use super::json::{list, object, text};

/// Platforms that belong to a family of another name.
const FAMILIES: [(&str, &[&str]); 3] = [
    ("debian", &["ubuntu", "linuxmint", "raspbian"]),
    (
        "rhel",
        &[
            "rhel",
            "redhat",
            "centos",
            "oracle",
            "ol",
            "rocky",
            "almalinux",
            "amzn",
            "amazon",
        ],
    ),
    (
        "suse",
        &["sles", "opensuse", "opensuse-leap", "opensuse-tumbleweed"],
    ),
];

/// A file, what it contains (nothing: it is enough that it exists), and what
/// system and role follow. A later row wins.
const VIRTUALIZATION: [(&str, &str, &str, &str); 11] = [
    ("proc/xen", "", "xen", "guest"),
    ("proc/xen/capabilities", "control_d", "xen", "host"),
    ("proc/modules", "kvm", "kvm", "host"),
    ("proc/modules", "hv_util", "hyperv", "guest"),
    ("proc/modules", "vboxguest", "vbox", "guest"),
    ("proc/modules", "vmware", "vmware", "guest"),
    ("proc/cpuinfo", "QEMU Virtual CPU", "kvm", "guest"),
    ("proc/cpuinfo", "Common KVM processor", "kvm", "guest"),
    ("proc/self/cgroup", "lxc", "lxc", "guest"),
    ("proc/self/cgroup", "docker", "docker", "guest"),
    (".dockerenv", "", "docker", "guest"),
];

/// Processors and host, each or why it is not known.
#[derive(Debug)]
pub struct System {
    /// A row for each logical processor.
    pub cpus: Result<Vec<Cpu>, String>,
    /// The host.
    pub host: Result<Host, String>,
}

/// A logical processor.
#[derive(Debug, Default, PartialEq)]
pub struct Cpu {
    number: u32,
    vendor: String,
    family: String,
    model: String,
    stepping: i32,
    physical: String,
    core: String,
    name: String,
    mhz: f64,
    cache_kb: u32,
    flags: Vec<String>,
    microcode: String,
}

/// The host, or what the container shows of it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Host {
    name: String,
    uptime: u64,
    boot_time: u64,
    processes: usize,
    platform: String,
    platform_family: String,
    platform_version: String,
    kernel: String,
    architecture: String,
    virtualization: (String, String),
    id: String,
}

impl System {
    /// Reads the files below `root`.
    pub fn read(root: &Path) -> Self {
        Self {
            cpus: read(root, "proc/cpuinfo").map(|info| cpus(root, &info)),
            host: host(root),
        }
    }
}

fn read(root: &Path, path: &str) -> Result<String, String> {
    read_text(root, path).map_err(|error| format!("/{path}: {error}"))
}

fn read_text(root: &Path, path: &str) -> io::Result<String> {
    fs::read(root.join(path)).map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
}

/// The first line of a file; empty when there is none.
fn line(root: &Path, path: &str) -> String {
    let text = read_text(root, path).unwrap_or_default();
    text.lines().next().unwrap_or_default().trim().to_owned()
}

/// The processors of /proc/cpuinfo, whose keys depend on the architecture.
fn cpus(root: &Path, info: &str) -> Vec<Cpu> {
    let mut cpus: Vec<Cpu> = Vec::new();
    for (key, value) in info.lines().filter_map(|line| line.split_once(':')) {
        let (key, value) = (key.trim(), value.trim());
        if key == "processor" {
            cpus.push(Cpu {
                number: number(value),
                ..Cpu::default()
            });
        } else if let Some(cpu) = cpus.last_mut() {
            cpu.set(key, value);
        }
    }
    for cpu in &mut cpus {
        let folder = format!("sys/devices/system/cpu/cpu{}", cpu.number);
        if cpu.core.is_empty() {
            cpu.core = line(root, &format!("{folder}/topology/core_id"));
        }
        // The highest frequency, in kHz, tells more than that of the moment.
        if let Ok(khz) = line(root, &format!("{folder}/cpufreq/cpuinfo_max_freq")).parse::<u32>() {
            cpu.mhz = f64::from(khz) / 1000.0;
        }
    }
    cpus
}

/// A number, or else 0.
fn number<T: std::str::FromStr + Default>(text: &str) -> T {
    text.parse().unwrap_or_default()
}

impl Cpu {
    fn set(&mut self, key: &str, value: &str) {
        match key {
            "vendor_id" | "CPU implementer" => self.vendor = value.to_owned(),
            "cpu family" | "CPU architecture" => self.family = value.to_owned(),
            "model" | "CPU part" => self.model = value.to_owned(),
            "model name" | "cpu" => self.name = value.to_owned(),
            "stepping" | "CPU revision" => self.stepping = number(value),
            "cpu MHz" => self.mhz = number::<f64>(value),
            "cache size" => self.cache_kb = number(value.trim_end_matches(" KB")),
            "physical id" => self.physical = value.to_owned(),
            "core id" => self.core = value.to_owned(),
            "microcode" => self.microcode = value.to_owned(),
            "flags" | "Features" => {
                self.flags = value.split_whitespace().map(str::to_owned).collect();
            }
            _ => {}
        }
    }

    /// With Meridio's keys. `cores` is 1 there: a row is one processor.
    pub fn json(&self) -> String {
        let mhz = if self.mhz.is_finite() { self.mhz } else { 0.0 };
        object(&[
            ("cpu", self.number.to_string()),
            ("vendorId", text(&self.vendor)),
            ("family", text(&self.family)),
            ("model", text(&self.model)),
            ("stepping", self.stepping.to_string()),
            ("physicalId", text(&self.physical)),
            ("coreId", text(&self.core)),
            ("cores", "1".to_owned()),
            ("modelName", text(&self.name)),
            ("mhz", mhz.to_string()),
            ("cacheSize", self.cache_kb.to_string()),
            ("flags", list(&self.flags, |flag| text(flag))),
            ("microcode", text(&self.microcode)),
        ])
    }
}

fn host(root: &Path) -> Result<Host, String> {
    let stat = read(root, "proc/stat")?;
    let boot_time = stat
        .lines()
        .find_map(|line| line.strip_prefix("btime "))
        .map_or(0, |seconds| number(seconds.trim()));
    let uptime = line(root, "proc/uptime");
    let (platform, platform_version) = platform(root);
    let architecture = line(root, "proc/sys/kernel/arch");
    Ok(Host {
        name: line(root, "proc/sys/kernel/hostname"),
        uptime: number(uptime.split('.').next().unwrap_or_default()),
        boot_time,
        processes: processes(root),
        platform_family: family(&platform),
        platform,
        platform_version,
        kernel: line(root, "proc/sys/kernel/osrelease"),
        // Linux before 6.1 has no such file.
        architecture: if architecture.is_empty() {
            std::env::consts::ARCH.to_owned()
        } else {
            architecture
        },
        virtualization: virtualization(root),
        id: id(root),
    })
}

fn processes(root: &Path) -> usize {
    fs::read_dir(root.join("proc")).map_or(0, |entries| {
        entries
            .filter_map(Result::ok)
            .filter(|entry| entry.file_name().to_string_lossy().parse::<u32>().is_ok())
            .count()
    })
}

/// Name and version of the distribution. Debian's minor version is not in
/// /etc/os-release.
fn platform(root: &Path) -> (String, String) {
    let release = read_text(root, "etc/os-release").unwrap_or_default();
    let value = |key: &str| {
        release
            .lines()
            .filter_map(|line| line.split_once('='))
            .find(|(name, _)| *name == key)
            .map(|(_, value)| value.trim_matches(['"', '\'']).to_owned())
            .unwrap_or_default()
    };
    let name = value("ID");
    let minor = match name.as_str() {
        "debian" => line(root, "etc/debian_version"),
        _ => String::new(),
    };
    let version = if minor.is_empty() {
        value("VERSION_ID")
    } else {
        minor
    };
    (name, version)
}

/// The family of a platform; most are their own.
fn family(platform: &str) -> String {
    FAMILIES
        .iter()
        .find(|(_, members)| members.contains(&platform))
        .map_or(platform, |(family, _)| family)
        .to_owned()
}

/// What the machine or container runs in, and whether it is the guest.
fn virtualization(root: &Path) -> (String, String) {
    let holds = |file: &str, mark: &str| {
        if mark.is_empty() {
            root.join(file).exists()
        } else {
            read_text(root, file).is_ok_and(|text| text.contains(mark))
        }
    };
    VIRTUALIZATION
        .iter()
        .rfind(|(file, mark, _, _)| holds(file, mark))
        .map(|(_, _, system, role)| ((*system).to_owned(), (*role).to_owned()))
        .unwrap_or_default()
}

/// The mainboard's id, which root alone may read, that of the installation, or
/// that of the boot.
fn id(root: &Path) -> String {
    let board = line(root, "sys/class/dmi/id/product_uuid");
    let machine = line(root, "etc/machine-id");
    if !board.is_empty() {
        board.to_lowercase()
    } else if machine.len() == 32 && machine.is_ascii() {
        let (first, rest) = machine.split_at(8);
        let parts = [first, &rest[..4], &rest[4..8], &rest[8..12], &rest[12..]];
        parts.join("-")
    } else {
        line(root, "proc/sys/kernel/random/boot_id").to_lowercase()
    }
}

impl Host {
    /// With Meridio's keys.
    pub fn json(&self) -> String {
        let (system, role) = &self.virtualization;
        object(&[
            ("hostname", text(&self.name)),
            ("uptime", self.uptime.to_string()),
            ("bootTime", self.boot_time.to_string()),
            ("procs", self.processes.to_string()),
            ("os", text("linux")),
            ("platform", text(&self.platform)),
            ("platformFamily", text(&self.platform_family)),
            ("platformVersion", text(&self.platform_version)),
            ("kernelVersion", text(&self.kernel)),
            ("kernelArch", text(&self.architecture)),
            ("virtualizationSystem", text(system)),
            ("virtualizationRole", text(role)),
            ("hostId", text(&self.id)),
        ])
    }
}
