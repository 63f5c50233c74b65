package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"time"

	"github.com/edwarnicke/genericsync"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/nsmgr"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/authorize"
	"github.com/networkservicemesh/sdk/pkg/registry/chains/memory"
	registryauthorize "github.com/networkservicemesh/sdk/pkg/registry/common/authorize"
	"github.com/networkservicemesh/sdk/pkg/tools/grpcutils"
	authmonitor "github.com/networkservicemesh/sdk/pkg/tools/monitorconnection/authorize"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
)

// The masks that cmd-registry-memory and cmd-nsmgr have as defaults.
var (
	registryServerPolicies = []string{
		"etc/nsm/opa/common/.*.rego", "etc/nsm/opa/registry/.*.rego", "etc/nsm/opa/server/.*.rego",
	}
	registryClientPolicies = []string{
		"etc/nsm/opa/common/.*.rego", "etc/nsm/opa/registry/.*.rego", "etc/nsm/opa/client/.*.rego",
	}
)

// runRegistry is the in-memory registry, composed as cmd-registry-memory does.
func runRegistry(ctx context.Context) error {
	own, err := newIdentity(ctx)
	if err != nil {
		return err
	}
	server := registryauthorize.WithPolicies(registryServerPolicies...)
	client := registryauthorize.WithPolicies(registryClientPolicies...)
	chain := memory.NewServer(ctx, own.tokens,
		memory.WithAuthorizeNSRegistryServer(registryauthorize.NewNetworkServiceRegistryServer(server)),
		memory.WithAuthorizeNSERegistryServer(registryauthorize.NewNetworkServiceEndpointRegistryServer(server)),
		memory.WithAuthorizeNSRegistryClient(registryauthorize.NewNetworkServiceRegistryClient(client)),
		memory.WithAuthorizeNSERegistryClient(registryauthorize.NewNetworkServiceEndpointRegistryClient(client)),
		memory.WithDefaultExpiration(expiration()),
		memory.WithDialOptions(own.dialOptions()...),
	)
	grpcServer := grpc.NewServer(own.serverOptions()...)
	chain.Register(grpcServer)
	return serve(ctx, grpcServer, os.Getenv("INTEROP_LISTEN"))
}

// runNsmgr is the network service manager, composed as cmd-nsmgr does. The
// command `streams` on standard input tells which streams the daemon has.
func runNsmgr(ctx context.Context) error {
	own, err := newIdentity(ctx)
	if err != nil {
		return err
	}
	registry, err := url.Parse(os.Getenv("INTEROP_REGISTRY"))
	if err != nil {
		return err
	}
	var known genericsync.Map[spiffeid.ID, *genericsync.Map[string, struct{}]]
	server := registryauthorize.WithPolicies(registryServerPolicies...)
	client := registryauthorize.WithPolicies(registryClientPolicies...)
	chain := nsmgr.NewServer(ctx, own.tokens,
		nsmgr.WithName(os.Getenv("NSM_NAME")),
		nsmgr.WithURL(os.Getenv("INTEROP_PUBLIC")),
		nsmgr.WithRegistry(registry),
		nsmgr.WithForwarderServiceName("forwarder"),
		nsmgr.WithDialTimeout(750*time.Millisecond),
		nsmgr.WithDefaultExpiration(expiration()),
		nsmgr.WithDialOptions(own.dialOptions()...),
		nsmgr.WithAuthorizeServer(authorize.NewServer(authorize.WithSpiffeIDConnectionMap(&known))),
		nsmgr.WithAuthorizeMonitorConnectionServer(
			authmonitor.NewMonitorConnectionServer(authmonitor.WithSpiffeIDConnectionMap(&known))),
		nsmgr.WithAuthorizeNSRegistryServer(registryauthorize.NewNetworkServiceRegistryServer(server)),
		nsmgr.WithAuthorizeNSERegistryServer(registryauthorize.NewNetworkServiceEndpointRegistryServer(server)),
		nsmgr.WithAuthorizeNSRegistryClient(registryauthorize.NewNetworkServiceRegistryClient(client)),
		nsmgr.WithAuthorizeNSERegistryClient(registryauthorize.NewNetworkServiceEndpointRegistryClient(client)),
	)
	open := &openStreams{count: map[string]int{}}
	grpcServer := grpc.NewServer(append(own.serverOptions(), grpc.ChainStreamInterceptor(open.intercept))...)
	chain.Register(grpcServer)
	go commands(ctx, func(words []string) error {
		if words[0] != "streams" {
			return fmt.Errorf("unknown command %q", words)
		}
		say(open.of("proxy"), nil)
		return nil
	})
	return serve(ctx, grpcServer, os.Getenv("INTEROP_LISTEN"), os.Getenv("INTEROP_PUBLIC"))
}

// serve listens on all addresses until the context ends or one of them fails.
func serve(ctx context.Context, server *grpc.Server, addresses ...string) error {
	failed := make(chan error, len(addresses))
	for _, text := range addresses {
		address, err := url.Parse(text)
		if err != nil {
			return err
		}
		errs := grpcutils.ListenAndServe(ctx, address, server)
		select {
		case err := <-errs:
			return fmt.Errorf("listen on %s: %w", text, err)
		default:
		}
		go func() { failed <- <-errs }()
	}
	fmt.Println("ready")
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		return err
	}
}

// expiration is how long a registration lives without refresh.
func expiration() time.Duration {
	if text := os.Getenv("INTEROP_EXPIRATION"); text != "" {
		if value, err := time.ParseDuration(text); err == nil {
			return value
		}
	}
	return time.Minute
}
