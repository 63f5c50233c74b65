package main

import (
	"fmt"
	"net/url"
	"sync"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	kernelmech "github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/kernel"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// dataplane makes one veth pair for each connection. What stands on the pair,
// addresses, routes, rules, MTU, is the business of sdk-kernel's elements.
type dataplane struct {
	mu    sync.Mutex
	pairs map[string]*pair
}

type pair struct {
	// the client's id of the connection
	name             string
	client, endpoint side
}

type side struct {
	ns   netns.NsHandle
	nl   *netlink.Handle
	name string
	// index of our interface, to tell it from a later one of the same name
	index int
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

// connect makes the pair, and makes it anew when an end of it has gone or is
// wanted elsewhere. The connection's mechanism is the endpoint's.
func (d *dataplane) connect(conn *networkservice.Connection, client *networkservice.Mechanism) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	id := conn.GetId()
	if p := d.pairs[id]; p != nil {
		if p.client.fits(client) && p.endpoint.fits(conn.GetMechanism()) {
			return nil
		}
		d.remove(id)
	}
	p, err := newPair(conn, client)
	if err != nil {
		return err
	}
	d.pairs[id] = p
	return nil
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

func newPair(conn *networkservice.Connection, wanted *networkservice.Mechanism) (*pair, error) {
	client, err := openSide(wanted)
	if err != nil {
		return nil, fmt.Errorf("client's end: %w", err)
	}
	endpoint, err := openSide(conn.GetMechanism())
	if err != nil {
		client.close()
		return nil, fmt.Errorf("endpoint's end: %w", err)
	}
	first := conn.GetPath().GetPathSegments()[0].GetId()
	p := &pair{name: first, client: client, endpoint: endpoint}
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
			if err = s.nl.LinkSetAlias(link, alias); err == nil {
				err = s.nl.LinkSetUp(link)
			}
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
	for _, s := range []*side{&p.client, &p.endpoint} {
		if link, err := s.nl.LinkByName(s.name); err == nil && (s.index == 0 || link.Attrs().Index == s.index) {
			_ = s.nl.LinkDel(link)
		}
		s.close()
	}
}
