package main

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	kernelmech "github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/kernel"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/noop"
	"github.com/networkservicemesh/api/pkg/api/networkservice/payload"
	registryapi "github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/endpoint"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/authorize"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/kernel"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/recvfd"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/sendfd"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/null"
	"github.com/networkservicemesh/sdk/pkg/networkservice/ipam/point2pointipam"
	registryclient "github.com/networkservicemesh/sdk/pkg/registry/chains/client"
	registrynull "github.com/networkservicemesh/sdk/pkg/registry/common/null"
	registrysendfd "github.com/networkservicemesh/sdk/pkg/registry/common/sendfd"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netlink/nl"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// runLB is a load balancer: an endpoint of the SDK with the chain of Meridio's
// stateless-lb, and routes to the targets in place of its nfqueue; with
// INTEROP_PREFIXES it gives clients addresses, too. Commands on
// standard input: `targets VIP=IP,IP VIP=IP,...`.
func runLB(ctx context.Context) error {
	own, err := newIdentity(ctx)
	if err != nil {
		return err
	}
	nsmgr, err := url.Parse(os.Getenv("NSM_CONNECT_TO"))
	if err != nil {
		return err
	}
	name, service := os.Getenv("NSM_NAME"), os.Getenv("NSM_SERVICE_NAME")
	listen := "unix://" + filepath.Join(os.Getenv("INTEROP_DIR"), name+".nse.sock")
	elements := []networkservice.NetworkServiceServer{
		recvfd.NewServer(),
		mechanisms.NewServer(map[string]networkservice.NetworkServiceServer{
			kernelmech.MECHANISM: kernel.NewServer(),
			noop.MECHANISM:       null.NewServer(),
		}),
		sendfd.NewServer(),
	}
	for _, text := range strings.Split(os.Getenv("INTEROP_PREFIXES"), ",") {
		if _, prefix, err := net.ParseCIDR(text); err == nil {
			elements = append([]networkservice.NetworkServiceServer{point2pointipam.NewServer(prefix)}, elements...)
		}
	}
	chain := endpoint.NewServer(ctx, own.tokens,
		endpoint.WithName(name),
		endpoint.WithAuthorizeServer(authorize.NewServer()),
		endpoint.WithAdditionalFunctionality(elements...),
	)
	server := grpc.NewServer(own.serverOptions()...)
	chain.Register(server)

	dial := registryclient.WithDialOptions(own.dialOptions()...)
	// They outlive the context, to unregister with.
	services := registryclient.NewNetworkServiceRegistryClient(context.Background(),
		registryclient.WithClientURL(nsmgr), dial,
		registryclient.WithNSRetryClient(registrynull.NewNetworkServiceRegistryClient()))
	nses := registryclient.NewNetworkServiceEndpointRegistryClient(context.Background(),
		registryclient.WithClientURL(nsmgr), dial,
		registryclient.WithNSEAdditionalFunctionality(registrysendfd.NewNetworkServiceEndpointRegistryClient()))
	nse := &registryapi.NetworkServiceEndpoint{
		Name:                 name,
		NetworkServiceNames:  []string{service},
		NetworkServiceLabels: map[string]*registryapi.NetworkServiceLabels{service: {}},
		Url:                  listen,
	}
	serveCtx, stopServing := context.WithCancel(context.Background())
	defer stopServing()
	served := make(chan error, 1)
	go func() { served <- serve(serveCtx, server, listen) }()
	routes := newBalancer()
	go routes.watch(ctx)
	go commands(ctx, func(words []string) error {
		if words[0] != "targets" {
			return fmt.Errorf("unknown command %q", words)
		}
		return routes.set(words[1:])
	})
	if err := waitSocket(listen); err != nil {
		return err
	}
	if err := registerService(ctx, services, service); err != nil {
		return err
	}
	registered, err := nses.Register(ctx, nse)
	if err != nil {
		return fmt.Errorf("register: %w", err)
	}
	say("registered", nil)
	select {
	case err := <-served:
		return err
	case <-ctx.Done():
	}
	bound, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	_, err = nses.Unregister(bound, registered)
	say("unregistered", err)
	return nil
}

// registerService tries until it is told something definite. With the default
// policies only the SPIFFE ID that came first may register a service again, so
// a refusal of a later pod means that the service is there.
func registerService(ctx context.Context, services registryapi.NetworkServiceRegistryClient, name string) error {
	service := &registryapi.NetworkService{Name: name, Payload: payload.Ethernet}
	for {
		bound, cancel := context.WithTimeout(ctx, 5*time.Second)
		_, err := services.Register(bound, service.Clone())
		cancel()
		if status.Code(err) == codes.PermissionDenied {
			say("service of another pod", nil)
			return nil
		}
		if err == nil || ctx.Err() != nil {
			return err
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// runService registers a service as another node's pod does, and ends.
func runService(ctx context.Context) error {
	own, err := newIdentity(ctx)
	if err != nil {
		return err
	}
	nsmgr, err := url.Parse(os.Getenv("NSM_CONNECT_TO"))
	if err != nil {
		return err
	}
	services := registryclient.NewNetworkServiceRegistryClient(ctx,
		registryclient.WithClientURL(nsmgr), registryclient.WithDialOptions(own.dialOptions()...),
		registryclient.WithNSRetryClient(registrynull.NewNetworkServiceRegistryClient()))
	name := os.Getenv("NSM_SERVICE_NAME")
	service := &registryapi.NetworkService{Name: name, Payload: payload.Ethernet, Matches: []*registryapi.Match{{
		SourceSelector: map[string]string{"nodeName": "{{.nodeName}}"},
		Routes:         []*registryapi.Destination{{DestinationSelector: map[string]string{"nodeName": "{{.nodeName}}"}}},
	}}}
	if _, err := services.Register(ctx, service); err != nil {
		return err
	}
	say("registered", nil)
	return nil
}

func waitSocket(listen string) error {
	path := strings.TrimPrefix(listen, "unix://")
	for range 100 {
		if conn, err := net.Dial("unix", path); err == nil {
			return conn.Close()
		}
		time.Sleep(20 * time.Millisecond)
	}
	return fmt.Errorf("%s: nobody listens", path)
}

// balancer keeps a multipath route to the targets for each VIP, whatever
// becomes of the interface to the proxy.
type balancer struct {
	mu   sync.Mutex
	vips map[string][]string
}

func newBalancer() *balancer { return &balancer{vips: map[string][]string{}} }

func (b *balancer) set(words []string) error {
	vips := map[string][]string{}
	for _, word := range words {
		vip, targets, ok := strings.Cut(word, "=")
		if !ok {
			return fmt.Errorf("no VIP=TARGET,...: %q", word)
		}
		vips[vip] = nil
		if targets != "" {
			vips[vip] = strings.Split(targets, ",")
		}
	}
	b.mu.Lock()
	for _, targets := range vips {
		for _, target := range targets {
			// As Meridio's LB does when a target is added: it may have a new
			// MAC address.
			forget(net.ParseIP(target))
		}
	}
	b.vips = vips
	b.mu.Unlock()
	return b.apply()
}

func (b *balancer) apply() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	var first error
	for vip, targets := range b.vips {
		ip := net.ParseIP(vip)
		bits := 128
		if ip.To4() != nil {
			ip, bits = ip.To4(), 32
		}
		route := &netlink.Route{Dst: &net.IPNet{IP: ip, Mask: net.CIDRMask(bits, bits)}}
		for _, target := range targets {
			gateway := net.ParseIP(target)
			link, err := onLink(gateway)
			if err != nil {
				if first == nil {
					first = err
				}
				continue
			}
			route.MultiPath = append(route.MultiPath, &netlink.NexthopInfo{LinkIndex: link, Gw: gateway})
		}
		if len(route.MultiPath) == 0 {
			_ = netlink.RouteDel(route)
			continue
		}
		if bits == 128 {
			_ = netlink.RouteDel(&netlink.Route{Dst: route.Dst})
		}
		if err := netlink.RouteReplace(route); err != nil && first == nil {
			first = fmt.Errorf("route to %s: %w", vip, err)
		}
	}
	return first
}

// forget removes what is known of a neighbour.
func forget(ip net.IP) {
	known, err := netlink.NeighList(0, nl.GetIPFamily(ip))
	if err != nil {
		return
	}
	for _, neighbour := range known {
		if neighbour.IP.Equal(ip) {
			_ = netlink.NeighDel(&neighbour)
		}
	}
}

// onLink finds the newest NSM interface with an address in the gateway's subnet.
func onLink(gateway net.IP) (int, error) {
	links, err := netlink.LinkList()
	if err != nil {
		return 0, err
	}
	found := 0
	for _, link := range links {
		if !strings.HasPrefix(link.Attrs().Alias, "client-") {
			continue
		}
		addrs, err := netlink.AddrList(link, netlink.FAMILY_ALL)
		if err != nil {
			return 0, err
		}
		for _, addr := range addrs {
			if addr.Contains(gateway) {
				found = max(found, link.Attrs().Index)
			}
		}
	}
	if found == 0 {
		return 0, fmt.Errorf("no interface to %s", gateway)
	}
	return found, nil
}

func (b *balancer) watch(ctx context.Context) {
	changes := make(chan netlink.AddrUpdate, 64)
	if err := netlink.AddrSubscribe(changes, ctx.Done()); err != nil {
		say("watch", err)
		return
	}
	for range changes {
		_ = b.apply()
	}
}
