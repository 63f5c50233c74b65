package main

import (
	"fmt"
	"net"
	"net/url"
	"slices"
	"sync"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	kernelmech "github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/kernel"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// firstPolicy is the priority of the first policy rule, and its table.
const firstPolicy = 1000

// dataplane makes one veth pair for each connection.
type dataplane struct {
	mu    sync.Mutex
	pairs map[string]*pair
}

type pair struct {
	// the client's id of the connection
	name             string
	client, endpoint side
	policies         map[string]int
}

type side struct {
	ns   netns.NsHandle
	nl   *netlink.Handle
	name string
	// index of our interface, to tell it from a later one of the same name
	index int
}

func (d *dataplane) get(id string) (*pair, bool) {
	d.mu.Lock()
	defer d.mu.Unlock()
	p, ok := d.pairs[id]
	return p, ok
}

// names tells the clients' ids of all connections.
func (d *dataplane) names() []string {
	d.mu.Lock()
	defer d.mu.Unlock()
	var names []string
	for _, p := range d.pairs {
		names = append(names, p.name)
	}
	return names
}

// connect makes the pair, or brings an existing one up to date.
func (d *dataplane) connect(conn *networkservice.Connection, nse *networkservice.Mechanism) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	id := conn.GetId()
	p := d.pairs[id]
	if p != nil && (!p.client.fits(conn.GetMechanism()) || !p.endpoint.fits(nse)) {
		d.remove(id)
		p = nil
	}
	if p == nil {
		var err error
		if p, err = newPair(conn, nse); err != nil {
			return err
		}
		d.pairs[id] = p
	}
	return p.configure(conn)
}

func (d *dataplane) disconnect(id string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.remove(id)
}

func (d *dataplane) remove(id string) {
	p := d.pairs[id]
	if p == nil {
		return
	}
	delete(d.pairs, id)
	p.drop()
}

func newPair(conn *networkservice.Connection, nse *networkservice.Mechanism) (*pair, error) {
	client, err := openSide(conn.GetMechanism())
	if err != nil {
		return nil, fmt.Errorf("client's end: %w", err)
	}
	endpoint, err := openSide(nse)
	if err != nil {
		client.close()
		return nil, fmt.Errorf("endpoint's end: %w", err)
	}
	first := conn.GetPath().GetPathSegments()[0].GetId()
	p := &pair{name: first, client: client, endpoint: endpoint, policies: map[string]int{}}
	aliases := map[*side]string{&p.client: "server-" + first, &p.endpoint: "client-" + first}
	for s, alias := range aliases {
		s.removeOld(alias)
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = p.client.name
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: p.endpoint.name, PeerNamespace: netlink.NsFd(p.endpoint.ns)}
	if err := p.client.nl.LinkAdd(veth); err != nil {
		p.drop()
		return nil, fmt.Errorf("veth %s %s: %w", p.client.name, p.endpoint.name, err)
	}
	for s, alias := range aliases {
		link, err := s.nl.LinkByName(s.name)
		if err == nil {
			s.index = link.Attrs().Index
			err = s.nl.LinkSetAlias(link, alias)
		}
		if err != nil {
			p.drop()
			return nil, fmt.Errorf("%s: %w", s.name, err)
		}
	}
	return p, nil
}

// removeOld removes what an earlier forwarder has left of the connection, and
// what is in the way.
func (s *side) removeOld(alias string) {
	links, err := s.nl.LinkList()
	if err != nil {
		return
	}
	for _, link := range links {
		if link.Attrs().Alias == alias || link.Attrs().Name == s.name {
			_ = s.nl.LinkDel(link)
		}
	}
}

func openSide(mechanism *networkservice.Mechanism) (side, error) {
	m := kernelmech.ToMechanism(mechanism)
	if m == nil {
		return side{}, fmt.Errorf("mechanism %v is not kernel", mechanism)
	}
	u, err := url.Parse(m.GetNetNSURL())
	if err != nil || u.Scheme != "file" {
		return side{}, fmt.Errorf("namespace %q: not a file: %w", m.GetNetNSURL(), err)
	}
	ns, err := netns.GetFromPath(u.Path)
	if err != nil {
		return side{}, fmt.Errorf("namespace %s: %w", u.Path, err)
	}
	nl, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		_ = ns.Close()
		return side{}, err
	}
	return side{ns: ns, nl: nl, name: m.GetInterfaceName()}, nil
}

// fits says whether the interface is still there, and is the wanted one.
func (s *side) fits(mechanism *networkservice.Mechanism) bool {
	m := kernelmech.ToMechanism(mechanism)
	if m == nil || m.GetInterfaceName() != s.name {
		return false
	}
	u, err := url.Parse(m.GetNetNSURL())
	if err != nil {
		return false
	}
	now, err := netns.GetFromPath(u.Path)
	if err != nil {
		return false
	}
	defer func() { _ = now.Close() }()
	link, err := s.nl.LinkByName(s.name)
	return err == nil && now.Equal(s.ns) && link.Attrs().Index == s.index
}

func (s *side) close() {
	if s.nl != nil {
		s.nl.Close()
	}
	_ = s.ns.Close()
}

func (p *pair) drop() {
	for _, table := range p.policies {
		p.client.unpolicy(table)
	}
	for _, s := range []*side{&p.client, &p.endpoint} {
		if link, err := s.nl.LinkByName(s.name); err == nil && (s.index == 0 || link.Attrs().Index == s.index) {
			_ = s.nl.LinkDel(link)
		}
		s.close()
	}
}

func (p *pair) configure(conn *networkservice.Connection) error {
	context := conn.GetContext()
	ip := context.GetIpContext()
	if err := p.client.configure(context.GetMTU(), ip.GetSrcIpAddrs(), ip.GetSrcRoutes()); err != nil {
		return fmt.Errorf("client's end: %w", err)
	}
	if err := p.endpoint.configure(context.GetMTU(), ip.GetDstIpAddrs(), ip.GetDstRoutes()); err != nil {
		return fmt.Errorf("endpoint's end: %w", err)
	}
	return p.applyPolicies(ip.GetPolicies())
}

func (s *side) configure(mtu uint32, wanted []string, routes []*networkservice.Route) error {
	link, err := s.nl.LinkByName(s.name)
	if err != nil {
		return err
	}
	if mtu != 0 && link.Attrs().MTU != int(mtu) {
		if err := s.nl.LinkSetMTU(link, int(mtu)); err != nil {
			return fmt.Errorf("MTU %d: %w", mtu, err)
		}
	}
	if link.Attrs().Flags&net.FlagUp == 0 {
		if err := s.nl.LinkSetUp(link); err != nil {
			return err
		}
	}
	if len(wanted) == 0 {
		return nil
	}
	have, err := s.nl.AddrList(link, netlink.FAMILY_ALL)
	if err != nil {
		return err
	}
	for _, text := range wanted {
		addr, err := netlink.ParseAddr(text)
		if err != nil {
			return fmt.Errorf("address %q: %w", text, err)
		}
		// As sdk-kernel: the kernel takes the IPv6 route to the prefix away for a
		// moment when an address is replaced by itself.
		if slices.ContainsFunc(have, func(a netlink.Addr) bool { return a.IPNet.String() == addr.IPNet.String() }) {
			continue
		}
		if addr.IP.To4() == nil {
			addr.Flags |= unix.IFA_F_NODAD
		}
		if err := s.nl.AddrReplace(link, addr); err != nil {
			return fmt.Errorf("address %s: %w", text, err)
		}
	}
	for _, addr := range have {
		if addr.Scope == unix.RT_SCOPE_UNIVERSE && !slices.Contains(wanted, addr.IPNet.String()) {
			if err := s.nl.AddrDel(link, &addr); err != nil {
				return fmt.Errorf("remove address %s: %w", addr.IPNet, err)
			}
		}
	}
	for _, route := range routes {
		_, to, err := net.ParseCIDR(route.GetPrefix())
		if err != nil {
			return fmt.Errorf("route %q: %w", route.GetPrefix(), err)
		}
		r := &netlink.Route{LinkIndex: s.index, Dst: to, Gw: net.ParseIP(route.GetNextHop()), Scope: netlink.SCOPE_LINK}
		if r.Gw != nil {
			r.Scope = netlink.SCOPE_UNIVERSE
		}
		if err := s.nl.RouteReplace(r); err != nil {
			return fmt.Errorf("route %v: %w", route, err)
		}
	}
	return nil
}

func (p *pair) applyPolicies(policies []*networkservice.PolicyRoute) error {
	gone := map[string]int{}
	for key, table := range p.policies {
		gone[key] = table
	}
	for _, policy := range policies {
		key := policy.String()
		if _, ok := p.policies[key]; ok {
			delete(gone, key)
			continue
		}
		table := firstPolicy
		for taken := true; taken; {
			taken = false
			for _, used := range p.policies {
				if used == table {
					taken = true
					table++
				}
			}
		}
		if err := p.client.policy(table, policy); err != nil {
			return fmt.Errorf("policy %s: %w", key, err)
		}
		p.policies[key] = table
	}
	for key, table := range gone {
		p.client.unpolicy(table)
		delete(p.policies, key)
	}
	return nil
}

func (s *side) policy(table int, policy *networkservice.PolicyRoute) error {
	_, from, err := net.ParseCIDR(policy.GetFrom())
	if err != nil {
		return err
	}
	s.unpolicy(table)
	for _, route := range policy.GetRoutes() {
		_, to, err := net.ParseCIDR(route.GetPrefix())
		if err != nil {
			return err
		}
		if err := s.nl.RouteReplace(&netlink.Route{
			LinkIndex: s.index, Dst: to, Gw: net.ParseIP(route.GetNextHop()), Table: table,
		}); err != nil {
			return err
		}
	}
	rule := netlink.NewRule()
	rule.Src, rule.Table, rule.Priority, rule.Family = from, table, table, family(from.IP)
	return s.nl.RuleAdd(rule)
}

// unpolicy removes the table's rules; the routes go with the interface or are
// replaced.
func (s *side) unpolicy(table int) {
	for _, f := range []int{netlink.FAMILY_V4, netlink.FAMILY_V6} {
		rule := netlink.NewRule()
		rule.Table, rule.Priority, rule.Family = table, table, f
		for s.nl.RuleDel(rule) == nil {
		}
	}
}

func family(ip net.IP) int {
	if ip.To4() != nil {
		return netlink.FAMILY_V4
	}
	return netlink.FAMILY_V6
}
