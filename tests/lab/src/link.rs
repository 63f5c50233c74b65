//! Links, addresses, routes and rules by netlink, of any namespace: a socket
//! belongs to the namespace that it was made in, wherever it is used.

use std::io;
use std::net::IpAddr;
use std::os::fd::AsRawFd;

use ipnetwork::IpNetwork;
use netlink_packet_core::{
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_EXCL, NLM_F_REPLACE, NLM_F_REQUEST, NetlinkHeader,
    NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoKind, InfoVeth, LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{NeighbourAttribute, NeighbourMessage};
use netlink_packet_route::route::RouteMessage;
use netlink_packet_route::rule::RuleMessage;
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use netlink_sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};
use parking_lot::Mutex;

use crate::netns::Netns;

mod changes;
mod codec;
pub mod watch;
pub use changes::{wait_ready, wait_running, wait_until};
use codec::{
    address_message, collect, family, read_address, read_link, read_route, read_rule,
    route_message, rule_message,
};

/// The routing table that `ip route` shows.
pub const MAIN: u32 = 254;

/// A request socket of one namespace.
pub struct Rtnl {
    socket: Mutex<(Socket, u32)>,
    label: String,
}

/// An interface as the kernel describes it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Link {
    pub index: u32,
    pub name: String,
    pub alias: String,
    pub mtu: u32,
    pub up: bool,
    /// The other end is up, too.
    pub carrier: bool,
    /// The kernel has noted the carrier. It does so by deferred work, and
    /// until then the link drops what is sent, and a bridge its port's packets.
    pub running: bool,
    /// The bridge that it is a port of.
    pub master: Option<u32>,
    pub mac: Vec<u8>,
}

/// An address as the kernel describes it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Address {
    pub index: u32,
    pub network: IpNetwork,
    /// Neither link-local nor of the host alone.
    pub global: bool,
    /// Not usable yet: duplicate address detection is running.
    pub tentative: bool,
}

/// A next hop.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hop {
    pub gateway: Option<IpAddr>,
    pub index: u32,
}

/// A route. Without hops it is an unreachable one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Route {
    pub destination: IpNetwork,
    pub table: u32,
    pub hops: Vec<Hop>,
    pub metric: Option<u32>,
}

/// A routing rule.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Rule {
    pub from: Option<IpNetwork>,
    pub mark: Option<u32>,
    pub priority: u32,
    pub table: u32,
    /// Only read, never set.
    pub protocol: u8,
}

impl Route {
    /// `destination via gateway dev index` in the main table.
    #[must_use]
    pub fn via(destination: IpNetwork, gateway: IpAddr, index: u32) -> Self {
        Self {
            destination,
            table: MAIN,
            hops: vec![Hop {
                gateway: Some(gateway),
                index,
            }],
            metric: None,
        }
    }

    /// `destination dev index` in the main table.
    #[must_use]
    pub fn direct(destination: IpNetwork, index: u32) -> Self {
        Self {
            destination,
            table: MAIN,
            hops: vec![Hop {
                gateway: None,
                index,
            }],
            metric: None,
        }
    }

    /// The same route in another table.
    #[must_use]
    pub fn in_table(mut self, table: u32) -> Self {
        self.table = table;
        self
    }
}

/// `0.0.0.0/0` or `::/0`, as `like` is.
#[must_use]
pub fn any(like: IpAddr) -> IpNetwork {
    match like {
        IpAddr::V4(_) => IpNetwork::new(std::net::Ipv4Addr::UNSPECIFIED.into(), 0),
        IpAddr::V6(_) => IpNetwork::new(std::net::Ipv6Addr::UNSPECIFIED.into(), 0),
    }
    .expect("a zero length fits both families")
}

/// The address as a network of its own.
#[must_use]
pub fn host(address: IpAddr) -> IpNetwork {
    address.into()
}

impl Rtnl {
    /// A socket of the namespace. Answers are waited for at most five seconds.
    pub fn open(netns: &Netns) -> io::Result<Self> {
        let mut socket = netns.try_run(|| Socket::new(NETLINK_ROUTE))?;
        socket.bind_auto()?;
        socket.connect(&SocketAddr::new(0, 0))?;
        let limit = libc::timeval {
            tv_sec: 5,
            tv_usec: 0,
        };
        // SAFETY: the option is read from `limit`, whose size is given.
        crate::netns::check(unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_RCVTIMEO,
                (&raw const limit).cast(),
                size_of::<libc::timeval>() as libc::socklen_t,
            )
        })?;
        Ok(Self {
            socket: Mutex::new((socket, 0)),
            label: netns.label().to_owned(),
        })
    }

    /// Makes a pair: `name` here, `peer` in the other namespace. Both down.
    pub fn add_veth(&self, name: &str, peer: &str, peer_netns: &Netns) -> io::Result<()> {
        let mut other = LinkMessage::default();
        other.attributes = vec![
            LinkAttribute::IfName(peer.to_owned()),
            LinkAttribute::NetNsFd(peer_netns.raw()),
        ];
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::LinkInfo(vec![
                LinkInfo::Kind(InfoKind::Veth),
                LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(other))),
            ]),
        ];
        self.change(
            &format!("add veth {name} - {peer}"),
            RouteNetlinkMessage::NewLink(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    /// Makes a bridge, down.
    pub fn add_bridge(&self, name: &str) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.attributes = vec![
            LinkAttribute::IfName(name.to_owned()),
            LinkAttribute::LinkInfo(vec![LinkInfo::Kind(InfoKind::Bridge)]),
        ];
        self.change(
            &format!("add bridge {name}"),
            RouteNetlinkMessage::NewLink(message),
            NLM_F_CREATE | NLM_F_EXCL,
        )
    }

    /// Sets any attributes of a link.
    pub fn set_link(&self, index: u32, attributes: Vec<LinkAttribute>) -> io::Result<()> {
        let what = format!("set link {index} {attributes:?}");
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.attributes = attributes;
        self.change(&what, RouteNetlinkMessage::SetLink(message), 0)
    }

    /// Sets a link up or down.
    pub fn set_up(&self, index: u32, up: bool) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        message.header.change_mask = LinkFlags::Up;
        if up {
            message.header.flags = LinkFlags::Up;
        }
        self.change(
            &format!("set link {index} {}", if up { "up" } else { "down" }),
            RouteNetlinkMessage::SetLink(message),
            0,
        )
    }

    /// Makes a link a port of a bridge, or of none.
    pub fn set_master(&self, index: u32, bridge: Option<u32>) -> io::Result<()> {
        self.set_link(index, vec![LinkAttribute::Controller(bridge.unwrap_or(0))])
    }

    /// Deletes a link (and its peer); one that is gone already is no error.
    pub fn delete_link(&self, index: u32) -> io::Result<()> {
        let mut message = LinkMessage::default();
        message.header.index = index;
        self.change_unless(
            &format!("delete link {index}"),
            RouteNetlinkMessage::DelLink(message),
            0,
            &[libc::ENODEV],
        )
    }

    /// All links.
    pub fn links(&self) -> io::Result<Vec<Link>> {
        let answer = self.dump(
            "links",
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
        )?;
        Ok(answer
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewLink(link) => Some(read_link(&link)),
                _ => None,
            })
            .collect())
    }

    /// The link of that name, if there is one.
    pub fn find(&self, name: &str) -> io::Result<Option<Link>> {
        Ok(self.links()?.into_iter().find(|link| link.name == name))
    }

    /// The link of that name.
    pub fn link(&self, name: &str) -> io::Result<Link> {
        self.find(name)?
            .ok_or_else(|| io::Error::other(format!("no link {name} in {}", self.label)))
    }

    /// Adds an address, usable at once; one that is there already is no error.
    pub fn add_address(&self, index: u32, network: IpNetwork) -> io::Result<()> {
        let mut message = address_message(index, network);
        message
            .attributes
            .push(AddressAttribute::Flags(AddressFlags::Nodad));
        self.change(
            &format!("add address {network} to link {index}"),
            RouteNetlinkMessage::NewAddress(message),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Removes an address; one that is not there is no error.
    pub fn delete_address(&self, index: u32, network: IpNetwork) -> io::Result<()> {
        self.change_unless(
            &format!("delete address {network} of link {index}"),
            RouteNetlinkMessage::DelAddress(address_message(index, network)),
            0,
            &[libc::EADDRNOTAVAIL, libc::ENODEV],
        )
    }

    /// All addresses.
    pub fn addresses(&self) -> io::Result<Vec<Address>> {
        let answer = self.dump(
            "addresses",
            RouteNetlinkMessage::GetAddress(AddressMessage::default()),
        )?;
        Ok(answer
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewAddress(address) => read_address(&address),
                _ => None,
            })
            .collect())
    }

    /// Adds a route or replaces the one of the same destination, table and
    /// metric.
    pub fn replace_route(&self, route: &Route) -> io::Result<()> {
        self.change(
            &format!("replace route {route:?}"),
            RouteNetlinkMessage::NewRoute(route_message(route)),
            NLM_F_CREATE | NLM_F_REPLACE,
        )
    }

    /// Deletes a route; one that is not there is no error.
    pub fn delete_route(&self, route: &Route) -> io::Result<()> {
        self.change_unless(
            &format!("delete route {route:?}"),
            RouteNetlinkMessage::DelRoute(route_message(route)),
            0,
            &[libc::ESRCH, libc::ENOENT, libc::ENODEV],
        )
    }

    /// The routes of one table, both families.
    pub fn routes(&self, table: u32) -> io::Result<Vec<Route>> {
        let mut found = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let mut message = RouteMessage::default();
            message.header.address_family = family;
            for message in self.dump("routes", RouteNetlinkMessage::GetRoute(message))? {
                if let RouteNetlinkMessage::NewRoute(route) = message {
                    found.extend(read_route(&route).filter(|route| route.table == table));
                }
            }
        }
        Ok(found)
    }

    /// Adds a rule; one that is there already is no error.
    pub fn add_rule(&self, rule: &Rule, like: IpAddr) -> io::Result<()> {
        self.change_unless(
            &format!("add rule {rule:?}"),
            RouteNetlinkMessage::NewRule(rule_message(rule, like)),
            NLM_F_CREATE | NLM_F_EXCL,
            &[libc::EEXIST],
        )
    }

    /// Deletes a rule; one that is not there is no error.
    pub fn delete_rule(&self, rule: &Rule, like: IpAddr) -> io::Result<()> {
        self.change_unless(
            &format!("delete rule {rule:?}"),
            RouteNetlinkMessage::DelRule(rule_message(rule, like)),
            0,
            &[libc::ENOENT],
        )
    }

    /// Drops what is known of a neighbour; nothing known is no error.
    pub fn forget_neighbour(&self, index: u32, address: IpAddr) -> io::Result<()> {
        let mut message = NeighbourMessage::default();
        message.header.family = family(address);
        message.header.ifindex = index;
        message.attributes = vec![NeighbourAttribute::Destination(address.into())];
        self.change_unless(
            &format!("forget neighbour {address} of link {index}"),
            RouteNetlinkMessage::DelNeighbour(message),
            0,
            &[libc::ENOENT, libc::ENXIO, libc::EINVAL, libc::ENODEV],
        )
    }

    /// The rules of the family of `like`, in order.
    pub fn rules(&self, like: IpAddr) -> io::Result<Vec<Rule>> {
        let mut message = RuleMessage::default();
        message.header.family = family(like);
        let answer = self.dump("rules", RouteNetlinkMessage::GetRule(message))?;
        Ok(answer
            .into_iter()
            .filter_map(|message| match message {
                RouteNetlinkMessage::NewRule(rule) => Some(read_rule(&rule)),
                _ => None,
            })
            .collect())
    }

    fn change(&self, what: &str, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.change_unless(what, message, flags, &[])
    }

    /// Sends a change; the errors `done` say that there was nothing to do.
    fn change_unless(
        &self,
        what: &str,
        message: RouteNetlinkMessage,
        flags: u16,
        done: &[i32],
    ) -> io::Result<()> {
        match self.exchange(message, NLM_F_REQUEST | NLM_F_ACK | flags) {
            Err(error) if error.raw_os_error().is_some_and(|n| done.contains(&n)) => Ok(()),
            Err(error) => Err(self.explain(what, &error)),
            Ok(_) => Ok(()),
        }
    }

    fn dump(
        &self,
        what: &str,
        message: RouteNetlinkMessage,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        self.exchange(message, NLM_F_REQUEST | NLM_F_DUMP)
            .map_err(|error| self.explain(&format!("list {what}"), &error))
    }

    fn explain(&self, what: &str, error: &io::Error) -> io::Error {
        io::Error::new(error.kind(), format!("{what} in {}: {error}", self.label))
    }

    fn exchange(
        &self,
        message: RouteNetlinkMessage,
        flags: u16,
    ) -> io::Result<Vec<RouteNetlinkMessage>> {
        let mut guard = self.socket.lock();
        guard.1 += 1;
        let sequence = guard.1;
        let mut header = NetlinkHeader::default();
        header.flags = flags;
        header.sequence_number = sequence;
        let mut request = NetlinkMessage::new(header, NetlinkPayload::InnerMessage(message));
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        guard.0.send(&bytes, 0)?;
        let mut found = Vec::new();
        loop {
            let (received, _) = guard.0.recv_from_full()?;
            if collect(&received, sequence, &mut found)? {
                return Ok(found);
            }
        }
    }
}
