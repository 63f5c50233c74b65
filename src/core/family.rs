//! IP families, and values that exist once for each.

use std::fmt;
use std::net::IpAddr;

use ipnetwork::IpNetwork;

/// An IP family. IPv4 sorts first, and everything that lists families does so
/// in this order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Family {
    /// IPv4.
    V4,
    /// IPv6.
    V6,
}

impl Family {
    /// Both, in order.
    pub const ALL: [Self; 2] = [Self::V4, Self::V6];

    /// Bits of an address.
    #[must_use]
    pub fn bits(self) -> u8 {
        match self {
            Self::V4 => 32,
            Self::V6 => 128,
        }
    }
}

impl fmt::Display for Family {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::V4 => "IPv4",
            Self::V6 => "IPv6",
        })
    }
}

impl From<IpAddr> for Family {
    fn from(address: IpAddr) -> Self {
        match address {
            IpAddr::V4(_) => Self::V4,
            IpAddr::V6(_) => Self::V6,
        }
    }
}

impl From<IpNetwork> for Family {
    fn from(network: IpNetwork) -> Self {
        network.ip().into()
    }
}

/// The families that a deployment uses (`NSM_IP_FAMILY`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum IpFamilies {
    /// IPv4 only.
    V4,
    /// IPv6 only.
    V6,
    /// Both.
    Dual,
}

impl IpFamilies {
    /// Whether `family` is used.
    #[must_use]
    pub fn has(self, family: Family) -> bool {
        match self {
            Self::V4 => family == Family::V4,
            Self::V6 => family == Family::V6,
            Self::Dual => true,
        }
    }

    /// The families used, IPv4 first.
    pub fn iter(self) -> impl Iterator<Item = Family> {
        Family::ALL
            .into_iter()
            .filter(move |family| self.has(*family))
    }
}

/// One value for each family.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PerFamily<T> {
    /// The IPv4 one.
    pub v4: T,
    /// The IPv6 one.
    pub v6: T,
}

impl<T> PerFamily<T> {
    /// Builds both from the family.
    pub fn from_fn(mut make: impl FnMut(Family) -> T) -> Self {
        Self {
            v4: make(Family::V4),
            v6: make(Family::V6),
        }
    }

    /// The value of `family`.
    pub fn get(&self, family: Family) -> &T {
        match family {
            Family::V4 => &self.v4,
            Family::V6 => &self.v6,
        }
    }

    /// The value of `family`, to change.
    pub fn get_mut(&mut self, family: Family) -> &mut T {
        match family {
            Family::V4 => &mut self.v4,
            Family::V6 => &mut self.v6,
        }
    }

    /// Both, IPv4 first.
    pub fn iter(&self) -> impl Iterator<Item = (Family, &T)> {
        Family::ALL
            .into_iter()
            .map(|family| (family, self.get(family)))
    }
}

impl<T> PerFamily<Option<T>> {
    /// The values that are there, IPv4 first.
    pub fn values(&self) -> impl Iterator<Item = &T> {
        Family::ALL
            .into_iter()
            .filter_map(|family| self.get(family).as_ref())
    }

    /// Whether each of `families` has a value.
    #[must_use]
    pub fn covers(&self, families: IpFamilies) -> bool {
        families.iter().all(|family| self.get(family).is_some())
    }
}
