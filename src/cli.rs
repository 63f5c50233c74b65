//! The command line: a flag for each setting, three that print something and
//! end, and the verb `config`, which prints the settings. Go's spelling of long
//! flags with one dash (`-version`, `-debug=true`) is understood, since that is
//! what people know from Meridio's proxy.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::sync::LazyLock;

use clap::error::{ContextKind, ErrorKind};
use clap::{Arg, ArgAction, Command, value_parser};

use crate::config::{Row, TABLE};

/// The version: what the build was told, or else the crate's.
pub const VERSION: &str = match option_env!("MERIDIO_PROXY_VERSION") {
    Some(version) => version,
    None => env!("CARGO_PKG_VERSION"),
};

/// What the process was asked to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Invocation {
    /// Print the version.
    Version,
    /// Print the state of the system as JSON.
    Debug,
    /// Print this text.
    Help(String),
    /// Print the settings in force, with the values given as flags.
    Config {
        /// The flags, by the variable that each stands for.
        flags: Flags,
        /// As JSON.
        json: bool,
    },
    /// Be the proxy, with the values given as flags.
    Run(Flags),
}

/// Values given as flags, by the variable that each stands for.
pub type Flags = BTreeMap<&'static str, OsString>;

/// Wrong usage: what to print on standard error.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Usage(pub String);

/// The flags' names in the order of the table; clap wants them to live for ever.
static FLAGS: LazyLock<Vec<String>> = LazyLock::new(|| TABLE.iter().map(Row::flag).collect());

/// Flags that are true or absent.
const SWITCHES: [&str; 4] = ["version", "debug", "help", "json"];
/// The verb that prints the settings instead of being the proxy.
const CONFIG: &str = "config";

/// Reads the arguments after the program's name.
///
/// # Errors
///
/// [`Usage`] for an unknown flag, a missing value, or a stray word.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, Usage> {
    let args = std::iter::once(OsString::from("proxy")).chain(args.into_iter().filter_map(go_flag));
    let matches = match command().try_get_matches_from(args) {
        Ok(matches) => matches,
        Err(error) if error.kind() == ErrorKind::DisplayHelp => {
            return Ok(Invocation::Help(error.to_string()));
        }
        Err(mut error) => {
            // clap advises to give a wrong flag as a verb.
            error.remove(ContextKind::Suggested);
            return Err(Usage(error.to_string()));
        }
    };
    // Meridio's order, when more than one is given.
    if matches.get_flag("version") {
        return Ok(Invocation::Version);
    }
    if matches.get_flag("debug") {
        return Ok(Invocation::Debug);
    }
    if matches.get_flag("help") {
        return Ok(Invocation::Help(command().render_help().to_string()));
    }
    let given = |row: &Row| matches.get_one::<OsString>(row.variable).cloned();
    let flags = TABLE
        .iter()
        .filter_map(|row| Some((row.variable, given(row)?)))
        .collect();
    Ok(match matches.get_one::<String>("verb") {
        Some(_) => {
            let json = matches.get_flag("json");
            Invocation::Config { flags, json }
        }
        None => Invocation::Run(flags),
    })
}

fn command() -> Command {
    let switch = |name: &'static str, help: &'static str| {
        Arg::new(name)
            .long(name)
            .help(help)
            .action(ArgAction::SetTrue)
            .display_order(0)
    };
    Command::new("proxy")
        .about(
            "The per-node proxy of Meridio: a bridge between load balancers and targets.\n\
             It is meant to be started in a Kubernetes container.",
        )
        .after_help(
            "Each setting is also an environment variable; a flag wins over it.\n\
             Exit status: 0 stopped by a signal or an informational flag, 1 wrong\n\
             configuration or failure, 2 wrong usage, 134 a bug.",
        )
        .disable_help_flag(true)
        .disable_version_flag(true)
        .args_override_self(true)
        .arg(
            Arg::new("verb")
                .value_name("VERB")
                .value_parser([CONFIG])
                .hide_possible_values(true)
                .help("config: print every setting in force and where it comes from"),
        )
        .next_help_heading("Informational")
        .arg(switch("version", "Print the version"))
        .arg(switch("debug", "Print the state of the system as JSON"))
        .arg(switch("help", "Print this help").short('h'))
        .arg(switch("json", "With config: print JSON").requires("verb"))
        .next_help_heading("Settings")
        .args(
            (1..)
                .zip(TABLE.iter().zip(FLAGS.iter()))
                .map(|(order, (row, flag))| setting(order, row, flag)),
        )
}

fn setting(order: usize, row: &'static Row, flag: &'static str) -> Arg {
    let mut help = format!("{} [{}", row.help.trim(), row.variable);
    match row.default {
        Some("") => help.push_str(", default empty]"),
        Some(default) => help.push_str(&format!(", default {default}]")),
        None => help.push_str(", required]"),
    }
    Arg::new(row.variable)
        .long(flag)
        .value_name("VALUE")
        .help(help)
        .value_parser(value_parser!(OsString))
        .display_order(order)
}

/// An argument in Go's spelling as clap knows it; `None` when it says that a
/// switch is off.
fn go_flag(arg: OsString) -> Option<OsString> {
    let Some(text) = arg.to_str() else {
        return Some(arg);
    };
    let Some(flag) = text.strip_prefix("--").or_else(|| text.strip_prefix('-')) else {
        return Some(arg);
    };
    // `-`, `--`, `-h` and negative numbers stay as they are.
    if flag.len() < 2 || !flag.starts_with(|c: char| c.is_ascii_alphabetic()) {
        return Some(arg);
    }
    if let Some((name, value)) = flag.split_once('=')
        && SWITCHES.contains(&name)
    {
        // Go's strconv.ParseBool.
        return match value {
            "1" | "t" | "T" | "true" | "TRUE" | "True" => Some(format!("--{name}").into()),
            "0" | "f" | "F" | "false" | "FALSE" | "False" => None,
            _ => Some(arg),
        };
    }
    Some(format!("--{flag}").into())
}
