//! Settings: read from flags and the environment, checked as a whole, and
//! never changed afterwards.
//!
//! [`table`] has a row for each setting. Flags win over the environment, the
//! environment over defaults. A variable that is set to nothing counts as set,
//! as in Meridio.

pub mod report;
pub(crate) mod secret;
pub mod table;
pub mod value;
mod written;

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::fmt;
use std::ops::Deref;
use std::time::Duration;

pub use table::{Row, Settings, TABLE};
pub use value::HostPort;

use crate::transport::client::Address;

/// grpc-go raises keepalive times below this (dialoptions.go), and servers
/// answer more frequent signs of life with GOAWAY.
const KEEPALIVE_MIN: Duration = Duration::from_secs(10);
/// Characters of a wrong value that an error line repeats.
const SHOWN_MAX: usize = 100;

/// Where a value came from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// A flag of the command line.
    Flag,
    /// The environment.
    Environment,
    /// The environment, under the name without `NSM_`.
    Fallback,
    /// Nobody set it.
    Default,
}

/// Valid settings: reading the fields goes through [`Deref`], and nothing but
/// [`Config::load`] makes one.
#[derive(Debug, Clone)]
pub struct Config {
    settings: Settings,
    texts: BTreeMap<&'static str, (String, Origin)>,
    warnings: Vec<String>,
}

/// Everything that is wrong with the settings, a line each.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigErrors {
    errors: Vec<String>,
    warnings: Vec<String>,
}

impl ConfigErrors {
    /// The lines.
    #[must_use]
    pub fn lines(&self) -> &[String] {
        &self.errors
    }

    /// What is odd besides: a variable that is no setting may be the reason
    /// why another is missing.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }
}

impl fmt::Display for ConfigErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.errors.join("\n"))
    }
}

impl std::error::Error for ConfigErrors {}

impl Config {
    /// Reads all settings from `flags` (by variable) and `environment`.
    ///
    /// # Errors
    ///
    /// Every wrong or missing value.
    pub fn load(
        flags: &BTreeMap<&'static str, OsString>,
        environment: impl IntoIterator<Item = (OsString, OsString)>,
    ) -> Result<Self, ConfigErrors> {
        let environment: BTreeMap<OsString, OsString> = environment.into_iter().collect();
        let mut errors = Vec::new();
        let mut texts = BTreeMap::new();
        for row in TABLE {
            match find(row, flags, &environment) {
                Ok(found) => {
                    texts.insert(row.variable, found);
                }
                Err(wrong) => errors.push(wrong),
            }
        }
        let text_of = |row: &Row| texts.get(row.variable).map(|(text, _)| text.clone());
        let mut report = |row: &Row, wrong: String| {
            errors.push(error_line(row, text_of(row).as_deref(), &wrong));
        };
        let settings = table::parse(&text_of, &mut report);
        if let Some((row, wrong)) = misfit(text_of) {
            report(row, wrong);
        }
        let warnings = unknown_variables(&environment);
        match settings {
            Some(settings) if errors.is_empty() => {
                let mut config = Self {
                    settings,
                    warnings,
                    texts,
                };
                config.adjust();
                Ok(config)
            }
            _ => Err(ConfigErrors { errors, warnings }),
        }
    }

    /// What is odd but not wrong, for the log.
    #[must_use]
    pub fn warnings(&self) -> &[String] {
        &self.warnings
    }

    /// Where the value of `variable` came from.
    #[must_use]
    pub fn origin(&self, variable: &str) -> Option<Origin> {
        self.texts.get(variable).map(|(_, origin)| *origin)
    }

    /// The `:authority` of calls to nsmgr.
    #[must_use]
    pub fn nsmgr_authority(&self) -> String {
        match &self.connect_to {
            Address::Unix(_) => "localhost".to_owned(),
            Address::Tcp { host, port } => HostPort {
                host: host.clone(),
                port: *port,
            }
            .to_string(),
        }
    }

    /// Where NSP listens (Meridio pkg/nsp/service.go).
    #[must_use]
    pub fn nsp_service(&self) -> HostPort {
        HostPort {
            host: format!(
                "{}-{}.{}",
                self.nsp_service_name, self.trench, self.namespace
            ),
            port: self.nsp_service_port,
        }
    }

    fn adjust(&mut self) {
        let keepalive = &mut self.settings.grpc_keepalive_time;
        if *keepalive < KEEPALIVE_MIN {
            *keepalive = KEEPALIVE_MIN;
            self.warnings.push(format!(
                "NSM_GRPC_KEEPALIVE_TIME is too short; {KEEPALIVE_MIN:?} is used"
            ));
        }
        let family = |text: &str| {
            ["ipv4", "ipv6", "dualstack", ""]
                .iter()
                .any(|word| word.eq_ignore_ascii_case(text))
        };
        let level = |text: &str| ["INFO", "DEBUG", "TRACE", ""].contains(&text);
        self.warn_unless("NSM_IP_FAMILY", family, "dualstack");
        self.warn_unless("NSM_LOG_LEVEL", level, "INFO");
    }

    /// Warns when the text of `variable` is no known word, which is not wrong:
    /// it means `used`.
    fn warn_unless(&mut self, variable: &str, is_known: impl Fn(&str) -> bool, used: &str) {
        if let Some((text, _)) = self.texts.get(variable)
            && !is_known(text)
        {
            let text = shown(text);
            self.warnings.push(format!(
                "{variable}={text} is none of the known words; {used} is used"
            ));
        }
    }
}

impl Deref for Config {
    type Target = Settings;

    fn deref(&self) -> &Settings {
        &self.settings
    }
}

/// One `NAME="value"` for each setting that is not at its default, then how
/// many are. No setting is a secret; control characters are escaped.
impl fmt::Display for Config {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut defaults = 0;
        for row in TABLE {
            match self.texts.get(row.variable) {
                None | Some((_, Origin::Default)) => defaults += 1,
                Some((text, _)) => write!(f, "{}={} ", row.variable, shown(text))?,
            }
        }
        write!(f, "({defaults} defaults)")
    }
}

impl Config {
    /// Every setting as it was written, by its variable: the `config` object
    /// of the first log line.
    #[must_use]
    pub fn to_json(&self) -> serde_json::Value {
        TABLE
            .iter()
            .filter_map(|row| {
                let (text, _) = self.texts.get(row.variable)?;
                Some((row.variable.to_owned(), secret::masked(text).into()))
            })
            .collect::<serde_json::Map<_, _>>()
            .into()
    }
}

/// The text of a setting and where it came from.
fn find(
    row: &Row,
    flags: &BTreeMap<&'static str, OsString>,
    environment: &BTreeMap<OsString, OsString>,
) -> Result<(String, Origin), String> {
    let variable = |name: &str| environment.get(&OsString::from(name));
    let found = if let Some(text) = flags.get(row.variable) {
        (text, Origin::Flag)
    } else if let Some(text) = variable(row.variable) {
        (text, Origin::Environment)
    } else if let Some(text) = row.fallback.and_then(variable) {
        (text, Origin::Fallback)
    } else if let Some(text) = row.default {
        return Ok((text.to_owned(), Origin::Default));
    } else {
        return Err(format!(
            "{}: not set, and there is no default ({})",
            row.variable,
            row.help.trim()
        ));
    };
    match found.0.to_str() {
        Some(text) => Ok((text.to_owned(), found.1)),
        None => Err(error_line(
            row,
            Some(&found.0.to_string_lossy()),
            "not UTF-8",
        )),
    }
}

/// What is wrong with the MTU for the IP families, whatever else is wrong.
fn misfit(text_of: impl Fn(&Row) -> Option<String>) -> Option<(&'static Row, String)> {
    let row = |variable| TABLE.iter().find(|row| row.variable == variable);
    let mtu = row("NSM_MTU")?;
    let families = value::ip_families(&text_of(row("NSM_IP_FAMILY")?)?).ok()?;
    let wrong = value::mtu_fits(value::mtu(&text_of(mtu)?).ok()?, families).err()?;
    Some((mtu, wrong))
}

fn error_line(row: &Row, text: Option<&str>, wrong: &str) -> String {
    format!(
        "{}={}: {wrong}",
        row.variable,
        shown(text.unwrap_or_default())
    )
}

/// A value in quotes, escaped, cut, and without secrets.
fn shown(text: &str) -> String {
    let text = secret::masked(text);
    let cut: String = text.chars().take(SHOWN_MAX).collect();
    if cut.len() < text.len() {
        format!("{:?}", cut + "…")
    } else {
        format!("{cut:?}")
    }
}

/// A warning for each `NSM_*` variable that is no setting.
fn unknown_variables(environment: &BTreeMap<OsString, OsString>) -> Vec<String> {
    environment
        .keys()
        .filter_map(|name| name.to_str())
        .filter(|name| name.starts_with("NSM_"))
        .filter(|name| TABLE.iter().all(|row| row.variable != *name))
        .map(|name| match nearest(name) {
            Some(known) => format!("{name} is no setting; did you mean {known}?"),
            None => format!("{name} is no setting"),
        })
        .collect()
}

/// The setting whose name is at most three edits away, or has no `NSM_`.
fn nearest(name: &str) -> Option<&'static str> {
    // Longer names are no typing errors, and would make the search slow.
    if name.len() > 64 {
        return None;
    }
    // A known name with a prefix too many is no edit away.
    let bare = name.strip_prefix("NSM_").unwrap_or(name);
    let edits = |row: &Row| {
        let given = if row.variable.starts_with("NSM_") {
            name
        } else {
            bare
        };
        distance(given.as_bytes(), row.variable.as_bytes())
    };
    TABLE
        .iter()
        .map(|row| (edits(row), row))
        .min_by_key(|(distance, _)| *distance)
        // Of a short name most is left alone, or it was meant otherwise.
        .filter(|(distance, _)| *distance <= 3 && distance * 3 <= bare.len())
        .map(|(_, row)| row.variable)
}

/// Levenshtein's edit distance.
fn distance(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = row[0];
        row[0] = i + 1;
        for (j, y) in b.iter().enumerate() {
            let substituted = diagonal + usize::from(x != y);
            diagonal = row[j + 1];
            row[j + 1] = substituted.min(row[j] + 1).min(diagonal + 1);
        }
    }
    row[b.len()]
}
