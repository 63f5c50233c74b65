//! Thread `link-monitor`: reads the kernel's events and tells `net`.

use std::io;

use crossbeam_channel::Sender;
use log::{error, warn};

use super::NetMsg;
use super::netlink::decode::{Notice, is_link, notice};
use super::netlink::frame::frames;
use super::netlink::socket::EventSocket;
use crate::sync::clock;
use crate::sync::poll::{self, WakeFd};
use crate::sync::stop::Stop;

/// Most datagrams that are read before what they say is passed on.
const BURST: usize = 256;

/// What a burst of events says.
#[derive(Debug, Default)]
struct Burst {
    messages: Vec<NetMsg>,
    foreign: bool,
    overrun: bool,
    /// Nothing is left in the queue.
    drained: bool,
}

/// Reads events until told to stop, which takes a wake-up too. `own_port` is
/// the port id of our requests: rules, routes and IPv4 addresses that we
/// change ourselves are told with it and passed over. Links and IPv6 addresses
/// are told without, and judged by what they say.
pub fn run(
    mut socket: EventSocket,
    own_port: u32,
    wake: &WakeFd,
    net: &Sender<NetMsg>,
    stop: &Stop,
) {
    let mut lost = false;
    loop {
        // Lost events are still to be told, though the queue may be empty by now.
        let deadline = lost.then(clock::now);
        if let Err(error) = poll::wait(&[socket.interest(), wake.interest()], deadline) {
            error!("poll of the netlink event socket: {error}");
            return;
        }
        if stop.is_set() {
            return;
        }
        wake.drain();
        let messages = match read(&mut socket, own_port) {
            Ok(burst) => tell(burst, &mut lost),
            Err(error) => {
                error!("netlink events: {error}");
                return;
            }
        };
        for message in messages {
            if net.send(message).is_err() {
                // `net` is gone, and with it the need for events.
                return;
            }
        }
    }
}

/// What `net` is told of a burst. `lost`: events were lost, and the queue was
/// not empty since. Until it is, the kernel drops what is new and says nothing
/// (net/netlink/af_netlink.c, `NETLINK_S_CONGESTED`), so `net` is told only
/// then; what is still in the queue is older than the dump that it makes.
fn tell(burst: Burst, lost: &mut bool) -> Vec<NetMsg> {
    *lost |= burst.overrun;
    if !*lost {
        let mut messages = burst.messages;
        messages.extend(burst.foreign.then_some(NetMsg::Foreign));
        return messages;
    }
    if !burst.drained {
        return Vec::new();
    }
    *lost = false;
    warn!("netlink events were lost; reading the kernel's state anew");
    vec![NetMsg::Overrun]
}

fn read(socket: &mut EventSocket, own_port: u32) -> io::Result<Burst> {
    let mut burst = Burst::default();
    for _ in 0..BURST {
        match socket.receive() {
            Ok(datagram) => {
                for frame in frames(datagram) {
                    if frame.port == own_port && !is_link(&frame) {
                        continue;
                    }
                    match notice(&frame) {
                        Notice::Link(fact) => burst.messages.push(NetMsg::Link(fact)),
                        Notice::State => burst.foreign = true,
                        Notice::Nothing => {}
                    }
                }
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                burst.drained = true;
                break;
            }
            // ENOBUFS: the queue was full. Other: a datagram larger than any.
            Err(error)
                if error.raw_os_error() == Some(libc::ENOBUFS)
                    || error.kind() == io::ErrorKind::Other =>
            {
                burst.overrun = true;
            }
            Err(error) => return Err(error),
        }
    }
    Ok(burst)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::observed::RuleAction;
    use crate::core::op::KernelOp;
    use crate::kernel::Rtnl;
    use crate::kernel::netlink::Netlink;
    use crate::kernel::netlink::socket::RequestSocket;

    fn rules(count: u32) -> Vec<KernelOp> {
        (0..count)
            .map(|n| KernelOp::AddRule {
                source: format!("20.0.{}.{}/32", n / 256, n % 256).parse().unwrap(),
                priority: 20_000 - n,
                action: RuleAction::Lookup,
            })
            .collect()
    }

    fn enter_netns() {
        // SAFETY: unshare takes no pointers; it changes this thread only.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
    }

    #[test]
    fn an_overrun_is_told_when_the_queue_is_empty_again() {
        enter_netns();
        let mut socket = EventSocket::open().unwrap();
        let mut netlink = Netlink::new(RequestSocket::open().unwrap());
        socket.shrink_queue(512 * 1024);
        assert!(netlink.apply(&rules(4000)).iter().all(Result::is_ok));
        let (mut bursts, mut lost) = (0, false);
        let told = loop {
            bursts += 1;
            let told = tell(read(&mut socket, 0).unwrap(), &mut lost);
            if !told.is_empty() {
                break told;
            }
        };
        assert!(matches!(told.as_slice(), [NetMsg::Overrun]), "{told:?}");
        assert!(bursts > 1, "the queue held one burst only");
        // What comes now is told again, and what came before was read.
        let error = socket.receive().unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::WouldBlock);
        assert!(netlink.apply(&rules(1)).iter().all(Result::is_ok));
        let told = tell(read(&mut socket, 0).unwrap(), &mut lost);
        assert!(matches!(told.as_slice(), [NetMsg::Foreign]), "{told:?}");
    }

    #[test]
    fn a_full_queue_is_an_overrun_and_not_the_end() {
        enter_netns();
        let mut socket = EventSocket::open().unwrap();
        let mut netlink = Netlink::new(RequestSocket::open().unwrap());
        let own = netlink.port();
        socket.shrink_queue(1);
        assert!(netlink.apply(&rules(500)).iter().all(Result::is_ok));
        // Lost ones count, whoever caused them.
        let burst = read(&mut socket, own).unwrap();
        assert!(burst.overrun && !burst.foreign);
        assert!(!read(&mut socket, own).unwrap().overrun);
        // Still alive: somebody's change is told, ours is not.
        assert!(netlink.apply(&rules(1)).iter().all(Result::is_ok));
        let burst = read(&mut socket, own).unwrap();
        assert!(!burst.overrun && !burst.foreign && burst.messages.is_empty());
        assert!(netlink.apply(&rules(1)).iter().all(Result::is_ok));
        assert!(read(&mut socket, own + 1).unwrap().foreign);
    }
}
