package main

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/golang/protobuf/ptypes/empty"
	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/cls"
	kernelmech "github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/kernel"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/memif"
	registryapi "github.com/networkservicemesh/api/pkg/api/registry"
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
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/null"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/roundrobin"
	"github.com/networkservicemesh/sdk/pkg/networkservice/core/next"
	registryclient "github.com/networkservicemesh/sdk/pkg/registry/chains/client"
	registryrecvfd "github.com/networkservicemesh/sdk/pkg/registry/common/recvfd"
	registrysendfd "github.com/networkservicemesh/sdk/pkg/registry/common/sendfd"
	"github.com/networkservicemesh/sdk/pkg/tools/postpone"
	"google.golang.org/grpc"
)

// runForwarder is a kernel forwarder in the order of forwarder-vpp's chain;
// only the data plane elements are ours (veth.go). The command `pairs` on
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
	chain := endpoint.NewServer(ctx, own.tokens,
		endpoint.WithName(name),
		endpoint.WithAuthorizeServer(authorize.NewServer()),
		endpoint.WithAdditionalFunctionality(
			recvfd.NewServer(),
			sendfd.NewServer(),
			discover.NewServer(services, nses),
			roundrobin.NewServer(),
			mechanisms.NewServer(map[string]networkservice.NetworkServiceServer{
				kernelmech.MECHANISM: null.NewServer(),
			}),
			&crossConnectServer{plane: plane},
			connect.NewServer(client.NewClient(ctx,
				client.WithoutRefresh(),
				client.WithName(name),
				client.WithDialOptions(own.dialOptions()...),
				client.WithDialTimeout(750*time.Millisecond),
				client.WithAdditionalFunctionality(
					mechanismtranslation.NewClient(),
					&crossConnectClient{},
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

// ends of one connection, filled from both sides of the chain in one Request.
type ends struct {
	mu  sync.Mutex
	nse *networkservice.Mechanism
}

type endsKey struct{}

// crossConnectServer joins the client's and the endpoint's namespace once the
// endpoint has answered.
type crossConnectServer struct{ plane *dataplane }

func (s *crossConnectServer) Request(ctx context.Context, request *networkservice.NetworkServiceRequest) (*networkservice.Connection, error) {
	both := &ends{}
	closeCtx := postpone.ContextWithValues(ctx)
	_, known := s.plane.get(request.GetConnection().GetId())
	conn, err := next.Server(ctx).Request(context.WithValue(ctx, endsKey{}, both), request)
	if err != nil {
		return nil, err
	}
	both.mu.Lock()
	nse := both.nse
	both.mu.Unlock()
	if err := s.plane.connect(conn, nse); err != nil {
		if !known {
			ctx, cancel := closeCtx()
			defer cancel()
			_, _ = next.Server(ctx).Close(ctx, conn)
		}
		return nil, err
	}
	return conn, nil
}

func (s *crossConnectServer) Close(ctx context.Context, conn *networkservice.Connection) (*empty.Empty, error) {
	_, err := next.Server(ctx).Close(ctx, conn)
	s.plane.disconnect(conn.GetId())
	return &empty.Empty{}, err
}

// crossConnectClient offers what forwarder-vpp offers, and tells the server
// what the endpoint has chosen.
type crossConnectClient struct{}

func (*crossConnectClient) Request(ctx context.Context, request *networkservice.NetworkServiceRequest, opts ...grpc.CallOption) (*networkservice.Connection, error) {
	for _, kind := range []string{memif.MECHANISM, kernelmech.MECHANISM} {
		request.MechanismPreferences = append(request.MechanismPreferences, &networkservice.Mechanism{
			Cls: cls.LOCAL, Type: kind, Parameters: map[string]string{},
		})
	}
	conn, err := next.Client(ctx).Request(ctx, request, opts...)
	if err != nil {
		return nil, err
	}
	if both, ok := ctx.Value(endsKey{}).(*ends); ok {
		both.mu.Lock()
		both.nse = conn.GetMechanism().Clone()
		both.mu.Unlock()
	}
	return conn, nil
}

func (*crossConnectClient) Close(ctx context.Context, conn *networkservice.Connection, opts ...grpc.CallOption) (*empty.Empty, error) {
	return next.Client(ctx).Close(ctx, conn, opts...)
}
