//! The rules of ARCHITECTURE.md and CONTRIBUTING.md that a reader of the source
//! text can check: who may name what, the table of threads, and sizes.

#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests end by panicking too"
)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Files outside `rpc/` and `transport/` that speak gRPC.
const GRPC: [&str; 9] = [
    "src/endpoint/desk/request.rs",
    "src/endpoint/feed.rs",
    "src/endpoint/register.rs",
    "src/endpoint/service.rs",
    "src/health/client.rs",
    "src/health/server.rs",
    "src/logging.rs",
    "src/nsm/caller.rs",
    "src/spiffe/workload.rs",
];

/// The files of the daemon that may hold `unsafe`.
const UNSAFE: [&str; 10] = [
    "src/kernel/capability.rs",
    "src/kernel/netlink/socket.rs",
    "src/kernel/packet.rs",
    "src/logging/time.rs",
    "src/sync/poll.rs",
    "src/transport/accept.rs",
    "src/transport/descriptors.rs",
    "src/transport/dial.rs",
    "src/transport/fd_socket.rs",
    "src/transport/dialer.rs",
];

/// What must not be named in `core/`, besides crates.
const NOT_IN_CORE: [&str; 16] = [
    "HashMap",
    "HashSet",
    "Instant::now",
    "SystemTime::now",
    "crossbeam",
    "debug!(",
    "error!(",
    "info!(",
    "log::",
    "parking_lot",
    "std::fs",
    "std::io",
    "std::sync",
    "std::thread",
    "trace!(",
    "warn!(",
];

const FILE_LINES: usize = 500;
const FUNCTION_LINES: usize = 70;

struct Source {
    /// Relative to the repository.
    path: String,
    text: String,
}

impl Source {
    /// The code that is part of the program: no comments, no tests.
    fn code(&self) -> String {
        let mut kept = Vec::new();
        let mut lines = self.text.lines();
        while let Some(line) = lines.next() {
            if line.trim() == "#[cfg(test)]" {
                skip_item(&mut lines, line.len() - line.trim_start().len());
            } else {
                kept.push(without_comment(line));
            }
        }
        kept.join("\n")
    }

    /// The test modules that this file declares, as paths without `.rs`.
    fn test_modules(&self) -> Vec<String> {
        let folder = self
            .path
            .strip_suffix("/mod.rs")
            .or_else(|| self.path.strip_suffix(".rs"))
            .unwrap_or(&self.path);
        let lines: Vec<&str> = self.text.lines().collect();
        lines
            .windows(2)
            .filter(|pair| pair[0] == "#[cfg(test)]")
            .filter_map(|pair| pair[1].trim_start_matches("pub ").strip_prefix("mod "))
            .filter_map(|module| module.strip_suffix(';'))
            .map(|module| format!("{folder}/{module}"))
            .collect()
    }

    fn is_in(&self, folder: &str) -> bool {
        self.path.starts_with(folder)
    }
}

/// Skips the item after a `#[cfg(test)]` of that indent.
fn skip_item<'a>(lines: &mut impl Iterator<Item = &'a str>, indent: usize) {
    let close = format!("{}}}", " ".repeat(indent));
    for line in lines {
        let same = line.len() - line.trim_start().len() == indent;
        if line == close || (same && line.ends_with([';', ','])) {
            return;
        }
    }
}

/// A line up to its comment. A `//` behind a colon belongs to a URL.
fn without_comment(line: &str) -> &str {
    line.match_indices("//")
        .find(|(at, _)| !line[..*at].ends_with(':'))
        .map_or(line, |(at, _)| &line[..at])
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The files of the program below `folder` of `src`.
fn program(folder: &str) -> Vec<Source> {
    let tests: Vec<String> = sources("src")
        .iter()
        .flat_map(Source::test_modules)
        .collect();
    let is_test = |source: &Source| {
        tests
            .iter()
            .filter_map(|module| source.path.strip_prefix(module.as_str()))
            .any(|rest| rest == ".rs" || rest.starts_with('/'))
    };
    sources(folder)
        .into_iter()
        .filter(|source| !is_test(source))
        .collect()
}

/// All Rust files below `folder`.
fn sources(folder: &str) -> Vec<Source> {
    let mut found = Vec::new();
    let mut folders = vec![root().join(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path: PathBuf = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|kind| kind == "rs") {
                found.push(Source {
                    text: std::fs::read_to_string(&path).unwrap(),
                    path: path.strip_prefix(root()).unwrap().display().to_string(),
                });
            }
        }
    }
    assert!(!found.is_empty(), "no sources below {folder}");
    found
}

/// The files whose code names `word` although `allowed` says no.
fn offenders(word: &str, allowed: impl Fn(&Source) -> bool) -> Vec<String> {
    program("src")
        .into_iter()
        .filter(|source| source.code().contains(word) && !allowed(source))
        .map(|source| format!("{} names {word}", source.path))
        .collect()
}

fn none(offenders: &[String]) {
    assert!(offenders.is_empty(), "{}", offenders.join("\n"));
}

#[test]
fn the_core_is_pure() {
    let mut wrong = Vec::new();
    for source in program("src/core") {
        let code = source.code();
        for word in NOT_IN_CORE {
            if code.contains(word) {
                wrong.push(format!("{} names {word}", source.path));
            }
        }
        for (at, _) in code.match_indices("crate::") {
            if !code[at..].starts_with("crate::core::") {
                wrong.push(format!("{} names {}", source.path, line_at(&code, at)));
            }
        }
        for line in code
            .lines()
            .filter_map(|line| line.trim().strip_prefix("use "))
        {
            let first = line.split([':', ';', ' ']).next().unwrap_or_default();
            if !["std", "ipnetwork", "super", "self", "crate"].contains(&first)
                && !code.contains(&format!("mod {first};"))
                && !first.starts_with(|c: char| c.is_uppercase())
            {
                wrong.push(format!("{} uses {line}", source.path));
            }
        }
    }
    none(&wrong);
}

fn line_at(text: &str, at: usize) -> &str {
    let end = text[at..].find('\n').map_or(text.len(), |end| at + end);
    &text[at..end]
}

#[test]
fn only_the_kernel_side_names_netlink() {
    none(&offenders("netlink_", |source| source.is_in("src/kernel/")));
    none(&offenders("kernel::netlink", |source| {
        source.is_in("src/kernel/")
    }));
}

#[test]
fn only_the_listed_files_name_grpcio() {
    none(&offenders("grpcio", |source| {
        source.is_in("src/rpc/")
            || source.is_in("src/transport/")
            || GRPC.contains(&source.path.as_str())
    }));
}

#[test]
fn only_identity_and_transport_name_openssl() {
    none(&offenders("openssl", |source| {
        source.is_in("src/spiffe/") || source.is_in("src/transport/")
    }));
}

#[test]
fn only_ipam_talks_to_ipam() {
    for method in ["IPAM_ALLOCATE", "IPAM_RELEASE"] {
        none(&offenders(method, |source| {
            source.is_in("src/ipam/") || source.path == "src/rpc/method.rs"
        }));
    }
}

#[test]
fn nothing_waits_blindly_or_grows_without_bound() {
    let clock = |source: &Source| source.path == "src/sync/clock.rs";
    let thread = |source: &Source| source.path == "src/sync/thread.rs";
    none(&offenders("Instant::now", clock));
    none(&offenders("SystemTime::now", clock));
    none(&offenders("thread::Builder", thread));
    for word in [
        "unbounded",
        "thread::sleep",
        "thread::spawn",
        "async_std",
        "tokio",
    ] {
        none(&offenders(word, |_| false));
    }
}

#[test]
fn unsafe_stays_where_it_is() {
    let word = |code: &str| {
        ["unsafe {", "unsafe fn", "unsafe impl", "unsafe extern"]
            .iter()
            .any(|form| code.contains(form))
    };
    let found: Vec<String> = program("src")
        .into_iter()
        .filter(|source| word(&source.code()) && !UNSAFE.contains(&source.path.as_str()))
        .map(|source| source.path)
        .collect();
    none(&found);
}

/// A row of the table of threads.
struct Row {
    name: String,
    file: String,
}

fn thread_table() -> Vec<Row> {
    let text = std::fs::read_to_string(root().join("ARCHITECTURE.md")).unwrap();
    let section = text
        .split("\n## Threads\n")
        .nth(1)
        .expect("a section on threads");
    let section = section.split("\n## ").next().unwrap();
    let code = |cell: &str| cell.trim().trim_matches('`').to_owned();
    section
        .lines()
        .filter(|line| line.starts_with("| `"))
        .map(|line| {
            let cells: Vec<&str> = line.trim_matches('|').split('|').collect();
            Row {
                name: code(cells[0]),
                file: format!("src/{}", code(cells[cells.len() - 1])),
            }
        })
        .collect()
}

/// The names under which the code starts threads, with the file; what a
/// `format!` fills in is a `*`.
fn started() -> BTreeMap<String, BTreeSet<String>> {
    let mut names: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for source in program("src") {
        let code = source.code();
        let own = code.match_indices(".spawn(").filter_map(|(at, call)| {
            let (name, rest) = code[at + call.len()..].split_once(',')?;
            rest.trim_start().starts_with("STACK_").then_some(name)
        });
        // The relay is given its thread's name by those who start it.
        let relays = code
            .match_indices("Relay::start(")
            .filter_map(|(at, call)| {
                let (_, rest) = code[at + call.len()..].split_once(',')?;
                Some(rest.split(['?', ';']).next().unwrap_or(rest))
            });
        for argument in own.chain(relays) {
            if source.path == "src/transport/relay.rs" || source.path == "src/sync/thread.rs" {
                continue;
            }
            let name = name_of(argument, &code)
                .unwrap_or_else(|| panic!("{}: which thread is {argument}?", source.path));
            names.entry(name).or_default().insert(source.path.clone());
        }
    }
    names
}

/// The name that an argument stands for: a literal, a `format!`, or a variable
/// or constant of the same file.
fn name_of(argument: &str, code: &str) -> Option<String> {
    let argument = argument.trim().trim_start_matches('&');
    if argument.starts_with('"') || argument.starts_with("format!(\"") {
        return Some(pattern(argument.split('"').nth(1)?));
    }
    [
        format!("let {argument} = format!(\""),
        format!("const {argument}: &str = \""),
    ]
    .iter()
    .find_map(|made| code.split_once(made.as_str()))
    .and_then(|(_, rest)| rest.split('"').next())
    .map(pattern)
}

/// `lb:{}` and `lb:{n}` as `lb:*`.
fn pattern(text: &str) -> String {
    let mut parts = text.split('{');
    let mut pattern = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        pattern.push('*');
        pattern.push_str(part.split_once('}').map_or("", |(_, rest)| rest));
    }
    pattern
}

#[test]
fn the_table_of_threads_is_the_truth() {
    let table = thread_table();
    assert!(table.len() > 15, "{} rows", table.len());
    let started = started();
    let rows: BTreeMap<&str, &Row> = table.iter().map(|row| (row.name.as_str(), row)).collect();
    assert_eq!(rows.len(), table.len(), "a thread is listed twice");
    for (name, files) in &started {
        let row = rows
            .get(name.as_str())
            .unwrap_or_else(|| panic!("thread {name} of {files:?} is not in the table"));
        assert!(files.contains(&row.file), "{name} is started in {files:?}");
    }
    for row in &table {
        let grpc = row.name.starts_with("grpc-");
        assert!(
            grpc || row.name == "main" || started.contains_key(&row.name),
            "nobody starts {}",
            row.name
        );
        let source = std::fs::read_to_string(root().join(&row.file)).unwrap();
        let prefix = row.name.trim_end_matches("-0");
        assert!(
            !grpc || source.contains(&format!("\"{prefix}\"")),
            "{}",
            row.name
        );
    }
}

#[test]
fn thread_names_survive_linux() {
    for row in thread_table() {
        // Five bytes for what stands in for `*`.
        let room = row.name.len() + 4 * row.name.matches('*').count();
        assert!(room <= 15, "{}", row.name);
    }
}

#[test]
fn files_and_functions_are_small() {
    let mut wrong = Vec::new();
    for source in sources("src").into_iter().chain(sources("tests")) {
        let lines: Vec<&str> = source.text.lines().collect();
        if lines.len() > FILE_LINES {
            wrong.push(format!("{}: {} lines", source.path, lines.len()));
        }
        for (at, line) in lines.iter().enumerate() {
            if let Some(length) = function_length(&lines[at..])
                && length > FUNCTION_LINES
            {
                let name = line.trim();
                wrong.push(format!(
                    "{}:{}: {length} lines: {name}",
                    source.path,
                    at + 1
                ));
            }
        }
    }
    none(&wrong);
}

/// The lines of the function that begins at the first line, if one does;
/// rustfmt puts its closing brace below its first letter.
fn function_length(lines: &[&str]) -> Option<usize> {
    let first = lines.first()?;
    let indent = first.len() - first.trim_start().len();
    let words = first.trim_start();
    let is_function = words
        .split("fn ")
        .next()
        .filter(|_| words.contains("fn "))
        .is_some_and(|before| {
            before.split_whitespace().all(|word| {
                ["pub", "const", "async", "unsafe", "extern", "\"C\""].contains(&word)
                    || word.starts_with("pub(")
            })
        });
    if !is_function {
        return None;
    }
    // The end of the signature: a body begins, or there is none.
    let signed = lines.iter().find(|line| line.ends_with(['{', ';', '}']))?;
    if !signed.ends_with('{') {
        return None;
    }
    let close = format!("{}}}", " ".repeat(indent));
    let end = lines.iter().position(|line| *line == close)?;
    Some(end + 1)
}

#[test]
fn the_checks_see_what_they_shall() {
    assert_eq!(without_comment("a(\"tcp://x\"); // b"), "a(\"tcp://x\"); ");
    let source = Source {
        path: "src/a/mod.rs".to_owned(),
        text: "a\n#[cfg(test)]\nmod sim;\nb // c\n#[cfg(test)]\nmod tests {\n    d\n}\ne"
            .to_owned(),
    };
    assert_eq!(source.code(), "a\nb \ne");
    assert_eq!(source.test_modules(), ["src/a/sim"]);
    assert_eq!(pattern("lb:{}"), "lb:*");
    assert_eq!(pattern("a{n}b{m}"), "a*b*");
    assert_eq!(name_of("\n   \"net\"", ""), Some("net".to_owned()));
    assert_eq!(
        name_of("&format!(\"tls-{n}\")", ""),
        Some("tls-*".to_owned())
    );
    let code = "let name = format!(\"conn-{}\", x);";
    assert_eq!(name_of("&name", code), Some("conn-*".to_owned()));
    assert_eq!(name_of("A", "const A: &str = \"b\";"), Some("b".to_owned()));
    assert_eq!(name_of("other", code), None);
    let text = ["    pub(super) fn f() {", "        g();", "    }", "}"];
    assert_eq!(function_length(&text), Some(3));
    assert_eq!(function_length(&text[1..]), None);
    assert_eq!(function_length(&["fn f() {}", "fn g() {", "}"]), None);
    assert_eq!(function_length(&["fn f(", ");", "fn g() {", "}"]), None);
}
