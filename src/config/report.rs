//! What `proxy config` prints: every value in force and where it comes from.

use serde_json::{Value as Json, json};

use super::{Config, ConfigErrors, Origin, Row, TABLE, secret};

/// A setting in force.
struct Line {
    row: &'static Row,
    value: String,
    origin: Origin,
    /// The flag or variable that set it; empty for a default.
    by: String,
}

fn lines(config: &Config) -> Vec<Line> {
    TABLE
        .iter()
        .zip(config.settings.written())
        .map(|(row, value)| {
            let origin = config.origin(row.variable).unwrap_or(Origin::Default);
            let by = match origin {
                Origin::Flag => format!("--{}", row.flag()),
                Origin::Environment => row.variable.to_owned(),
                Origin::Fallback => row.fallback.unwrap_or_default().to_owned(),
                Origin::Default => String::new(),
            };
            let value = secret::masked(&value).to_owned();
            Line {
                row,
                value,
                origin,
                by,
            }
        })
        .collect()
}

fn source(origin: Origin) -> &'static str {
    match origin {
        Origin::Flag => "flag",
        Origin::Environment | Origin::Fallback => "environment",
        Origin::Default => "default",
    }
}

/// A line for each setting: variable, value, source.
#[must_use]
pub fn table(config: &Config) -> String {
    let cells: Vec<[String; 3]> = lines(config)
        .into_iter()
        .map(|line| {
            let value = if line.value.is_empty() {
                "\"\"".to_owned()
            } else {
                line.value.escape_debug().to_string()
            };
            let from = format!("{} {}", source(line.origin), line.by);
            [line.row.variable.to_owned(), value, from]
        })
        .collect();
    let width = |column: usize| {
        let widths = cells.iter().map(|row| row[column].chars().count());
        widths.max().unwrap_or_default()
    };
    let (first, second) = (width(0), width(1));
    let row = |[variable, value, from]: &[String; 3]| {
        let line = format!("{variable:first$}  {value:second$}  {from}");
        line.trim_end().to_owned()
    };
    cells.iter().map(row).collect::<Vec<_>>().join("\n")
}

/// The same for programs: `{"settings": [{"variable", "value", "source",
/// "by"}], "warnings": []}`. `by` is the flag or variable, `null` for a default.
#[must_use]
pub fn json(config: &Config) -> String {
    let settings: Vec<Json> = lines(config)
        .into_iter()
        .map(|line| {
            let by = (!line.by.is_empty()).then_some(line.by);
            json!({
                "variable": line.row.variable,
                "value": line.value,
                "source": source(line.origin),
                "by": by,
            })
        })
        .collect();
    json!({"settings": settings, "warnings": config.warnings()}).to_string()
}

/// What `--json` prints where the settings are wrong:
/// `{"errors": [], "warnings": []}`.
#[must_use]
pub fn json_errors(errors: &ConfigErrors) -> String {
    json!({"errors": errors.lines(), "warnings": errors.warnings()}).to_string()
}
