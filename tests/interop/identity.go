package main

import (
	"context"
	"os"
	"time"

	"github.com/edwarnicke/grpcfd"
	"github.com/networkservicemesh/sdk/pkg/tools/spiffejwt"
	"github.com/networkservicemesh/sdk/pkg/tools/token"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
)

// identity is what a process of the mesh needs to talk to the others: the
// Workload API's SVID in TLS below descriptor passing, and tokens signed with
// its key.
type identity struct {
	source *workloadapi.X509Source
	tokens token.GeneratorFunc
}

// newIdentity waits for the first SVID of SPIFFE_ENDPOINT_SOCKET; tokens live
// as long as INTEROP_TOKEN_LIFETIME says.
func newIdentity(ctx context.Context) (*identity, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx)
	if err != nil {
		return nil, err
	}
	lifetime := 10 * time.Minute
	if text := os.Getenv("INTEROP_TOKEN_LIFETIME"); text != "" {
		if lifetime, err = time.ParseDuration(text); err != nil {
			return nil, err
		}
	}
	return &identity{source: source, tokens: spiffejwt.TokenGeneratorFunc(source, lifetime)}, nil
}

func (i *identity) serverOptions() []grpc.ServerOption {
	tls := credentials.NewTLS(tlsconfig.MTLSServerConfig(i.source, i.source, tlsconfig.AuthorizeAny()))
	return []grpc.ServerOption{grpc.Creds(grpcfd.TransportCredentials(tls))}
}

func (i *identity) dialOptions() []grpc.DialOption {
	tls := credentials.NewTLS(tlsconfig.MTLSClientConfig(i.source, i.source, tlsconfig.AuthorizeAny()))
	return []grpc.DialOption{
		grpc.WithTransportCredentials(grpcfd.TransportCredentials(tls)),
		grpc.WithDefaultCallOptions(
			grpc.WaitForReady(true),
			grpc.PerRPCCredentials(token.NewPerRPCCredentials(i.tokens)),
		),
		grpcfd.WithChainStreamInterceptor(),
		grpcfd.WithChainUnaryInterceptor(),
	}
}
