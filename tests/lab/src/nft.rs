//! Packet classification and counting by nftables, through its program.

use std::collections::BTreeMap;
use std::io::{self, Write};
use std::process::{Command, Stdio};

use crate::netns::Netns;

/// Applies a script in one transaction.
pub fn apply(netns: &Netns, script: &str) -> io::Result<()> {
    run(netns, &["-f", "-"], script).map(drop)
}

/// The packets that each named counter of table `inet lab` has seen.
pub fn counters(netns: &Netns) -> io::Result<BTreeMap<String, u64>> {
    let text = run(
        netns,
        &["-j", "list", "counters", "table", "inet", "lab"],
        "",
    )?;
    let answer: serde_json::Value = serde_json::from_str(&text).map_err(io::Error::other)?;
    let list = answer["nftables"].as_array().cloned().unwrap_or_default();
    Ok(list
        .iter()
        .filter_map(|item| {
            let counter = item.get("counter")?;
            let name = counter["name"].as_str()?.to_owned();
            Some((name, counter["packets"].as_u64()?))
        })
        .collect())
}

fn run(netns: &Netns, args: &[&str], input: &str) -> io::Result<String> {
    netns.try_run(|| {
        let path = std::env::var("PATH").unwrap_or_default();
        let mut child = Command::new("nft")
            .args(args)
            .env("PATH", format!("{path}:/usr/sbin:/sbin"))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .map_err(|error| {
                io::Error::new(
                    error.kind(),
                    format!("nft: {error} (Debian package nftables)"),
                )
            })?;
        if let Some(mut stdin) = child.stdin.take() {
            stdin.write_all(input.as_bytes())?;
        }
        let output = child.wait_with_output()?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let text = String::from_utf8_lossy(&output.stderr);
        Err(io::Error::other(format!(
            "nft {args:?} in {}: {}",
            netns.label(),
            text.trim()
        )))
    })
}
