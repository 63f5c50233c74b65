//! Thread `link-monitor`: reads the kernel's events and tells `net`.

use std::io;

use crossbeam_channel::Sender;
use log::{error, warn};

use super::NetMsg;
use super::netlink::decode::{Notice, is_link, notice};
use super::netlink::frame::frames;
use super::netlink::socket::EventSocket;
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
    loop {
        if let Err(error) = poll::wait(&[socket.interest(), wake.interest()], None) {
            error!("poll of the netlink event socket: {error}");
            return;
        }
        if stop.is_set() {
            return;
        }
        wake.drain();
        let burst = match read(&mut socket, own_port) {
            Ok(burst) => burst,
            Err(error) => {
                error!("netlink events: {error}");
                return;
            }
        };
        if burst.overrun {
            warn!("netlink events were lost; reading the kernel's state anew");
        }
        let general = match (burst.overrun, burst.foreign) {
            (true, _) => Some(NetMsg::Overrun),
            (false, true) => Some(NetMsg::Foreign),
            (false, false) => None,
        };
        for message in burst.messages.into_iter().chain(general) {
            if net.send(message).is_err() {
                // `net` is gone, and with it the need for events.
                return;
            }
        }
    }
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
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
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
    use crate::core::op::KernelOp;
    use crate::kernel::Rtnl;
    use crate::kernel::netlink::Netlink;
    use crate::kernel::netlink::socket::RequestSocket;

    fn rules(count: u32) -> Vec<KernelOp> {
        (0..count)
            .map(|n| KernelOp::AddRule {
                source: format!("20.0.{}.{}/32", n / 256, n % 256).parse().unwrap(),
                priority: 20_000 - n,
            })
            .collect()
    }

    #[test]
    fn a_full_queue_is_an_overrun_and_not_the_end() {
        // SAFETY: unshare takes no pointers; it changes this thread only.
        let result = unsafe { libc::unshare(libc::CLONE_NEWNET) };
        assert_eq!(result, 0, "{}", io::Error::last_os_error());
        let mut socket = EventSocket::open().unwrap();
        let mut netlink = Netlink::new(RequestSocket::open().unwrap());
        let own = netlink.port();
        socket.shrink_queue();
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
