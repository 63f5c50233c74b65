package main

import (
	"os"

	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/sdk-kernel/pkg/kernel/networkservice/connectioncontextkernel"
	"github.com/networkservicemesh/sdk-kernel/pkg/kernel/networkservice/connectioncontextkernel/ipcontext/ipaddress"
	"github.com/networkservicemesh/sdk-kernel/pkg/kernel/networkservice/connectioncontextkernel/ipcontext/ipneighbors"
	"github.com/networkservicemesh/sdk-kernel/pkg/kernel/networkservice/connectioncontextkernel/ipcontext/iprule"
	kernelroutes "github.com/networkservicemesh/sdk-kernel/pkg/kernel/networkservice/connectioncontextkernel/ipcontext/routes"
	"github.com/networkservicemesh/sdk-kernel/pkg/kernel/networkservice/connectioncontextkernel/mtu"
	"github.com/networkservicemesh/sdk/pkg/networkservice/core/chain"
)

// connectionContext is connectioncontextkernel. An ordinary user's namespace has
// a single group, where its pinggrouprange is refused and every Request with it:
// there it is all that this mesh needs of it, in the same order, without that.
func connectionContext() (networkservice.NetworkServiceServer, networkservice.NetworkServiceClient) {
	if os.WriteFile("/proc/sys/net/ipv4/ping_group_range", []byte("0 2147483647"), 0o600) == nil {
		return connectioncontextkernel.NewServer(), connectioncontextkernel.NewClient()
	}
	return chain.NewNetworkServiceServer(
			mtu.NewServer(),
			ipneighbors.NewServer(),
			iprule.NewServer(),
			kernelroutes.NewServer(),
			ipaddress.NewServer(),
		), chain.NewNetworkServiceClient(
			mtu.NewClient(),
			ipneighbors.NewClient(),
			kernelroutes.NewClient(),
			ipaddress.NewClient(),
		)
}
