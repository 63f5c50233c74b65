//! `make bench`: how fast the daemon is, and how much it takes, with all its
//! peers in one lab. Prints a table, writes `target/bench.json`, and fails when
//! an aim is missed. The peers run on the same cores: times include their work
//! where the text does not say otherwise.
#![allow(
    clippy::print_stdout,
    clippy::print_stderr,
    clippy::cast_possible_truncation,
    clippy::cast_precision_loss,
    clippy::cast_sign_loss,
    reason = "a program that prints numbers"
)]

mod events;
mod report;
mod requests;
mod size;
mod start;

use std::process::ExitCode;

use report::Report;

type Measure = fn(&mut Report) -> Result<(), String>;

/// In the order of the table; a name on the command line chooses one.
const MEASURES: [(&str, Measure); 4] = [
    ("start", start::run),
    ("events", events::run),
    ("requests", requests::run),
    ("size", size::run),
];

fn main() -> ExitCode {
    let chosen: Vec<String> = std::env::args().skip(1).collect();
    let mut report = Report::default();
    for (name, measure) in MEASURES {
        if !chosen.is_empty() && !chosen.iter().any(|choice| choice == name) {
            continue;
        }
        eprintln!("bench: {name}");
        if let Err(error) = measure(&mut report) {
            eprintln!("bench: {name}: {error}");
            return ExitCode::FAILURE;
        }
    }
    print!("{report}");
    if let Err(error) = report.write("target/bench.json") {
        eprintln!("bench: target/bench.json: {error}");
        return ExitCode::FAILURE;
    }
    match report.missed() {
        0 => ExitCode::SUCCESS,
        missed => {
            eprintln!("bench: {missed} aims are missed");
            ExitCode::FAILURE
        }
    }
}
