//! The lab's packets without the daemon: a bridge, a multipath route and rules
//! made by hand take the proxy's place. It shows that the lab delivers what it
//! is told to, and that it notices what is not delivered.
#![allow(missing_docs, clippy::unwrap_used, reason = "a test may panic")]

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use ipnetwork::IpNetwork;
use meridio_lab::burst;
use meridio_lab::datapath::{Datapath, End, LocalEndpoint};
use meridio_lab::echo::PORT;
use meridio_lab::lb::{Lb, Targets};
use meridio_lab::link::{Hop, Route, Rtnl, Rule, any, host, wait_running};
use meridio_lab::netns::Netns;
use meridio_lab::router::Router;
use meridio_lab::target::{Mesh, Target, Wish};
use meridio_lab::traffic::{Flows, Pace};
use meridio_lab::veth::VethDatapath;
use meridio_proxy::proto::connection::Connection;
use netlink_packet_route::link::LinkAttribute;
use parking_lot::Mutex;

const VIPS: [&str; 2] = ["20.0.0.1", "2000::1"];
const LIMIT: Duration = Duration::from_secs(20);

/// What the daemon would do, by hand.
struct ByHand {
    netns: Netns,
    rtnl: Rtnl,
    bridge: u32,
    datapath: VethDatapath,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    next: u32,
    children: BTreeMap<String, u32>,
    hops: BTreeMap<String, u32>,
}

impl ByHand {
    fn new() -> Arc<Self> {
        let netns = Netns::new("proxy").unwrap();
        netns.route_packets().unwrap();
        let rtnl = Rtnl::open(&netns).unwrap();
        rtnl.add_bridge("bridge0").unwrap();
        let bridge = rtnl.link("bridge0").unwrap().index;
        // Otherwise the bridge borrows the lowest address of its ports, and
        // another one with each port that joins: the lab notices the loss.
        let mac = LinkAttribute::Address(vec![2, 0, 0, 0, 0, 1]);
        rtnl.set_link(bridge, vec![mac]).unwrap();
        rtnl.set_up(bridge, true).unwrap();
        for address in ["172.16.0.1/24", "fd00::1/64"] {
            rtnl.add_address(bridge, address.parse().unwrap()).unwrap();
        }
        Arc::new(Self {
            netns,
            rtnl,
            bridge,
            datapath: VethDatapath::new(),
            state: Mutex::new(State {
                next: 2,
                ..State::default()
            }),
        })
    }

    /// The same two pairs of addresses for the same id, as IPAM does it.
    fn addresses(&self, id: &str) -> [Vec<String>; 2] {
        let mut state = self.state.lock();
        let next = state.next;
        let first = *state.children.entry(id.to_owned()).or_insert(next);
        if first == next {
            state.next += 2;
        }
        [first, first + 1].map(|n| vec![format!("172.16.0.{n}/24"), format!("fd00::{n:x}/64")])
    }

    fn end(&self, ifname: &str, alias: &str) -> End {
        End {
            netns: self.netns.fd(),
            ifname: ifname.to_owned(),
            alias: alias.to_owned(),
        }
    }

    /// A port forwards from the moment that it joins only if it is running.
    fn enslave(&self, ifname: &str) {
        wait_running(&self.netns, &self.rtnl, ifname).unwrap();
        let index = self.rtnl.link(ifname).unwrap().index;
        self.rtnl.set_master(index, Some(self.bridge)).unwrap();
    }

    fn connect_lb(&self, lb: &Lb) {
        let id = format!("proxy-{}", lb.name());
        let [remote, own] = self.addresses(&id);
        let mut connection = Connection {
            id: id.clone(),
            ..Connection::default()
        };
        let context = connection.context.mut_or_insert_default();
        context.MTU = 1400;
        let ip = context.ip_context.mut_or_insert_default();
        ip.src_ip_addrs = own;
        ip.dst_ip_addrs.clone_from(&remote);
        let connection = lb.request(connection).unwrap();
        let endpoint = End {
            netns: LocalEndpoint::netns(lb),
            ifname: connection.mechanism.parameters["name"].clone(),
            alias: format!("client-{id}"),
        };
        let port = format!("to-{}", lb.name());
        let client = self.end(&port, &format!("server-{id}"));
        self.datapath
            .connect(&id, &client, &endpoint, &connection)
            .unwrap();
        lb.connected(&connection);
        self.enslave(&port);
        let number = self.state.lock().children[&id];
        self.state.lock().hops.insert(lb.name().to_owned(), number);
        self.set_hops();
    }

    fn disconnect_lb(&self, lb: &Lb) {
        self.state.lock().hops.remove(lb.name());
        self.set_hops();
        let id = format!("proxy-{}", lb.name());
        self.datapath.disconnect(&id);
        lb.close(&Connection {
            id,
            ..Connection::default()
        });
    }

    fn set_hops(&self) {
        let numbers: Vec<u32> = self.state.lock().hops.values().copied().collect();
        for family in ["172.16.0.", "fd00::"] {
            let hops: Vec<Hop> = (numbers.iter())
                .map(|n| match family {
                    "fd00::" => format!("{family}{n:x}"),
                    _ => format!("{family}{n}"),
                })
                .map(|gateway| Hop {
                    gateway: Some(gateway.parse().unwrap()),
                    index: self.bridge,
                })
                .collect();
            self.rtnl
                .replace_route(&Route {
                    destination: any(hops[0].gateway.unwrap()),
                    table: 1,
                    hops,
                    metric: None,
                })
                .unwrap();
        }
    }

    fn vip_rule(&self, vip: IpAddr) -> Rule {
        Rule {
            from: Some(host(vip)),
            priority: 30000,
            table: 1,
            ..Rule::default()
        }
    }
}

impl Mesh for ByHand {
    fn connect(&self, wish: Wish) -> Result<Connection, String> {
        let [src, dst] = self.addresses(&wish.id);
        let mut connection = Connection {
            id: wish.id.clone(),
            ..Connection::default()
        };
        let context = connection.context.mut_or_insert_default();
        context.ip_context = Some(wish.ip_context).into();
        let ip = context.ip_context.mut_or_insert_default();
        if ip.src_ip_addrs.is_empty() {
            ip.src_ip_addrs = src;
            ip.dst_ip_addrs = dst;
            ip.extra_prefixes = vec!["172.16.0.1/24".to_owned(), "fd00::1/64".to_owned()];
        }
        let client = End {
            netns: wish.netns,
            ifname: wish.ifname,
            alias: format!("server-{}", wish.id),
        };
        let port = format!("from-{}", wish.name);
        let endpoint = self.end(&port, &format!("client-{}", wish.id));
        self.datapath
            .connect(&wish.id, &client, &endpoint, &connection)?;
        self.enslave(&port);
        Ok(connection)
    }

    fn close(&self, id: &str) -> Result<(), String> {
        self.datapath.disconnect(id);
        Ok(())
    }
}

struct World {
    proxy: Arc<ByHand>,
    router: Router,
    lbs: Vec<Lb>,
    targets: Vec<Target>,
    registered: Targets,
}

impl World {
    fn new(targets: usize) -> Self {
        let proxy = ByHand::new();
        let mut world = Self {
            router: Router::new().unwrap(),
            lbs: Vec::new(),
            targets: Vec::new(),
            registered: Targets::new(),
            proxy,
        };
        for vip in VIPS.map(|vip| vip.parse().unwrap()) {
            let rule = world.proxy.vip_rule(vip);
            world.proxy.rtnl.add_rule(&rule, vip).unwrap();
        }
        for number in 1..=2 {
            world.add_lb(number);
        }
        for number in 1..=targets {
            let mesh: Arc<dyn Mesh> = world.proxy.clone();
            let target =
                Target::new(&format!("target-{number}"), "proxy.c.t.ns", "node", mesh).unwrap();
            target
                .set_vips(&VIPS.map(|vip| vip.parse().unwrap()))
                .unwrap();
            target.connect().unwrap();
            world.targets.push(target);
            world.register(number - 1);
        }
        world
    }

    fn add_lb(&mut self, number: u8) {
        let lb = Lb::new(&format!("lb-{number}"), number).unwrap();
        self.router
            .attach(lb.name(), number, lb.namespace())
            .unwrap();
        self.proxy.connect_lb(&lb);
        lb.set_targets(&self.registered).unwrap();
        self.lbs.push(lb);
        self.spread();
    }

    fn spread(&self) {
        let names: Vec<String> = self.lbs.iter().map(|lb| lb.name().to_owned()).collect();
        self.router.spread_over(&names).unwrap();
    }

    fn register(&mut self, index: usize) {
        let target = &self.targets[index];
        self.registered
            .insert(target.name().to_owned(), target.addresses());
        self.tell_lbs();
    }

    fn tell_lbs(&self) {
        for lb in &self.lbs {
            lb.set_targets(&self.registered).unwrap();
        }
    }

    fn steady(&self) -> Flows {
        let flows = Flows::start(
            self.router.client(),
            &Pace {
                interval: Duration::from_millis(25),
                limit: Duration::from_secs(60),
            },
        )
        .unwrap();
        for to in destinations() {
            flows.add(to, 40).unwrap();
        }
        assert!(flows.all_answered_since(flows.mark(), LIMIT), "warm-up");
        flows
    }
}

fn destinations() -> [SocketAddr; 2] {
    VIPS.map(|vip| SocketAddr::new(vip.parse().unwrap(), PORT))
}

#[test]
fn every_flow_is_answered_and_spread() {
    let world = World::new(3);
    for to in destinations() {
        let tcp = burst::tcp(world.router.client(), to, 200).unwrap();
        assert!(tcp.complete(), "TCP to {to}: {tcp}");
        let udp = burst::udp(world.router.client(), to, 200).unwrap();
        assert!(udp.complete(), "UDP to {to}: {udp}");
        for answers in [&tcp.by_target, &udp.by_target] {
            assert_eq!(answers.len(), 3, "{answers:?}");
            assert!(answers.values().all(|n| *n > 20), "{answers:?}");
        }
        assert!(udp.by_lb.values().all(|n| *n > 60), "{:?}", udp.by_lb);
        assert_eq!(udp.by_lb.keys().collect::<Vec<_>>(), [&1, &2]);
    }
    for lb in &world.lbs {
        let passed = lb.passed().unwrap();
        assert!(
            passed.forwarded_v4 > 0 && passed.returned_v4 > 0,
            "{passed:?}"
        );
        assert!(
            passed.forwarded_v6 > 0 && passed.returned_v6 > 0,
            "{passed:?}"
        );
    }
}

#[test]
fn orderly_changes_lose_nothing() {
    let mut world = World::new(3);
    let flows = world.steady();

    let mark = flows.mark();
    world.add_lb(3);
    assert!(flows.run_for(10, LIMIT));
    let step = flows.step(mark);
    assert_eq!((step.lost, step.moved_target), (0, 0), "LB joins: {step:?}");
    assert!(step.moved_back > 0 && step.moved_there > 0, "{step}");

    let mark = flows.mark();
    let lb = world.lbs.remove(0);
    world.spread();
    world.proxy.disconnect_lb(&lb);
    assert!(flows.run_for(10, LIMIT));
    let step = flows.step(mark);
    assert_eq!(step.lost_steady, 0, "LB leaves: {step}");
    assert_eq!(step.moved_target, 0, "LB leaves: {step}");
    assert!(!flows.shares_back().contains_key(&1));

    let mark = flows.mark();
    world.registered.remove("target-2");
    world.tell_lbs();
    assert!(flows.run_for(10, LIMIT));
    world.targets[1].disconnect().unwrap();
    let step = flows.step(mark);
    assert_eq!(step.lost, 0, "target leaves: {step}");
    assert!(step.moved_target > 0, "{step}");

    let mark = flows.mark();
    world.targets[1].connect().unwrap();
    world.register(1);
    assert!(flows.run_for(10, LIMIT));
    let step = flows.step(mark);
    assert_eq!(step.lost, 0, "target returns: {step}");
    assert!(step.moved_target > 0, "{step}");
    assert_eq!(flows.duplicates(), 0);
}

#[test]
fn what_is_lost_is_noticed() {
    let world = World::new(2);
    let flows = world.steady();
    let mark = flows.mark();
    let vip: IpAddr = VIPS[0].parse().unwrap();
    let rule = world.proxy.vip_rule(vip);
    world.proxy.rtnl.delete_rule(&rule, vip).unwrap();
    assert!(flows.run_for(10, LIMIT));
    world.proxy.rtnl.add_rule(&rule, vip).unwrap();
    assert!(flows.all_answered_since(flows.mark(), LIMIT));
    let step = flows.step(mark);
    assert!(step.lost_steady >= 40 * 5, "{step}");
    assert_eq!(step.lost, step.lost_steady, "{step}");
    assert!(step.worst_run >= 5, "{step:?}");
}

#[test]
fn a_refresh_changes_what_differs_and_nothing_else() {
    let world = World::new(1);
    let target = &world.targets[0];
    let made = world.proxy.datapath.made();
    let rtnl = Rtnl::open(target.namespace()).unwrap();
    let link = rtnl.link("nsm-0").unwrap();
    assert_eq!(link.alias, format!("server-{}", target.connection_id()));
    let vip: IpAddr = "20.0.0.9".parse().unwrap();
    target.set_vips(&[vip]).unwrap();
    assert_eq!(world.proxy.datapath.made(), made);
    assert_eq!(rtnl.link("nsm-0").unwrap(), link);
    let addresses: Vec<IpNetwork> = (rtnl.addresses().unwrap().into_iter())
        .filter(|address| address.index == link.index && address.global)
        .map(|address| address.network)
        .collect();
    assert!(addresses.contains(&host(vip)), "{addresses:?}");
    assert_eq!(addresses.len(), 3, "{addresses:?}");
    let rules = rtnl.rules(vip).unwrap();
    let ours: Vec<&Rule> = rules.iter().filter(|rule| rule.from.is_some()).collect();
    assert_eq!(ours.len(), 1, "{rules:?}");
    assert_eq!(ours[0].from, Some(host(vip)));
    let routes = rtnl.routes(ours[0].table).unwrap();
    assert_eq!(routes.len(), 1, "{routes:?}");
    assert_eq!(
        routes[0].hops[0].gateway,
        Some("172.16.0.1".parse().unwrap())
    );
    let vip6: IpAddr = VIPS[1].parse().unwrap();
    assert!((rtnl.rules(vip6).unwrap().iter()).all(|rule| rule.from.is_none()));
    target.disconnect().unwrap();
    assert_eq!(rtnl.find("nsm-0").unwrap(), None);
    assert!((rtnl.rules(vip).unwrap().iter()).all(|rule| rule.from.is_none()));
    let lb = Rtnl::open(world.lbs[0].namespace()).unwrap();
    assert_eq!(lb.link("nse-1").unwrap().mtu, 1400);
}
