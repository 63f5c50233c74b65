//! `--debug`: the state of the system as one line of JSON, with the keys of
//! Meridio's (pkg/debug). A list that could not be had is `null`, as there.

use std::time::UNIX_EPOCH;

use serde_json::Value;

use crate::cli::VERSION;
use crate::config::TABLE;
use crate::sync::clock;

/// The version of the JSON's form.
const FORM: &str = "v0.0.1";

/// The report, without a line feed. The environment is limited to settings:
/// the container may hold other people's secrets.
#[must_use]
pub fn report() -> String {
    let text = |text: &str| Value::from(text).to_string();
    let unix_time = clock::wall()
        .duration_since(UNIX_EPOCH)
        .map_or(0, |since| since.as_secs());
    let environment: Value = TABLE
        .iter()
        .filter_map(|row| {
            let value = std::env::var_os(row.variable)?;
            Some(format!("{}={}", row.variable, value.to_string_lossy()))
        })
        .collect::<Vec<_>>()
        .into();
    format!(
        "{{\"version\":{},\"meridio-version\":{},\"unix-time\":{unix_time},\
         \"network-interfaces\":null,\"rules\":null,\"route\":null,\"neighbors\":null,\
         \"system\":{{\"cpu-info\":null,\"host-info\":null}},\
         \"environment-variables\":{environment}}}",
        text(FORM),
        text(VERSION),
    )
}
