package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/edwarnicke/grpcfd"
	"github.com/golang-jwt/jwt/v4"
	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/cls"
	kernelmech "github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/kernel"
	"github.com/networkservicemesh/api/pkg/api/networkservice/payload"
	registryapi "github.com/networkservicemesh/api/pkg/api/registry"
	"github.com/networkservicemesh/sdk/pkg/tools/grpcutils"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// A call of nsmgr.
const (
	request      = "Request"
	closing      = "Close"
	monitor      = "MonitorConnections"
	registerNS   = "Register service"
	unregisterNS = "Unregister service"
	findNS       = "Find service"
	register     = "Register endpoint"
	unregister   = "Unregister endpoint"
	find         = "Find endpoint"
)

// patience is the deadline of a call that has one: long for a good call on a
// busy machine, short enough for the few that wait for it.
const patience = 4 * time.Second

// envelope is a call with all that goes with it, to be spoilt.
type envelope struct {
	claims   jwt.MapClaims
	key      crypto.PrivateKey
	token    string // instead of one from claims and key
	expires  string
	headers  metadata.MD // how many times each, and the registry's path
	limit    time.Duration
	tls      *tls.Config // instead of one of the identity
	file     string      // whose descriptor goes along, if any
	request  *networkservice.NetworkServiceRequest
	close    *networkservice.Connection
	selector *networkservice.MonitorScopeSelector
	service  *registryapi.NetworkService
	endpoint *registryapi.NetworkServiceEndpoint
}

// mistake is one way to be wrong.
type mistake struct {
	call  string
	name  string
	spoil func(*envelope)
}

// accuser makes mistakes, under one identity or another.
type accuser struct {
	// answered is what the last Request was answered, for a Close.
	answered *networkservice.Connection
	own      *workloadapi.X509Source
	other    *workloadapi.X509Source
	stranger *ecdsa.PrivateKey
	nsmgr    *url.URL
	dir      string
}

// runRefusals is a client that makes each mistake once, against whatever nsmgr
// is at NSM_CONNECT_TO, and tells what it is answered.
func runRefusals(ctx context.Context) error {
	a := &accuser{dir: os.Getenv("INTEROP_DIR")}
	var err error
	if a.own, err = workloadapi.NewX509Source(ctx); err != nil {
		return err
	}
	if a.other, err = workloadapi.NewX509Source(ctx,
		workloadapi.WithClientOptions(workloadapi.WithAddr(os.Getenv("INTEROP_OTHER")))); err != nil {
		return err
	}
	if a.stranger, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
		return err
	}
	if a.nsmgr, err = url.Parse(os.Getenv("NSM_CONNECT_TO")); err != nil {
		return err
	}
	// What is refused, because it is another's.
	if err := a.call(ctx, a.other, registerNS, "of another", nil); err != nil {
		return fmt.Errorf("%s: %w", registerNS, err)
	}
	if err := a.call(ctx, a.other, register, "of-another", nil); err != nil {
		return fmt.Errorf("%s: %w", register, err)
	}
	for number, m := range mistakes(a.stranger) {
		say(fmt.Sprintf("refusal | %s | %s | %s", m.call, m.name, a.accuse(ctx, m, fmt.Sprintf("refused-%d", number))), nil)
	}
	say("done", nil)
	return nil
}

// accuse makes one mistake, after what is needed to get so far, and cleans up.
// A Request that was refused leaves nothing to close.
func (a *accuser) accuse(ctx context.Context, m mistake, name string) string {
	before := map[string]string{closing: request, monitor: request, unregister: register, unregisterNS: registerNS}
	after := map[string]string{request: closing, monitor: closing, closing: closing, register: unregister,
		unregister: unregister, registerNS: unregisterNS, unregisterNS: unregisterNS}
	if first := before[m.call]; first != "" {
		if err := a.call(ctx, a.own, first, name, nil); err != nil {
			return fmt.Sprintf("not reached | %s: %v", first, err)
		}
	}
	if m.call == request {
		a.answered = nil
	}
	err := a.call(ctx, a.own, m.call, name, m.spoil)
	answer, _ := status.FromError(err)
	switch {
	case errors.Is(err, io.EOF):
		answer = status.New(codes.OK, "the stream ends")
	case strings.Contains(answer.Message(), "context deadline exceeded"):
		// Whoever of the two notices first.
		answer = status.New(codes.DeadlineExceeded, answer.Message())
	}
	if last := after[m.call]; last != "" && (last != closing || a.answered != nil) {
		_ = a.call(ctx, a.own, last, name, nil)
	}
	text := strings.ReplaceAll(strings.ReplaceAll(answer.Message(), "|", "/"), "\n", " ")
	return fmt.Sprintf("%s | %.160s", answer.Code(), text)
}

// call makes one call, and again where it met a race of the SDK's endpoint,
// which now and then closes a descriptor before it has sent it (grpcfd).
func (a *accuser) call(ctx context.Context, source *workloadapi.X509Source, call, name string, spoil func(*envelope)) error {
	for range 3 {
		if err := a.once(ctx, source, call, name, spoil); err == nil || !strings.Contains(err.Error(), "file already closed") {
			return err
		}
	}
	return a.once(ctx, source, call, name, spoil)
}

// once makes one call on a connection of its own: descriptors stay with it.
func (a *accuser) once(ctx context.Context, source *workloadapi.X509Source, call, name string, spoil func(*envelope)) error {
	e, err := a.envelope(source, call, name)
	if err != nil {
		return err
	}
	if spoil != nil {
		spoil(e)
	}
	if e.token == "" {
		if e.token, err = jwt.NewWithClaims(jwt.SigningMethodES256, e.claims).SignedString(e.key); err != nil {
			return err
		}
	}
	cancel := context.CancelFunc(func() {})
	if e.limit > 0 {
		ctx, cancel = context.WithTimeout(ctx, e.limit)
	}
	defer cancel()
	for range e.headers.Get("nsm-client-token") {
		ctx = metadata.AppendToOutgoingContext(ctx, "nsm-client-token", e.token)
	}
	for range e.headers.Get("nsm-client-token-expires") {
		ctx = metadata.AppendToOutgoingContext(ctx, "nsm-client-token-expires", e.expires)
	}
	if strings.HasPrefix(call, "Register") || strings.HasPrefix(call, "Unregister") {
		for _, path := range e.headers.Get("path") {
			ctx = metadata.AppendToOutgoingContext(ctx, "path", path)
		}
	}
	if e.tls == nil {
		e.tls = tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeAny())
	}
	cc, err := grpc.NewClient(grpcutils.URLToTarget(a.nsmgr),
		grpc.WithTransportCredentials(grpcfd.TransportCredentials(credentials.NewTLS(e.tls))), grpcfd.WithChainUnaryInterceptor())
	if err != nil {
		return err
	}
	defer func() { _ = cc.Close() }()
	var options []grpc.CallOption
	if e.file != "" {
		perRPC := grpcfd.PerRPCCredentials(grpcfd.PerRPCCredentialsFromCallOptions())
		sender, _ := grpcfd.FromPerRPCCredentials(perRPC)
		select {
		case err := <-sender.SendFilename(e.file):
			return err
		default:
		}
		options = append(options, grpc.PerRPCCredentials(perRPC))
	}
	return a.send(ctx, cc, call, e, options)
}

func (a *accuser) send(ctx context.Context, cc *grpc.ClientConn, call string, e *envelope, options []grpc.CallOption) (err error) {
	// Streams are asked for their first answer only.
	streaming, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	var stream interface{ RecvMsg(any) error }
	switch call {
	case request:
		a.answered, err = networkservice.NewNetworkServiceClient(cc).Request(ctx, e.request, options...)
	case closing:
		_, err = networkservice.NewNetworkServiceClient(cc).Close(ctx, e.close, options...)
	case registerNS:
		_, err = registryapi.NewNetworkServiceRegistryClient(cc).Register(ctx, e.service)
	case unregisterNS:
		_, err = registryapi.NewNetworkServiceRegistryClient(cc).Unregister(ctx, e.service)
	case register:
		_, err = registryapi.NewNetworkServiceEndpointRegistryClient(cc).Register(ctx, e.endpoint, options...)
	case unregister:
		_, err = registryapi.NewNetworkServiceEndpointRegistryClient(cc).Unregister(ctx, e.endpoint, options...)
	case monitor:
		if stream, err = networkservice.NewMonitorConnectionClient(cc).MonitorConnections(streaming, e.selector); err == nil {
			err = stream.RecvMsg(&networkservice.ConnectionEvent{})
		}
	case findNS:
		query := &registryapi.NetworkServiceQuery{NetworkService: e.service, Watch: true}
		if stream, err = registryapi.NewNetworkServiceRegistryClient(cc).Find(streaming, query); err == nil {
			err = stream.RecvMsg(&registryapi.NetworkServiceResponse{})
		}
	case find:
		query := &registryapi.NetworkServiceEndpointQuery{NetworkServiceEndpoint: e.endpoint, Watch: true}
		if stream, err = registryapi.NewNetworkServiceEndpointRegistryClient(cc).Find(streaming, query); err == nil {
			err = stream.RecvMsg(&registryapi.NetworkServiceEndpointResponse{})
		}
	}
	return err
}

// envelope is a call in which nothing is wrong.
func (a *accuser) envelope(source *workloadapi.X509Source, call, name string) (*envelope, error) {
	svid, err := source.GetX509SVID()
	if err != nil {
		return nil, err
	}
	files := map[bool]string{false: "/proc/thread-self/ns/net", true: filepath.Join(a.dir, "lb-1.nse.sock")}
	inode, err := grpcfd.FilenameToURL(files[false])
	if err != nil {
		return nil, err
	}
	socket, err := grpcfd.FilenameToURL(files[true])
	if err != nil {
		return nil, err
	}
	if call == findNS || call == find {
		name = lbService
	}
	segment := &networkservice.PathSegment{Name: "refused", Id: name}
	e := &envelope{
		claims: jwt.MapClaims{
			"sub": svid.ID.String(), "aud": []string{os.Getenv("INTEROP_NSMGR_ID")},
			"exp": time.Now().Add(time.Minute).Unix(),
		},
		key:     svid.PrivateKey,
		expires: time.Now().Add(time.Minute).UTC().Format(time.RFC3339Nano),
		limit:   patience,
		file:    files[call == register || call == unregister],
		close:   a.answered.Clone(),
		headers: metadata.MD{
			"nsm-client-token": {""}, "nsm-client-token-expires": {""}, "path": {`{"Index":0,"PathSegments":[]}`},
		},
		request: &networkservice.NetworkServiceRequest{
			Connection: &networkservice.Connection{
				Id: name, NetworkService: lbService, Payload: payload.Ethernet,
				NetworkServiceEndpointName: "lb-1",
				Context:                    &networkservice.ConnectionContext{IpContext: &networkservice.IPContext{}},
				Path:                       &networkservice.Path{PathSegments: []*networkservice.PathSegment{segment}},
			},
			MechanismPreferences: []*networkservice.Mechanism{{
				Cls: cls.LOCAL, Type: kernelmech.MECHANISM,
				Parameters: map[string]string{"name": "refused-0", "inodeURL": inode.String()},
			}},
		},
		selector: &networkservice.MonitorScopeSelector{PathSegments: []*networkservice.PathSegment{{Id: name}}},
		service:  &registryapi.NetworkService{Name: name, Payload: payload.Ethernet},
		endpoint: &registryapi.NetworkServiceEndpoint{
			Name: name, NetworkServiceNames: []string{"nobody-asks"}, Url: socket.String(),
			NetworkServiceLabels: map[string]*registryapi.NetworkServiceLabels{"nobody-asks": {}},
		},
	}
	if call == find {
		e.endpoint = &registryapi.NetworkServiceEndpoint{NetworkServiceNames: []string{lbService}}
	}
	return e, nil
}
