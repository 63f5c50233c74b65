//! Messages that no decoder takes: a peer that is mad, not only wrong.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Instant;

use parking_lot::{Condvar, Mutex};
use protobuf::Message;

/// The fields that are spoilt: whatever of them a message knows as a string, a
/// message or a map.
const FIELDS: std::ops::RangeInclusive<u32> = 1..=8;

/// What is wrong with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Spoil {
    /// Bytes that are neither text nor a message.
    Rubbish,
    /// A message that says it is longer than it is.
    Truncated,
    /// Groups in groups, 10 000 deep.
    Nested,
    /// Five megabytes.
    Oversized,
}

impl Spoil {
    /// Adds to `message` what makes its bytes undecodable. A message of plain
    /// strings takes [`Spoil::Truncated`] and [`Spoil::Nested`] for text.
    pub fn apply(self, message: &mut impl Message) {
        let bytes = match self {
            Self::Rubbish => vec![0xff; 8],
            Self::Truncated => vec![0x0a, 0x7f, b'a'],
            Self::Nested => vec![0x0b; 10_000],
            Self::Oversized => vec![b'a'; 5 << 20],
        };
        let fields = match self {
            Self::Oversized => 1..=1,
            _ => FIELDS,
        };
        let unknown = message.mut_unknown_fields();
        for field in fields {
            unknown.add_length_delimited(field, bytes.clone());
        }
    }
}

/// Which answers of a peer are spoilt; clones are the same.
#[derive(Debug, Clone, Default)]
pub struct Spoils(Arc<(Mutex<State>, Condvar)>);

#[derive(Debug, Default)]
struct State {
    on: BTreeMap<&'static str, Spoil>,
    done: BTreeMap<&'static str, usize>,
}

impl Spoils {
    /// Spoils the answers of `method`, a path, until it is told `None`.
    pub fn set(&self, method: &'static str, spoil: Option<Spoil>) {
        let mut state = self.0.0.lock();
        match spoil {
            Some(spoil) => state.on.insert(method, spoil),
            None => state.on.remove(method),
        };
    }

    /// Waits until `count` answers of `method` were spoilt.
    pub fn wait(
        &self,
        method: &'static str,
        count: usize,
        deadline: Instant,
    ) -> Result<(), String> {
        let mut state = self.0.0.lock();
        loop {
            let done = state.done.get(method).copied().unwrap_or_default();
            if done >= count {
                return Ok(());
            }
            if self.0.1.wait_until(&mut state, deadline).timed_out() {
                return Err(format!(
                    "{done} answers of {method} were spoilt, not {count}"
                ));
            }
        }
    }

    /// How many answers of `method` were spoilt.
    #[must_use]
    pub fn done(&self, method: &'static str) -> usize {
        let state = self.0.0.lock();
        state.done.get(method).copied().unwrap_or_default()
    }

    /// Spoils an answer of `method` if that is wanted; whether it did.
    pub(crate) fn apply(&self, method: &'static str, answer: &mut impl Message) -> bool {
        let mut state = self.0.0.lock();
        let Some(spoil) = state.on.get(method).copied() else {
            return false;
        };
        spoil.apply(answer);
        *state.done.entry(method).or_default() += 1;
        drop(state);
        self.0.1.notify_all();
        true
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use meridio_proxy::proto::connection::{Connection, ConnectionEvent};
    use meridio_proxy::proto::ipam::Prefix;
    use meridio_proxy::proto::nsp::VipResponse;
    use meridio_proxy::proto::registry::NetworkServiceEndpointResponse;
    use meridio_proxy::proto::workload::X509SVIDResponse;

    fn is_refused<M: Message>(spoil: Spoil) -> bool {
        let mut message = M::new();
        spoil.apply(&mut message);
        M::parse_from_bytes(&message.write_to_bytes().unwrap()).is_err()
    }

    #[test]
    fn what_is_spoilt_cannot_be_decoded() {
        for spoil in [Spoil::Rubbish, Spoil::Truncated, Spoil::Nested] {
            assert!(is_refused::<Connection>(spoil), "{spoil:?}");
            assert!(is_refused::<ConnectionEvent>(spoil), "{spoil:?}");
            assert!(
                is_refused::<NetworkServiceEndpointResponse>(spoil),
                "{spoil:?}"
            );
            assert!(is_refused::<VipResponse>(spoil), "{spoil:?}");
            assert!(is_refused::<X509SVIDResponse>(spoil), "{spoil:?}");
        }
        assert!(is_refused::<Prefix>(Spoil::Rubbish));
    }
}
