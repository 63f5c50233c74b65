//! Values that say themselves that they are secret. No setting is meant to hold
//! one, but what is printed is sent to others.

/// Stands for a value with a secret in it.
pub(crate) const MASK: &str = "***";

/// The beginning of a token's header (RFC 7519): `{"` in base64.
const JWT: &str = "eyJ";

/// In a value, in lower case: there is a secret behind it.
const MARKS: [&str; 7] = [
    "-----begin",
    "bearer ",
    "basic ",
    "passwd=",
    "password=",
    "secret=",
    "token=",
];

/// Whether there is a private key, a token, or a URL with a user and password
/// in `value`.
pub(crate) fn is_in(value: &str) -> bool {
    let is_token = value.contains(JWT);
    let value = value.to_lowercase();
    let user = value
        .split_once("://")
        .and_then(|(_, rest)| rest.split(['/', '?', '#']).next())
        .is_some_and(|authority| authority.contains('@'));
    user || is_token || MARKS.iter().any(|mark| value.contains(mark))
}

/// `value`, or what stands for it where there is a secret in it.
pub(super) fn masked(value: &str) -> &str {
    if is_in(value) { MASK } else { value }
}
