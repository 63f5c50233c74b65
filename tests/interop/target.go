package main

import (
	"context"
	"fmt"
	"net"
	"net/url"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/golang/protobuf/ptypes/empty"
	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/cls"
	kernelmech "github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/kernel"
	"github.com/networkservicemesh/api/pkg/api/networkservice/payload"
	"github.com/networkservicemesh/sdk/pkg/networkservice/chains/client"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/authorize"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/heal"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/kernel"
	"github.com/networkservicemesh/sdk/pkg/networkservice/common/mechanisms/sendfd"
	"github.com/networkservicemesh/sdk/pkg/networkservice/core/next"
	"github.com/networkservicemesh/sdk/pkg/tools/grpcutils"
	"google.golang.org/grpc"
)

// runTarget is a target: the client of Meridio's TAPA. Commands on standard
// input: `connect`, `vips VIP...`, `close`, and `requests`, which tells how many
// Requests, refreshes among them, succeeded and failed.
func runTarget(ctx context.Context) error {
	own, err := newIdentity(ctx)
	if err != nil {
		return err
	}
	nsmgr, err := url.Parse(os.Getenv("NSM_CONNECT_TO"))
	if err != nil {
		return err
	}
	name, service := os.Getenv("NSM_NAME"), os.Getenv("NSM_SERVICE_NAME")
	counts := &counter{}
	nsc := client.NewClient(ctx,
		client.WithClientURL(nsmgr),
		client.WithName(name),
		client.WithAuthorizeClient(authorize.NewClient()),
		client.WithHealClient(heal.NewClient(ctx)),
		client.WithAdditionalFunctionality(
			counts,
			mechanisms.NewClient(map[string]networkservice.NetworkServiceClient{
				kernelmech.MECHANISM: kernel.NewClient(kernel.WithInterfaceName("nsm-0")),
			}),
			sendfd.NewClient(),
		),
		client.WithDialTimeout(5*time.Second),
		client.WithDialOptions(own.dialOptions()...),
	)
	cc, err := grpc.NewClient(grpcutils.URLToTarget(nsmgr), own.dialOptions()...)
	if err != nil {
		return err
	}
	t := &target{
		nsc: nsc, monitor: networkservice.NewMonitorConnectionClient(cc),
		id: fmt.Sprintf("%s-%s-0", name, service), service: service,
	}
	go commands(ctx, func(words []string) error {
		switch words[0] {
		case "connect", "context":
			return t.connect(ctx)
		case "vips":
			return t.setVIPs(ctx, words[1:])
		case "close":
			return t.close(ctx)
		case "requests":
			say(fmt.Sprintf("requests %d %d", counts.good.Load(), counts.bad.Load()), nil)
			return nil
		default:
			return fmt.Errorf("unknown command %q", words)
		}
	})
	say("ready", nil)
	<-ctx.Done()
	return nil
}

// counter counts the Requests that leave.
type counter struct{ good, bad atomic.Int64 }

func (c *counter) Request(ctx context.Context, request *networkservice.NetworkServiceRequest, opts ...grpc.CallOption) (*networkservice.Connection, error) {
	conn, err := next.Client(ctx).Request(ctx, request, opts...)
	if err != nil {
		c.bad.Add(1)
	} else {
		c.good.Add(1)
	}
	return conn, err
}

func (c *counter) Close(ctx context.Context, conn *networkservice.Connection, opts ...grpc.CallOption) (*empty.Empty, error) {
	return next.Client(ctx).Close(ctx, conn, opts...)
}

type target struct {
	nsc         networkservice.NetworkServiceClient
	monitor     networkservice.MonitorConnectionClient
	id, service string
	conn        *networkservice.Connection
	local       []string
}

func (t *target) connect(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	request := &networkservice.NetworkServiceRequest{
		Connection: &networkservice.Connection{
			Id: t.id, NetworkService: t.service, Payload: payload.Ethernet,
			Labels: map[string]string{"nodeName": os.Getenv("NODE_NAME")},
		},
		MechanismPreferences: []*networkservice.Mechanism{{Cls: cls.LOCAL, Type: kernelmech.MECHANISM}},
	}
	recovered, err := t.recover(ctx)
	if err != nil {
		return fmt.Errorf("monitor: %w", err)
	}
	if recovered != nil {
		request.Connection = recovered
		say("recovered", nil)
	}
	conn, err := t.nsc.Request(ctx, request)
	if err != nil {
		return err
	}
	t.conn = conn
	t.local = nil
	for _, address := range conn.GetContext().GetIpContext().GetSrcIpAddrs() {
		if t.isLocal(address) {
			t.local = append(t.local, address)
		}
	}
	ip := conn.GetContext().GetIpContext()
	say(fmt.Sprintf("context %s", strings.Join(slices.Concat(ip.GetSrcIpAddrs(), ip.GetDstIpAddrs()), " ")), nil)
	say("addresses "+strings.Join(t.local, " "), nil)
	return nil
}

// recover asks whether nsmgr still has a connection of this id, as TAPA does.
func (t *target) recover(ctx context.Context) (*networkservice.Connection, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stream, err := t.monitor.MonitorConnections(ctx, &networkservice.MonitorScopeSelector{
		PathSegments: []*networkservice.PathSegment{{Id: t.id}},
	})
	if err != nil {
		return nil, err
	}
	event, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	for _, conn := range event.GetConnections() {
		path := conn.GetPath()
		if path.GetIndex() == 1 && path.GetPathSegments()[0].GetId() == t.id {
			conn.Path.Index = 0
			conn.Id = t.id
			if conn.GetState() == networkservice.State_DOWN {
				conn.State = networkservice.State_RESELECT_REQUESTED
			}
			return conn, nil
		}
	}
	return nil, nil
}

func (t *target) isLocal(address string) bool {
	ip, _, err := net.ParseCIDR(address)
	if err != nil {
		return false
	}
	for _, gateway := range t.conn.GetContext().GetIpContext().GetExtraPrefixes() {
		if _, subnet, err := net.ParseCIDR(gateway); err == nil && subnet.Contains(ip) {
			return true
		}
	}
	return false
}

func (t *target) setVIPs(ctx context.Context, vips []string) error {
	if t.conn == nil {
		return fmt.Errorf("not connected")
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	ip := t.conn.GetContext().GetIpContext()
	routes := map[bool][]*networkservice.Route{}
	for _, gateway := range ip.GetExtraPrefixes() {
		hop, _, err := net.ParseCIDR(gateway)
		if err != nil {
			return err
		}
		prefix := "0.0.0.0/0"
		if hop.To4() == nil {
			prefix = "::/0"
		}
		v4 := hop.To4() != nil
		routes[v4] = append(routes[v4], &networkservice.Route{Prefix: prefix, NextHop: hop.String()})
	}
	ip.SrcIpAddrs = append([]string{}, t.local...)
	ip.Policies = nil
	for _, vip := range vips {
		address, _, err := net.ParseCIDR(vip)
		if err != nil {
			return err
		}
		ip.SrcIpAddrs = append(ip.SrcIpAddrs, vip)
		ip.Policies = append(ip.Policies, &networkservice.PolicyRoute{From: vip, Routes: routes[address.To4() != nil]})
	}
	conn, err := t.nsc.Request(ctx, &networkservice.NetworkServiceRequest{Connection: &networkservice.Connection{
		Id: t.conn.GetId(), NetworkService: t.conn.GetNetworkService(), Mechanism: t.conn.GetMechanism(),
		Labels: t.conn.GetLabels(), Payload: t.conn.GetPayload(),
		Context: &networkservice.ConnectionContext{IpContext: ip},
	}})
	if err != nil {
		return err
	}
	t.conn = conn
	return nil
}

func (t *target) close(ctx context.Context) error {
	if t.conn == nil {
		return fmt.Errorf("not connected")
	}
	ctx, cancel := context.WithTimeout(ctx, 15*time.Second)
	defer cancel()
	_, err := t.nsc.Close(ctx, t.conn)
	t.conn = nil
	return err
}
