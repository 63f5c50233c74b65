package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	trench    = "trench-a"
	conduit   = "conduit-a"
	namespace = "red"
	node      = "node-1"
	lbService = conduit + "." + trench + "." + namespace
	tpService = "proxy." + lbService
	source4   = "10.250.0.1"
	source6   = "fd25::1"
	registry  = "tcp://127.0.0.1:5002"
	public    = "tcp://127.0.0.1:5001"
)

// lab is one node with the mesh, the daemon, load balancers and targets.
type lab struct {
	dir      string
	daemon   string
	services string
	probe    string
	tokens   string
	expire   string
	ttl      time.Duration
	spire    *spire
	base     netns.NsHandle
	pod      netns.NsHandle
	podNL    *netlink.Handle
	client   netns.NsHandle
	parts    map[string]*process
	lbs      map[string]*lbPod
	targets  map[string]*targetPod
	vips     []string
	traffic  *traffic
	ctx      context.Context
	// more of the environment of load balancers
	lbEnv []string
	// what targets ask for
	targetService string
	// look at the time after a restart for a shorter while
	short bool
}

type lbPod struct {
	number int
	ns     netns.NsHandle
	nl     *netlink.Handle
	active bool
}

type targetPod struct {
	ns        netns.NsHandle
	addresses []string
	known     bool
	echoes    map[string]net.PacketConn
}

func newLab(ctx context.Context, dir string) (*lab, error) {
	l := &lab{
		dir: dir, ctx: ctx, targetService: tpService, tokens: "10m", expire: "1m", ttl: time.Hour,
		parts: map[string]*process{}, lbs: map[string]*lbPod{}, targets: map[string]*targetPod{},
	}
	var err error
	if l.base, err = netns.Get(); err != nil {
		return nil, err
	}
	for _, ns := range []*netns.NsHandle{&l.pod, &l.client} {
		if *ns, err = newNS(); err != nil {
			return nil, err
		}
		if err := routes(*ns); err != nil {
			return nil, err
		}
	}
	if l.podNL, err = netlink.NewHandleAt(l.pod, unix.NETLINK_ROUTE); err != nil {
		return nil, err
	}
	l.traffic = &traffic{client: l.client, ctx: ctx}
	if err := link(l.base, "pod", l.pod, "eth0", "10.97.0.1/24", "10.97.0.2/24", "fd97::1/64", "fd97::2/64"); err != nil {
		return nil, err
	}
	for _, args := range [][]string{
		{"route", "add", "default", "via", "10.97.0.1"},
		{"-6", "route", "add", "default", "via", "fd97::1"},
	} {
		if err := ip(l.pod, args...); err != nil {
			return nil, err
		}
	}
	for _, address := range []string{source4 + "/32", source6 + "/128"} {
		if err := ip(l.client, "addr", "add", address, "dev", "lo"); err != nil {
			return nil, err
		}
	}
	for _, sub := range []string{"bin", "wl", "log", "tmp"} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o777); err != nil {
			return nil, err
		}
	}
	hosts := "127.0.0.1 localhost\n::1 localhost\n10.97.0.1 nsp-service-" + trench + "." + namespace + "\n10.97.0.1 ipam-service\n"
	return l, os.WriteFile(filepath.Join(dir, "hosts"), []byte(hosts), 0o644)
}

// link makes a veth pair with addresses: near v4, far v4, near v6, far v6.
func link(near netns.NsHandle, nearName string, far netns.NsHandle, farName string, addresses ...string) error {
	nl, err := netlink.NewHandleAt(near, unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer nl.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = nearName
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: farName, PeerNamespace: netlink.NsFd(far)}
	if err := nl.LinkAdd(veth); err != nil {
		return fmt.Errorf("veth %s %s: %w", nearName, farName, err)
	}
	for i, address := range addresses {
		ns, name := near, nearName
		if i%2 == 1 {
			ns, name = far, farName
		}
		if err := ip(ns, "addr", "add", address, "dev", name); err != nil {
			return err
		}
	}
	return errors.Join(ip(near, "link", "set", nearName, "up"), ip(far, "link", "set", farName, "up"))
}

// names of all that may get an identity.
func identities() []string {
	names := []string{"registry", "nsmgr", "forwarder", "services", "proxy"}
	for i := 1; i <= 9; i++ {
		names = append(names, fmt.Sprintf("lb-%d", i), fmt.Sprintf("target-%d", i))
	}
	return names
}

func (l *lab) path(parts ...string) string {
	return filepath.Join(append([]string{l.dir}, parts...)...)
}

func (l *lab) env(name string, more ...string) []string {
	socket := l.path("wl", name+".sock")
	if l.spire != nil {
		socket = l.spire.socket()
	}
	env := []string{
		"PATH=/usr/sbin:/usr/bin:/sbin:/bin",
		"SPIFFE_ENDPOINT_SOCKET=unix://" + socket,
		"NSM_CONNECT_TO=unix://" + l.path("nsm.io.sock"),
		"NSM_NAME=" + name,
		"NODE_NAME=" + node,
		"POD_NAME=" + name,
		"INTEROP_DIR=" + l.dir,
		"INTEROP_TOKEN_LIFETIME=" + l.lifetime(name),
		"INTEROP_EXPIRATION=" + l.expire,
		"INTEROP_LOG=" + os.Getenv("INTEROP_LOG"),
	}
	return append(env, more...)
}

// lifetime of a part's tokens. What registers through the SDK cannot do with
// less than 45 s: nsmgr drops a registration 15 s (its caller's deadline) before
// the token ends, and the SDK refreshes after two thirds of that life.
func (l *lab) lifetime(name string) string {
	if strings.HasPrefix(name, "target-") {
		return l.tokens
	}
	return "10m"
}

// own starts this program under the name, which SPIRE attests by its path.
func (l *lab) own(name string, ns netns.NsHandle, args []string, more ...string) (*process, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	path, err := l.binary(name, self)
	if err != nil {
		return nil, err
	}
	return l.start(start{name: name, path: path, args: args, env: l.env(name, more...), ns: ns})
}

// binary is a copy of its own for each name.
func (l *lab) binary(name, from string) (string, error) {
	path := l.path("bin", name)
	if _, err := os.Stat(path); err == nil {
		return path, nil
	}
	if err := os.Link(from, path); err == nil {
		return path, nil
	}
	data, err := os.ReadFile(from)
	if err != nil {
		return "", err
	}
	return path, os.WriteFile(path, data, 0o755)
}

func (l *lab) start(s start) (*process, error) {
	s.log = l.path("log", s.name+".log")
	p, err := s.run()
	if err == nil {
		l.parts[s.name] = p
	}
	return p, err
}

func (l *lab) ready(p *process, err error) error {
	if err != nil {
		return err
	}
	_, err = p.line("ready", 30*time.Second)
	return err
}

func (l *lab) startAuthority() error {
	args := append([]string{"authority", "-dir", l.path("wl"), "-ttl", l.ttl.String()}, identities()...)
	return l.ready(l.own("authority", l.base, args))
}

func (l *lab) startRegistry() error {
	return l.ready(l.own("registry", l.base, []string{"registry"}, "INTEROP_LISTEN="+registry))
}

func (l *lab) startNsmgr() error {
	return l.ready(l.own("nsmgr", l.base, []string{"nsmgr"}, "INTEROP_REGISTRY="+registry,
		"INTEROP_PUBLIC="+public, "INTEROP_LISTEN=unix://"+l.path("nsm.io.sock")))
}

func (l *lab) startForwarder() error {
	return l.ready(l.own("forwarder", l.base, []string{"forwarder"},
		"INTEROP_LISTEN=unix://"+l.path("forwarder.sock")))
}

func (l *lab) startServices() error {
	path, err := l.binary("services", l.services)
	if err != nil {
		return err
	}
	env := l.env("services", "LAB_TRENCH="+trench, "LAB_CONDUIT="+conduit)
	if err := l.ready(l.start(start{name: "services", path: path, env: env, ns: l.base})); err != nil {
		return err
	}
	return l.tellVIPs()
}

func (l *lab) tellVIPs() error {
	return l.parts["services"].command(5*time.Second, append([]string{"vips"}, l.vips...)...)
}

func (l *lab) startDaemon() error {
	path, err := l.binary("proxy", l.daemon)
	if err != nil {
		return err
	}
	env := l.env("proxy", "NSM_NAME=proxy-1", "NSM_HOST="+node, "NSM_MAX_TOKEN_LIFETIME="+l.tokens,
		"NSM_SERVICE_NAME="+tpService, "NSM_NETWORK_SERVICE_NAME="+lbService,
		"NSM_IPAM_SERVICE=ipam-service:7777", "NSM_NSP_SERVICE_NAME=nsp-service",
		"NSM_NSP_SERVICE_PORT=7778", "NSM_TRENCH="+trench, "NSM_CONDUIT="+conduit,
		"NSM_NAMESPACE="+namespace, "NSM_IP_FAMILY=dualstack", "NSM_LOG_LEVEL=DEBUG")
	script := `mount --make-rprivate / && mount --bind "$1" /tmp && mount --bind "$2" /etc/hosts && exec "$3"`
	_, err = l.start(start{
		name: "proxy", path: "/usr/bin/unshare", ns: l.pod, env: env,
		args: []string{"--mount", "sh", "-c", script, "proxy", l.path("tmp"), l.path("hosts"), path},
	})
	return err
}

// foreignService registers the daemon's service under another identity, as the
// proxy of another node has done before.
func (l *lab) foreignService() error {
	p, err := l.own("lb-9", l.base, []string{"service"}, "NSM_SERVICE_NAME="+tpService)
	if err != nil {
		return err
	}
	_, err = p.line("registered", 20*time.Second)
	return err
}

// startLB starts a load balancer's process; its namespace outlives it.
func (l *lab) startLB(name string) error {
	pod := l.lbs[name]
	if pod == nil {
		number, err := strconv.Atoi(strings.TrimPrefix(name, "lb-"))
		if err != nil {
			return err
		}
		ns, err := newNS()
		if err != nil {
			return err
		}
		nl, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		pod = &lbPod{number: number, ns: ns, nl: nl}
		near4, far4 := fmt.Sprintf("10.200.%d.1", number), fmt.Sprintf("10.200.%d.2", number)
		near6, far6 := fmt.Sprintf("fd20:%d::1", number), fmt.Sprintf("fd20:%d::2", number)
		if err := errors.Join(routes(ns),
			link(l.client, name, ns, "ext", near4+"/24", far4+"/24", near6+"/64", far6+"/64"),
			ip(ns, "route", "add", source4+"/32", "via", near4),
			ip(ns, "-6", "route", "add", source6+"/128", "via", near6)); err != nil {
			return err
		}
		l.lbs[name] = pod
	}
	p, err := l.own(name, pod.ns, []string{"lb"}, append(l.lbEnv, "NSM_SERVICE_NAME="+lbService)...)
	if err != nil {
		return err
	}
	_, err = p.line("registered", 30*time.Second)
	return err
}

// activate gives the load balancer its flows, or takes them away.
func (l *lab) activate(name string, active bool) error {
	l.lbs[name].active = active
	return l.spread()
}

// spread routes the VIPs from the client over the active load balancers.
func (l *lab) spread() error {
	for _, vip := range l.vips {
		v4 := net.ParseIP(vip).To4() != nil
		args := []string{"route", "replace", vip}
		if !v4 {
			_ = ip(l.client, "-6", "route", "del", vip)
			args = []string{"-6", "route", "add", vip}
		}
		hops := 0
		for _, pod := range l.lbs {
			if !pod.active {
				continue
			}
			hops++
			via := fmt.Sprintf("10.200.%d.2", pod.number)
			if !v4 {
				via = fmt.Sprintf("fd20:%d::2", pod.number)
			}
			args = append(args, "nexthop", "via", via)
		}
		if hops == 0 {
			continue
		}
		if err := ip(l.client, args...); err != nil {
			return err
		}
	}
	return nil
}

// tellLBs gives all load balancers the targets' addresses.
func (l *lab) tellLBs() error {
	words := []string{"targets"}
	for _, vip := range l.vips {
		var hops []string
		for _, target := range l.targets {
			for _, address := range target.addresses {
				addr, _, err := net.ParseCIDR(address)
				if err != nil {
					return err
				}
				if target.known && (addr.To4() != nil) == (net.ParseIP(vip).To4() != nil) {
					hops = append(hops, addr.String())
				}
			}
		}
		slices.Sort(hops)
		words = append(words, vip+"="+strings.Join(hops, ","))
	}
	for name, pod := range l.lbs {
		p := l.parts[name]
		if !pod.active || p == nil {
			continue
		}
		if err := p.command(5*time.Second, words...); err != nil {
			return err
		}
	}
	return nil
}

func (l *lab) startTarget(name string) error {
	pod := l.targets[name]
	if pod == nil {
		ns, err := newNS()
		if err != nil {
			return err
		}
		pod = &targetPod{ns: ns, echoes: map[string]net.PacketConn{}}
		l.targets[name] = pod
	}
	return l.ready(l.own(name, pod.ns, []string{"target"}, "NSM_SERVICE_NAME="+l.targetService))
}

// connectTarget connects it with all VIPs and tells the load balancers.
func (l *lab) connectTarget(name string) error {
	p, pod := l.parts[name], l.targets[name]
	if _, err := fmt.Fprintln(p.stdin, "connect"); err != nil {
		return err
	}
	line, err := p.line("addresses", 20*time.Second)
	if err != nil {
		return err
	}
	pod.addresses = strings.Fields(line)[1:]
	if _, err := p.line("ok", time.Second); err != nil {
		return err
	}
	if err := l.setVIPs(name); err != nil {
		return err
	}
	pod.known = true
	return l.tellLBs()
}

func (l *lab) setVIPs(name string) error {
	words := []string{"vips"}
	for _, vip := range l.vips {
		if net.ParseIP(vip).To4() != nil {
			words = append(words, vip+"/32")
		} else {
			words = append(words, vip+"/128")
		}
		if l.targets[name].echoes[vip] == nil {
			conn, err := echo(l.targets[name].ns, vip, name)
			if err != nil {
				return err
			}
			l.targets[name].echoes[vip] = conn
		}
	}
	return l.parts[name].command(25*time.Second, words...)
}

// hops counts the next hops of table 1.
func (l *lab) hops(family int) (int, error) {
	found, err := l.podNL.RouteListFiltered(family, &netlink.Route{Table: 1}, netlink.RT_FILTER_TABLE)
	if err != nil {
		return 0, err
	}
	for _, route := range found {
		if route.Type != unix.RTN_UNICAST {
			continue
		}
		if len(route.MultiPath) > 0 {
			return len(route.MultiPath), nil
		}
		if route.Gw != nil {
			return 1, nil
		}
	}
	return 0, nil
}

func (l *lab) waitHops(wanted int, limit time.Duration) (time.Duration, error) {
	begun := time.Now()
	for {
		v4, err4 := l.hops(netlink.FAMILY_V4)
		v6, err6 := l.hops(netlink.FAMILY_V6)
		if err := errors.Join(err4, err6); err != nil {
			return 0, err
		}
		if v4 == wanted && v6 == wanted {
			return time.Since(begun), nil
		}
		if time.Since(begun) > limit {
			return 0, fmt.Errorf("next hops: %d v4, %d v6 instead of %d after %v", v4, v6, wanted, limit)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// carried says how many packets the load balancer got from the proxy.
func (l *lab) carried(name string) (uint64, error) {
	links, err := l.lbs[name].nl.LinkList()
	if err != nil {
		return 0, err
	}
	var all uint64
	for _, link := range links {
		if strings.HasPrefix(link.Attrs().Alias, "client-") {
			all += link.Attrs().Statistics.RxPackets
		}
	}
	return all, nil
}

func (l *lab) stop() {
	for _, p := range l.parts {
		p.kill()
	}
	_ = ip(l.base, "link", "del", "pod")
}
