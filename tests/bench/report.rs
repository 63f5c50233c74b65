//! Numbers, their spread, and what they shall be.

use std::fmt;
use std::io;
use std::time::Duration;

use serde_json::{Value, json};

/// A bound on one of a measure's numbers.
#[derive(Debug, Clone, Copy)]
pub enum Aim {
    Median(f64),
    P99(f64),
    Max(f64),
}

struct Row {
    name: String,
    unit: &'static str,
    /// Sorted.
    samples: Vec<f64>,
    aims: Vec<Aim>,
}

/// All rows so far.
#[derive(Default)]
pub struct Report(Vec<Row>);

impl Report {
    /// Adds a measure in `unit` with what it shall be.
    pub fn add(&mut self, name: &str, unit: &'static str, samples: &[f64], aims: &[Aim]) {
        let mut samples = samples.to_vec();
        samples.sort_by(f64::total_cmp);
        self.0.push(Row {
            name: name.to_owned(),
            unit,
            samples,
            aims: aims.to_vec(),
        });
    }

    /// Adds durations in milliseconds.
    pub fn add_times(&mut self, name: &str, times: &[Duration], aims: &[Aim]) {
        let samples: Vec<f64> = times.iter().map(|time| millis(*time)).collect();
        self.add(name, "ms", &samples, aims);
    }

    /// How many aims are missed.
    pub fn missed(&self) -> usize {
        let rows = self.0.iter();
        rows.map(|row| row.aims.iter().filter(|aim| !row.holds(**aim)).count())
            .sum()
    }

    /// Writes everything as JSON.
    pub fn write(&self, path: &str) -> io::Result<()> {
        let rows: Vec<Value> = (self.0.iter())
            .map(|row| {
                let aims = row.aims.iter();
                json!({
                    "name": row.name,
                    "unit": row.unit,
                    "count": row.samples.len(),
                    "min": row.quantile(0.0),
                    "median": row.quantile(0.5),
                    "p99": row.quantile(0.99),
                    "max": row.quantile(1.0),
                    "aims": aims.map(|aim| json!({
                        "of": aim.name(), "limit": aim.limit(), "holds": row.holds(*aim)
                    })).collect::<Vec<Value>>(),
                })
            })
            .collect();
        std::fs::write(path, format!("{:#}\n", Value::Array(rows)))
    }
}

pub fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

impl Aim {
    fn limit(self) -> f64 {
        match self {
            Self::Median(limit) | Self::P99(limit) | Self::Max(limit) => limit,
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::Median(_) => "median",
            Self::P99(_) => "p99",
            Self::Max(_) => "max",
        }
    }
}

impl Row {
    /// The smallest sample that so many of them do not exceed.
    fn quantile(&self, part: f64) -> f64 {
        let last = self.samples.len().saturating_sub(1);
        let place = (last as f64 * part).ceil() as usize;
        self.samples.get(place).copied().unwrap_or(f64::NAN)
    }

    fn holds(&self, aim: Aim) -> bool {
        let found = match aim {
            Aim::Median(_) => self.quantile(0.5),
            Aim::P99(_) => self.quantile(0.99),
            Aim::Max(_) => self.quantile(1.0),
        };
        // Also where nothing was measured.
        found <= aim.limit()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "{:<54} {:>5} {:>9} {:>9} {:>9} {:>9}  aim",
            "", "count", "min", "median", "p99", "max"
        )?;
        for row in &self.0 {
            let [min, median, p99, max] = [0.0, 0.5, 0.99, 1.0].map(|part| row.quantile(part));
            let name = format!("{} [{}]", row.name, row.unit);
            let count = row.samples.len();
            write!(
                f,
                "{name:<54} {count:>5} {min:>9.2} {median:>9.2} {p99:>9.2} {max:>9.2} "
            )?;
            for aim in &row.aims {
                let verdict = if row.holds(*aim) { "ok" } else { "MISSED" };
                write!(f, " {} <= {}: {verdict}", aim.name(), aim.limit())?;
            }
            writeln!(f)?;
        }
        Ok(())
    }
}
