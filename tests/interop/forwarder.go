package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/golang/protobuf/ptypes/empty"
	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/cls"
	kernelmech "github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/kernel"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/memif"
	registryapi "github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk-kernel/pkg/kernel/networkservice/ethernetcontext"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/client"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/endpoint"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/authorize"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/connect"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/discover"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/filtermechanisms"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/recvfd"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/sendfd"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanismtranslation"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/roundrobin"
	"github.com/networkservicemesh/sdk/pkg/networkservice/core/next"
	registryclient "github.com/networkservicemesh/sdk/pkg/registry/chains/client"
	registryrecvfd "github.com/networkservicemesh/sdk/pkg/registry/common/recvfd"
	registrysendfd "github.com/networkservicemesh/sdk/pkg/registry/common/sendfd"
	"github.com/networkservicemesh/sdk/pkg/tools/postpone"
	"google.golang.org/grpc"
)

// runForwarder is a kernel forwarder in the order of forwarder-vpp's chain, of
// SDK's and sdk-kernel's elements; only what joins the two namespaces is ours,
// a pair of veths in place of VPP (veth.go). The command `pairs` on
// standard input tells which connections have a pair of interfaces.
func runForwarder(ctx context.Context) error {
	own, err := newIdentity(ctx)
	if err != nil {
		return err
	}
	nsmgr, err := url.Parse(os.Getenv("NSM_CONNECT_TO"))
	if err != nil {
		return err
	}
	name, listen := os.Getenv("NSM_NAME"), os.Getenv("INTEROP_LISTEN")
	dial := registryclient.WithDialOptions(own.dialOptions()...)
	nses := registryclient.NewNetworkServiceEndpointRegistryClient(ctx,
		registryclient.WithClientURL(nsmgr),
		registryclient.WithNSEAdditionalFunctionality(
			registryrecvfd.NewNetworkServiceEndpointRegistryClient(),
			registrysendfd.NewNetworkServiceEndpointRegistryClient(),
		), dial)
	services := registryclient.NewNetworkServiceRegistryClient(ctx, registryclient.WithClientURL(nsmgr), dial)
	plane := &dataplane{pairs: map[string]*pair{}}
	contextServer, contextClient := connectionContext()
	chain := endpoint.NewServer(ctx, own.tokens,
		endpoint.WithName(name),
		endpoint.WithAuthorizeServer(authorize.NewServer()),
		endpoint.WithAdditionalFunctionality(
			recvfd.NewServer(),
			sendfd.NewServer(),
			discover.NewServer(services, nses),
			roundrobin.NewServer(),
			contextServer,
			ethernetcontext.NewVFServer(),
			mechanisms.NewServer(map[string]networkservice.NetworkServiceServer{
				kernelmech.MECHANISM: &vethServer{},
			}),
			connect.NewServer(client.NewClient(ctx,
				client.WithoutRefresh(),
				client.WithName(name),
				client.WithDialOptions(own.dialOptions()...),
				client.WithDialTimeout(750*time.Millisecond),
				client.WithAdditionalFunctionality(
					mechanismtranslation.NewClient(),
					contextClient,
					&vethClient{plane: plane},
					filtermechanisms.NewClient(),
					recvfd.NewClient(),
					sendfd.NewClient(),
				),
			)),
		),
	)
	server := grpc.NewServer(own.serverOptions()...)
	chain.Register(server)
	go commands(ctx, func(words []string) error {
		if words[0] != "pairs" {
			return fmt.Errorf("unknown command %q", words)
		}
		say("pairs "+strings.Join(plane.names(), " "), nil)
		return nil
	})
	go func() {
		_, err := nses.Register(ctx, &registryapi.NetworkServiceEndpoint{
			Name:                name,
			Url:                 listen,
			NetworkServiceNames: []string{"forwarder"},
			NetworkServiceLabels: map[string]*registryapi.NetworkServiceLabels{
				"forwarder": {Labels: map[string]string{"p2p": "true"}},
			},
		})
		say("registered", err)
	}()
	return serve(ctx, server, listen)
}

// clientMechanism is what the client's side of the chain has chosen, for the
// endpoint's side of it.
type clientMechanism struct{}

// vethServer tells the client element where the client wants its interface.
type vethServer struct{}

func (*vethServer) Request(ctx context.Context, request *networkservice.NetworkServiceRequest) (*networkservice.Connection, error) {
	chosen := request.GetConnection().GetMechanism().Clone()
	return next.Server(ctx).Request(context.WithValue(ctx, clientMechanism{}, chosen), request)
}

func (*vethServer) Close(ctx context.Context, conn *networkservice.Connection) (*empty.Empty, error) {
	return next.Server(ctx).Close(ctx, conn)
}

// vethClient offers what forwarder-vpp offers, and joins the client's and the
// endpoint's namespace once the endpoint has answered: before sdk-kernel's
// client elements configure the endpoint's interface, and after them its server
// elements the client's.
type vethClient struct{ plane *dataplane }

func (c *vethClient) Request(ctx context.Context, request *networkservice.NetworkServiceRequest, opts ...grpc.CallOption) (*networkservice.Connection, error) {
	for _, kind := range []string{memif.MECHANISM, kernelmech.MECHANISM} {
		request.MechanismPreferences = append(request.MechanismPreferences, &networkservice.Mechanism{
			Cls: cls.LOCAL, Type: kind, Parameters: map[string]string{},
		})
	}
	closeCtx := postpone.ContextWithValues(ctx)
	conn, err := next.Client(ctx).Request(ctx, request, opts...)
	if err != nil {
		return nil, err
	}
	chosen, _ := ctx.Value(clientMechanism{}).(*networkservice.Mechanism)
	if err := c.plane.connect(conn, chosen); err != nil {
		ctx, cancel := closeCtx()
		defer cancel()
		_, _ = c.Close(ctx, conn, opts...)
		return nil, err
	}
	return conn, nil
}

func (c *vethClient) Close(ctx context.Context, conn *networkservice.Connection, opts ...grpc.CallOption) (*empty.Empty, error) {
	_, err := next.Client(ctx).Close(ctx, conn, opts...)
	c.plane.disconnect(conn.GetId())
	return &empty.Empty{}, err
}
