//! The tests that the sources have, by `binary::module::name`. Relies on the
//! code's form, which rustfmt keeps.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

pub fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub fn read(path: &str) -> String {
    let path = root().join(path);
    std::fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// The source files whose path begins with `place`.
pub fn tracked(place: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut directories = vec![PathBuf::from("src")];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(root().join(&directory)).unwrap() {
            let entry = entry.unwrap();
            let path = directory.join(entry.file_name());
            if entry.file_type().unwrap().is_dir() {
                directories.push(path);
                continue;
            }
            let path = path.to_str().unwrap();
            if path.starts_with(place) && path.ends_with(".rs") {
                found.push(path.to_owned());
            }
        }
    }
    found
}

/// All tests of the daemon's library and of the files in `tests/`, each with
/// whether it is ignored.
pub fn tests() -> BTreeMap<String, bool> {
    let mut all = BTreeMap::new();
    visit(&root().join("src/lib.rs"), true, "lib", &mut all);
    for entry in std::fs::read_dir(root().join("tests")).unwrap() {
        let path = entry.unwrap().path();
        let stem = path.file_stem().unwrap().to_str().unwrap().to_owned();
        if path.extension().is_some_and(|end| end == "rs") {
            visit(&path, true, &stem, &mut all);
        } else if path.join("main.rs").exists() {
            visit(&path.join("main.rs"), true, &stem, &mut all);
        }
    }
    all
}

/// `owns_directory`: the file's modules are beside it, as for mod.rs.
fn visit(file: &Path, owns_directory: bool, module: &str, all: &mut BTreeMap<String, bool>) {
    let text = std::fs::read_to_string(file).unwrap();
    let seen = scan(&text);
    for (name, ignored) in seen.tests {
        all.insert(format!("{module}::{name}"), ignored);
    }
    let beside = file.parent().unwrap();
    let below = if owns_directory {
        beside.to_owned()
    } else {
        file.with_extension("")
    };
    for (name, path) in seen.files {
        let inner = format!("{module}::{name}");
        let own = below.join(format!("{name}.rs"));
        match path {
            Some(path) => visit(&beside.join(path), true, &inner, all),
            None if own.exists() => visit(&own, false, &inner, all),
            None => visit(&below.join(&name).join("mod.rs"), true, &inner, all),
        }
    }
}

/// The tests of a text, and those of them that are ignored.
pub fn in_text(text: &str) -> (Vec<String>, Vec<String>) {
    let tests = scan(text).tests;
    let ignored = tests
        .iter()
        .filter(|(_, ignored)| *ignored)
        .map(|(name, _)| name.clone());
    let ignored = ignored.collect();
    (tests.into_iter().map(|(name, _)| name).collect(), ignored)
}

#[derive(Default)]
struct Seen {
    /// Name with inline modules, and whether it is ignored.
    tests: Vec<(String, bool)>,
    /// Modules in files of their own, with the path that is given.
    files: Vec<(String, Option<String>)>,
}

fn scan(text: &str) -> Seen {
    let mut seen = Seen::default();
    // Inline modules around the line, each with its indentation.
    let mut inside: Vec<(usize, String)> = Vec::new();
    let (mut is_test, mut ignored, mut path) = (false, false, None);
    for line in text.lines() {
        let code = line.trim_start();
        let indent = line.len() - code.len();
        if code.starts_with("#[") {
            is_test |= code == "#[test]";
            ignored |= code.starts_with("#[ignore");
            if let Some(given) = code.strip_prefix("#[path = \"") {
                path = given.strip_suffix("\"]").map(str::to_owned);
            }
            continue;
        }
        if code == "}" && inside.last().is_some_and(|(at, _)| *at == indent) {
            inside.pop();
        }
        let item = code
            .trim_start_matches("pub(super) ")
            .trim_start_matches("pub ");
        if let Some(module) = item.strip_prefix("mod ") {
            if let Some(name) = module.strip_suffix(" {") {
                inside.push((indent, name.to_owned()));
            } else if let Some(name) = module.strip_suffix(';') {
                seen.files.push((name.to_owned(), path.take()));
            }
        }
        if let (true, Some(rest)) = (is_test, item.strip_prefix("fn ")) {
            let name = rest.split('(').next().unwrap();
            let modules = inside.iter().map(|(_, module)| module.as_str());
            let full: Vec<&str> = modules.chain([name]).collect();
            seen.tests.push((full.join("::"), ignored));
        }
        // An attribute of several lines goes on; anything else ends them.
        if item.starts_with("fn ") || item.starts_with("mod ") || code.is_empty() {
            (is_test, ignored, path) = (false, false, None);
        }
    }
    seen
}
