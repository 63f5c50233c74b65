//! The part of the environment that may be shown. Meridio shows all of it, but
//! a report is sent to others, and the container may hold secrets.

use std::ffi::OsString;

use crate::config::TABLE;
use crate::config::secret::{self, MASK};

/// What is shown besides `NSM_*` and the settings.
const HARMLESS: [&str; 7] = ["HOME", "HOSTNAME", "LANG", "PATH", "PWD", "TZ", "USER"];

/// In the name of a variable that is no setting: it holds a secret.
const SECRET_NAMES: [&str; 7] = ["AUTH", "CRED", "KEY", "PASS", "PRIVATE", "SECRET", "TOKEN"];

/// Most letters and digits in a row that no key is suspected behind.
const LONGEST_WORD: usize = 31;

/// `NAME=value` of the variables that are shown, in the order given.
pub fn shown(variables: impl IntoIterator<Item = (OsString, OsString)>) -> Vec<String> {
    variables
        .into_iter()
        .filter_map(|(name, value)| {
            let name = name.to_string_lossy();
            let is_setting = is_setting(&name);
            if !is_setting && !name.starts_with("NSM_") && !HARMLESS.contains(&&*name) {
                return None;
            }
            let value = value.to_string_lossy();
            let secret = secret::is_in(&value) || !is_setting && is_suspect(&name, &value);
            Some(format!("{name}={}", if secret { MASK } else { &value }))
        })
        .collect()
}

fn is_setting(name: &str) -> bool {
    TABLE
        .iter()
        .any(|row| row.variable == name || row.fallback == Some(name))
}

/// Whether a variable of unknown meaning may hold a secret: by its name, or by
/// a run of letters and digits that is as long as a key.
fn is_suspect(name: &str, value: &str) -> bool {
    let name = name.to_uppercase();
    let long = |word: &str| {
        word.len() > LONGEST_WORD
            && word.contains(|c: char| c.is_ascii_digit())
            && word.contains(|c: char| c.is_ascii_alphabetic())
    };
    SECRET_NAMES.iter().any(|mark| name.contains(mark))
        || value
            .split(|c: char| !c.is_ascii_alphanumeric() && !['+', '=', '_'].contains(&c))
            .any(long)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(variable: &str) -> Vec<String> {
        let (name, value) = variable.split_once('=').unwrap();
        shown([(name.into(), value.into())])
    }

    #[test]
    fn settings_and_harmless_names_are_shown_as_they_are() {
        for variable in [
            "NSM_MAX_TOKEN_LIFETIME=10m",
            "NSM_SERVICE_NAME=proxy.conduit-a-1.trench-a.red",
            "NSM_CONNECT_TO=unix:///var/lib/networkservicemesh/nsm.io.sock",
            "NSM_HOST=0123456789abcdef0123456789abcdef",
            "NSM_UNKNOWN=a1b2",
            "NSM_UNKNOWN=keyjar",
            "NSM_POD=6f1f2f6c-3bd1-4b0c-9d0a-1a1a0f3f7a52",
            "SPIFFE_ENDPOINT_SOCKET=unix:///run/spire/sockets/agent.sock",
            "IP_FAMILY=ipv4",
            "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin",
            "HOSTNAME=proxy-conduit-a-1-x7k2p",
            "TZ=",
        ] {
            assert_eq!(show(variable), [variable]);
        }
    }

    #[test]
    fn other_names_are_left_out() {
        for variable in [
            "AWS_SECRET_ACCESS_KEY=x",
            "KUBERNETES_PORT=tcp://10.0.0.1:443",
            "nsm_x=1",
            "SPIFFE_ENDPOINT_SOCKET2=x",
            "=x",
        ] {
            assert_eq!(show(variable), [""; 0], "{variable}");
        }
    }

    #[test]
    fn what_looks_like_a_secret_is_masked() {
        for variable in [
            "NSM_PASSWORD=x",
            "NSM_API_KEY=x",
            "NSM_TOKEN=x",
            "NSM_X=eyJhbGciOiJFUzI1NiJ9.e30.c2ln",
            "NSM_X=Bearer abc",
            "NSM_X=-----BEGIN EC PRIVATE KEY-----",
            "NSM_X=0123456789abcdef0123456789abcdef",
            "NSM_CONNECT_TO=tcp://user:hunter2@nsmgr:5001",
            "NSM_NAME=password=hunter2",
            "HOSTNAME=Basic dTpw",
        ] {
            let (name, _) = variable.split_once('=').unwrap();
            assert_eq!(show(variable), [format!("{name}=***")]);
        }
    }
}
