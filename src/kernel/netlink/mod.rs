//! The kernel, asked through rtnetlink.

pub mod decode;
pub mod encode;
pub mod frame;
#[cfg(test)]
mod golden;
pub mod socket;

use std::collections::BTreeMap;
use std::io;
use std::net::IpAddr;

use self::encode::Dump;
use self::socket::RequestSocket;
use super::Rtnl;
use super::announce::Mac;
use super::error::{KernelError, OpError};
use super::packet::PacketSocket;
use crate::core::announce::Behind;
use crate::core::family::Family;
use crate::core::ids::{IfIndex, IfName};
use crate::core::observed::{Link, Observed, Rule};
use crate::core::op::KernelOp;

/// Most messages of a batch: more bring nothing, and each refusal takes room
/// in the receive queue.
const BATCH_MESSAGES: usize = 128;
/// Most bytes of a batch, well within the default send buffer.
const BATCH_BYTES: usize = 64 * 1024;

/// The real kernel.
pub struct Netlink {
    socket: RequestSocket,
    /// Where announcements may be sent.
    packets: Option<PacketSocket>,
}

impl Netlink {
    /// Over an open socket.
    #[must_use]
    pub fn new(socket: RequestSocket) -> Self {
        Self {
            socket,
            packets: None,
        }
    }

    /// Sends announcements, too.
    #[must_use]
    pub fn with_packets(mut self, packets: Option<PacketSocket>) -> Self {
        self.packets = packets;
        self
    }

    /// The port id of our requests.
    #[must_use]
    pub fn port(&self) -> u32 {
        self.socket.port()
    }

    /// The link of that name, if there is one.
    ///
    /// # Errors
    ///
    /// When the kernel cannot be asked.
    pub fn link(&mut self, name: &IfName) -> Result<Option<Link>, KernelError> {
        let sequence = self.socket.sequences(1);
        let request = encode::get_link(name, sequence);
        let mut found = None;
        let outcome = self.socket.dump(&request, sequence, |frame| {
            if frame.kind == decode::RTM_NEWLINK {
                found = decode::link(frame.payload);
            }
        });
        match outcome {
            // The kernel takes a link's other names (IFLA_ALT_IFNAME), too.
            Ok(_) => Ok(found.filter(|link| link.name == *name)),
            Err(OpError::Refused {
                errno: libc::ENODEV,
                ..
            }) => Ok(None),
            Err(error) => Err(KernelError(format!("look at link {name}: {error}"))),
        }
    }

    /// The one message that answers the request that `encode` makes, as `read`
    /// understands it; nothing where the kernel knows of nothing.
    fn get<T>(
        &mut self,
        encode: impl FnOnce(u32) -> Vec<u8>,
        read: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Option<T>, KernelError> {
        let sequence = self.socket.sequences(1);
        let mut found = None;
        let outcome = self.socket.dump(&encode(sequence), sequence, |frame| {
            found = read(frame.payload);
        });
        match outcome {
            Ok(_) => Ok(found),
            Err(OpError::Refused { errno, .. })
                if [libc::ENOENT, libc::ENODEV].contains(&errno) =>
            {
                Ok(None)
            }
            Err(error) => Err(KernelError(error.to_string())),
        }
    }

    /// Reads a part of the state with `read`, again while it changes under our
    /// hands. A table or a family that does not exist is empty.
    fn dump<T>(
        &mut self,
        what: Dump,
        message_type: u16,
        read: impl Fn(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, KernelError> {
        let mut found = Vec::new();
        for _ in socket::dump_tries() {
            found.clear();
            let sequence = self.socket.sequences(1);
            let request = encode::dump(what, sequence);
            let outcome = self.socket.dump(&request, sequence, |frame| {
                if frame.kind == message_type {
                    found.extend(read(frame.payload));
                }
            });
            match outcome {
                Ok(true) => return Ok(found),
                Ok(false) => {}
                // No such table; no such family in this kernel.
                Err(OpError::Refused { errno, .. })
                    if [libc::ENOENT, libc::EAFNOSUPPORT, libc::EOPNOTSUPP].contains(&errno)
                        && what != Dump::Links =>
                {
                    return Ok(Vec::new());
                }
                Err(error) => return Err(KernelError(format!("dump of {what:?}: {error}"))),
            }
        }
        // Changing all the time: the last answer is as good as the next, and
        // the events behind the changes bring another dump.
        Ok(found)
    }

    /// Rules have no mark for an interrupted dump (net/core/fib_rules.c has no
    /// generation counter): two that agree are taken for whole.
    fn rules(&mut self, family: Family) -> Result<BTreeMap<Rule, u32>, KernelError> {
        let mut last = None;
        for _ in socket::dump_tries() {
            let mut rules: BTreeMap<Rule, u32> = BTreeMap::new();
            for rule in self.dump(Dump::Rules(family), decode::RTM_NEWRULE, decode::rule)? {
                *rules.entry(rule).or_default() += 1;
            }
            if last.as_ref() == Some(&rules) {
                return Ok(rules);
            }
            last = Some(rules);
        }
        Ok(last.unwrap_or_default())
    }

    /// Sends one batch; an outcome for each operation.
    fn batch(&mut self, ops: &[KernelOp]) -> Vec<Result<(), OpError>> {
        let count = u32::try_from(ops.len()).unwrap_or(u32::MAX);
        let first = self.socket.sequences(count);
        let last = first.saturating_add(count.saturating_sub(1));
        let mut bytes = Vec::new();
        for (sequence, op) in (first..=last).zip(ops) {
            let mut message = encode::operation(op, sequence);
            if sequence == last {
                encode::want_ack(&mut message);
            }
            bytes.extend(message);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        let mut refusals = BTreeMap::new();
        let sent = self.socket.batch(&bytes, first, last, |sequence, error| {
            refusals.insert(sequence, error);
        });
        (first..=last)
            .zip(ops)
            .map(|(sequence, op)| match (refusals.remove(&sequence), &sent) {
                (Some(error), _) => error.unless_fulfilled(op),
                (None, Ok(())) => Ok(()),
                (None, Err(error)) => Err(OpError::Unknown(error.to_string())),
            })
            .collect()
    }
}

impl Rtnl for Netlink {
    fn snapshot(&mut self) -> Result<Observed, KernelError> {
        let mut observed = Observed::default();
        for link in self.dump(Dump::Links, decode::RTM_NEWLINK, decode::link)? {
            observed.insert_link(link);
        }
        for family in Family::ALL {
            let what = Dump::Addresses(family);
            for address in self.dump(what, decode::RTM_NEWADDR, decode::address)? {
                let entry = (address.link, address.prefix);
                observed.addresses.insert(entry);
                observed
                    .duplicates
                    .extend(address.duplicate.then_some(entry));
            }
            for (family, metric, kind) in
                self.dump(Dump::Routes(family), decode::RTM_NEWROUTE, decode::route)?
            {
                observed.routes.get_mut(family).insert(metric, kind);
            }
            observed.rules.extend(self.rules(family)?);
            let silent = self.dump(
                Dump::Neighbours(family),
                decode::RTM_NEWNEIGH,
                decode::silent_neighbour,
            )?;
            let bridge = observed.bridge().map(|link| link.index);
            let ours = silent
                .into_iter()
                .filter(|(index, _)| Some(*index) == bridge);
            observed.silent.extend(ours.map(|(_, address)| address));
        }
        Ok(observed)
    }

    fn apply(&mut self, ops: &[KernelOp]) -> Vec<Result<(), OpError>> {
        let mut outcomes = Vec::with_capacity(ops.len());
        let mut rest = ops;
        while !rest.is_empty() {
            let mut bytes = 0;
            let fitting = rest
                .iter()
                .take(BATCH_MESSAGES)
                .take_while(|op| {
                    bytes += size_bound(op);
                    bytes <= BATCH_BYTES
                })
                .count();
            // An operation that is too large alone is sent alone.
            let (batch, later) = rest.split_at(fitting.max(1));
            let done = self.batch(batch);
            // A kernel that does not answer would keep us for the patience of
            // every further batch.
            let lost = done
                .iter()
                .any(|outcome| matches!(outcome, Err(OpError::Unknown(_))));
            outcomes.extend(done);
            if lost {
                let unsent = || Err(OpError::Unknown("not sent after a lost answer".to_owned()));
                outcomes.extend(later.iter().map(|_| unsent()));
                break;
            }
            rest = later;
        }
        outcomes
    }

    fn hardware_address(
        &mut self,
        bridge: IfIndex,
        address: IpAddr,
        behind: &Behind,
    ) -> Result<Option<Mac>, KernelError> {
        let ports = match behind {
            Behind::Bridge => {
                return self.get(
                    |sequence| encode::get_link_at(bridge, sequence),
                    decode::link_hardware_address,
                );
            }
            Behind::Ports(ports) => ports,
        };
        let known = self.get(
            |sequence| encode::get_neighbour(bridge, address, sequence),
            decode::neighbour,
        )?;
        let Some((_, mac)) = known else {
            return Ok(None);
        };
        let learned = self.get(
            |sequence| encode::get_forwarding(bridge, mac, sequence),
            decode::neighbour,
        )?;
        let port = learned.and_then(|(port, _)| port);
        Ok(port.filter(|port| ports.contains(port)).map(|_| mac))
    }

    fn send(&mut self, bridge: IfIndex, frame: &[u8]) -> io::Result<bool> {
        match &self.packets {
            Some(packets) => packets.send(bridge, frame).map(|()| true),
            None => Ok(false),
        }
    }
}

/// At least as many bytes as the operation's message has.
fn size_bound(op: &KernelOp) -> usize {
    match op {
        KernelOp::ReplaceRoute { hops, .. } => 128 + 32 * hops.len(),
        _ => 256,
    }
}
