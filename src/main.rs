//! The daemon's binary; under the name `grpc_health_probe`, the exec probe.

use std::ffi::OsString;
use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use meridio_proxy::cli::{self, Flags, Invocation};
use meridio_proxy::config::{Config, ConfigErrors, report};
use meridio_proxy::daemon::{self, debug};
use meridio_proxy::health::client::{self, Probe};
use meridio_proxy::logging;

fn main() -> ExitCode {
    let mut args = std::env::args_os();
    let program = args.next().unwrap_or_default();
    if Path::new(&program).file_name() == Some(client::NAME.as_ref()) {
        return probe(args);
    }
    match cli::parse(args) {
        Ok(Invocation::Version) => print(cli::VERSION),
        Ok(Invocation::Help(text)) => print(text.trim_end()),
        Ok(Invocation::Debug) => {
            let report = debug::report();
            for note in &report.notes {
                complain(note, 0);
            }
            print(&report.json)
        }
        Ok(Invocation::Run(flags)) => match Config::load(&flags, std::env::vars_os()) {
            Ok(config) => ExitCode::from(daemon::run(&config)),
            Err(errors) => {
                logging::termination_message(&errors.to_string());
                refuse(&errors)
            }
        },
        Ok(Invocation::Config { flags, json }) => settings(&flags, json),
        Err(usage) => complain(usage.0.trim_end(), 2),
    }
}

/// Prints the settings in force, or everything that is wrong with them.
fn settings(flags: &Flags, json: bool) -> ExitCode {
    match Config::load(flags, std::env::vars_os()) {
        Ok(config) if json => print(&report::json(&config)),
        Ok(config) => {
            for warning in config.warnings() {
                complain(&format!("warning: {warning}"), 0);
            }
            print(&report::table(&config))
        }
        Err(errors) => {
            if json {
                print(&report::json_errors(&errors));
            }
            refuse(&errors)
        }
    }
}

/// Says what is wrong with the settings, and what may have been meant.
fn refuse(errors: &ConfigErrors) -> ExitCode {
    for warning in errors.warnings() {
        complain(&format!("warning: {warning}"), 1);
    }
    complain(&errors.to_string(), 1)
}

fn probe(args: impl Iterator<Item = OsString>) -> ExitCode {
    let probe = Probe::parse(args);
    if probe.as_ref().is_ok_and(Probe::is_for_version) {
        return print(cli::VERSION);
    }
    match probe.and_then(|probe| probe.run()) {
        // The original tool logs this, to standard error.
        Ok(()) => complain("status: SERVING", 0),
        Err(error) => complain(&error.to_string(), error.exit_status()),
    }
}

fn print(text: &str) -> ExitCode {
    match writeln!(std::io::stdout(), "{text}") {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => complain(&format!("standard output: {error}"), 1),
    }
}

fn complain(text: &str, status: u8) -> ExitCode {
    // When even this cannot be written, the status still says it.
    let _ = writeln!(std::io::stderr(), "{text}");
    ExitCode::from(status)
}
