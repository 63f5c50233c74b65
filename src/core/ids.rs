//! Names that must not be mixed up, each a type of its own.

use std::fmt;
use std::num::NonZeroU32;

macro_rules! text_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(String);

        impl $name {
            /// Takes the text as it is.
            pub fn new(text: impl Into<String>) -> Self {
                Self(text.into())
            }

            /// The text.
            #[must_use]
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

text_id!(
    /// Names one side of a connection for IPAM: an LB connection's id, or the
    /// id of a target connection's **first** path segment (the target's own,
    /// which survives a change of the proxy's pod).
    LeaseId
);
text_id!(
    /// The name of an endpoint in the registry; for an LB, its pod's name.
    EndpointName
);
text_id!(
    /// The id of this process's own path segment of a target connection.
    SegmentId
);

/// The name of a network interface as Linux takes it: 1..=15 bytes, without
/// `/`, blanks or control characters, neither `.` nor `..`, no `:` and no `%`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfName(String);

/// Why a text is no interface name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IfNameError(String);

impl IfName {
    /// Longest name in bytes: IFNAMSIZ less the NUL.
    pub const MAX: usize = 15;

    /// Checks `text` by the rules of the kernel's `dev_valid_name`
    /// (net/core/dev.c), and refuses `%` and control bytes besides: the first
    /// is a pattern when a link is made, the second forges log lines.
    ///
    /// # Errors
    ///
    /// When the kernel would not take the name, or should not.
    pub fn parse(text: &str) -> Result<Self, IfNameError> {
        let bad_byte =
            |byte: u8| byte == b'/' || byte == b':' || byte == b'%' || !byte.is_ascii_graphic();
        if text.is_empty()
            || text.len() > Self::MAX
            || text == "."
            || text == ".."
            || text.bytes().any(bad_byte)
        {
            return Err(IfNameError(text.to_owned()));
        }
        Ok(Self(text.to_owned()))
    }

    /// The name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether the interface is the pod's own, which no connection may bring:
    /// a forwarder deletes an existing link of the name that it makes, and as a
    /// port of the bridge the primary interface would cut the pod off.
    #[must_use]
    pub fn is_the_pods(&self) -> bool {
        ["lo", "eth0", "bridge0"].contains(&self.as_str())
    }
}

impl fmt::Display for IfName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for IfNameError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{:?} is no interface name (1 to {} printable bytes without '/', ':' and '%')",
            self.0,
            IfName::MAX
        )
    }
}

impl std::error::Error for IfNameError {}

/// The index of a network interface; the kernel's are never 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct IfIndex(NonZeroU32);

impl IfIndex {
    /// `None` for 0, which stands for "no interface" in netlink messages.
    #[must_use]
    pub fn new(index: u32) -> Option<Self> {
        NonZeroU32::new(index).map(Self)
    }

    /// The number.
    #[must_use]
    pub fn get(self) -> u32 {
        self.0.get()
    }
}

impl fmt::Display for IfIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which connection a bridge port belongs to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortKey {
    /// The connection to a load balancer.
    Lb(EndpointName),
    /// The connection of a target, by this process's path segment.
    Target(SegmentId),
}

impl fmt::Display for PortKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Lb(name) => write!(f, "LB {name}"),
            Self::Target(id) => write!(f, "target connection {id}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn interface_names() {
        for good in ["a", "load-balan-aZ09", "nsm0", "..."] {
            assert_eq!(IfName::parse(good).unwrap().as_str(), good);
        }
        for bad in [
            "",
            "0123456789abcdef",
            ".",
            "..",
            "a/b",
            "a b",
            "a\nb",
            "eth%d",
            "a:b",
            "\u{1b}[31m",
            "é",
        ] {
            assert!(IfName::parse(bad).is_err(), "{bad:?}");
        }
        assert!(IfIndex::new(0).is_none());
        for (name, own) in [
            ("lo", true),
            ("eth0", true),
            ("bridge0", true),
            ("eth1", false),
        ] {
            assert_eq!(IfName::parse(name).unwrap().is_the_pods(), own, "{name}");
        }
    }
}
