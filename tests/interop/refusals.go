package main

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"fmt"
	"net/url"
	"os"
	"strings"
	"time"

	"github.com/edwarnicke/grpcfd"
	"github.com/golang-jwt/jwt/v4"
	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/cls"
	kernelmech "github.com/networkservicemesh/api/pkg/api/networkservice/mechanisms/kernel"
	"github.com/networkservicemesh/api/pkg/api/networkservice/payload"
	"github.com/networkservicemesh/sdk/pkg/tools/grpcutils"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// envelope is what a client sends beside a Request, to be spoilt.
type envelope struct {
	claims  jwt.MapClaims
	key     crypto.PrivateKey
	expires string
	headers metadata.MD
	request *networkservice.NetworkServiceRequest
	inode   string
}

// refusal is one way to be wrong, and what the real nsmgr says to it.
type refusal struct {
	name  string
	spoil func(*envelope)
	code  codes.Code
	text  string
}

func refusalTable(stranger *ecdsa.PrivateKey) []refusal {
	none := func(*envelope) {}
	first := func(e *envelope) *networkservice.PathSegment { return e.request.Connection.Path.PathSegments[0] }
	return []refusal{
		{"nothing is wrong", none, codes.OK, ""},
		{"no path", func(e *envelope) { e.request.Connection.Path = nil }, codes.PermissionDenied, "no sufficient privileges"},
		{"no token header", func(e *envelope) { e.headers.Delete("nsm-client-token") }, codes.PermissionDenied, "no sufficient privileges"},
		{"two token headers", func(e *envelope) {
			e.headers.Append("nsm-client-token", e.headers.Get("nsm-client-token")...)
		}, codes.PermissionDenied, "no sufficient privileges"},
		{"no expires header", func(e *envelope) { e.headers.Delete("nsm-client-token-expires") }, codes.PermissionDenied, "no sufficient privileges"},
		{"expires is no time", func(e *envelope) { e.expires = "soon" }, codes.PermissionDenied, "no sufficient privileges"},
		{"exp is past", func(e *envelope) { e.claims["exp"] = time.Now().Add(-time.Minute).Unix() }, codes.PermissionDenied, "no sufficient privileges"},
		{"no exp", func(e *envelope) { delete(e.claims, "exp") }, codes.PermissionDenied, "no sufficient privileges"},
		{"aud is another's", func(e *envelope) { e.claims["aud"] = []string{"spiffe://example.org/other"} }, codes.PermissionDenied, "no sufficient privileges"},
		{"aud is a string", func(e *envelope) { e.claims["aud"] = e.claims["aud"].([]string)[0] }, codes.PermissionDenied, "no sufficient privileges"},
		{"two aud", func(e *envelope) {
			e.claims["aud"] = append(e.claims["aud"].([]string), "spiffe://example.org/other")
		}, codes.Internal, ""},
		{"no aud", func(e *envelope) { delete(e.claims, "aud") }, codes.PermissionDenied, "no sufficient privileges"},
		{"another's key", func(e *envelope) { e.key = stranger }, codes.PermissionDenied, "no sufficient privileges"},
		{"sub is another's", func(e *envelope) { e.claims["sub"] = "spiffe://example.org/other" }, codes.OK, ""},
		{"segment id is not the connection's", func(e *envelope) { first(e).Id = "other" }, codes.Unknown, "should be equal"},
		{"index beyond the path", func(e *envelope) { e.request.Connection.Path.Index = 5 }, codes.Unknown, "Path.Index"},
		{"unknown service", func(e *envelope) { e.request.Connection.NetworkService = "nothing" }, codes.Unknown, "is not found"},
		{"other payload", func(e *envelope) { e.request.Connection.Payload = payload.IP }, codes.Unknown, "is not found"},
		{"unknown endpoint", func(e *envelope) { e.request.Connection.NetworkServiceEndpointName = "nothing" }, codes.Unknown, "not found"},
		{"inode without descriptor", func(e *envelope) { e.inode = "inode://4/1" }, codes.DeadlineExceeded, ""},
		{"inodeURL is no URL", func(e *envelope) { e.inode = "inode://x/y" }, codes.Unknown, ""},
		{"mechanism that nobody has", func(e *envelope) {
			e.request.MechanismPreferences[0].Type = "VXLAN"
		}, codes.Unknown, "mechanism"},
	}
}

// runRefusals is a client that makes each mistake once against the real nsmgr.
func runRefusals(ctx context.Context) error {
	own, err := newIdentity(ctx)
	if err != nil {
		return err
	}
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	nsmgr, err := url.Parse(os.Getenv("NSM_CONNECT_TO"))
	if err != nil {
		return err
	}
	tls := credentials.NewTLS(tlsconfig.MTLSClientConfig(own.source, own.source, tlsconfig.AuthorizeAny()))
	wrong := 0
	for _, c := range refusalTable(stranger) {
		// A connection for each: descriptors stay with it.
		cc, err := grpc.NewClient(grpcutils.URLToTarget(nsmgr),
			grpc.WithTransportCredentials(grpcfd.TransportCredentials(tls)),
			grpcfd.WithChainUnaryInterceptor())
		if err != nil {
			return err
		}
		got, _ := status.FromError(tryRequest(ctx, cc, own, c))
		verdict := "as expected"
		if got.Code() != c.code || !strings.Contains(got.Message(), c.text) {
			verdict = fmt.Sprintf("NOT as expected (%s)", c.code)
			wrong++
		}
		say(fmt.Sprintf("refusal | %s | %s | %.150s | %s", c.name, got.Code(), got.Message(), verdict), nil)
		_ = cc.Close()
	}
	if wrong > 0 {
		return fmt.Errorf("%d refusals are not as expected", wrong)
	}
	say("done", nil)
	return nil
}

func tryRequest(ctx context.Context, cc *grpc.ClientConn, own *identity, c refusal) error {
	svid, err := own.source.GetX509SVID()
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 3*time.Second)
	defer cancel()
	id := "refusal-" + strings.ReplaceAll(c.name, " ", "-")
	e := &envelope{
		claims: jwt.MapClaims{
			"sub": svid.ID.String(), "aud": []string{"spiffe://example.org/ns/red/pod/nsmgr"},
			"exp": time.Now().Add(time.Minute).Unix(),
		},
		key:     svid.PrivateKey,
		expires: time.Now().Add(time.Minute).UTC().Format(time.RFC3339Nano),
		request: &networkservice.NetworkServiceRequest{
			Connection: &networkservice.Connection{
				Id: id, NetworkService: lbService, Payload: payload.Ethernet,
				NetworkServiceEndpointName: "lb-1",
				Context:                    &networkservice.ConnectionContext{IpContext: &networkservice.IPContext{}},
				Path:                       &networkservice.Path{PathSegments: []*networkservice.PathSegment{{Name: "refused", Id: id}}},
			},
			MechanismPreferences: []*networkservice.Mechanism{{
				Cls: cls.LOCAL, Type: kernelmech.MECHANISM,
				Parameters: map[string]string{"name": "refused-0"},
			}},
		},
		headers: metadata.MD{"nsm-client-token": {""}, "nsm-client-token-expires": {""}},
	}
	c.spoil(e)
	token, err := jwt.NewWithClaims(jwt.SigningMethodES256, e.claims).SignedString(e.key)
	if err != nil {
		return err
	}
	for range e.headers.Get("nsm-client-token") {
		ctx = metadata.AppendToOutgoingContext(ctx, "nsm-client-token", token)
	}
	for range e.headers.Get("nsm-client-token-expires") {
		ctx = metadata.AppendToOutgoingContext(ctx, "nsm-client-token-expires", e.expires)
	}
	const netns = "/proc/thread-self/ns/net"
	inode, err := grpcfd.FilenameToURL(netns)
	if err != nil {
		return err
	}
	var options []grpc.CallOption
	if e.inode == "" {
		e.inode = inode.String()
		perRPC := grpcfd.PerRPCCredentials(grpcfd.PerRPCCredentialsFromCallOptions())
		sender, _ := grpcfd.FromPerRPCCredentials(perRPC)
		errs := sender.SendFilename(netns)
		select {
		case err := <-errs:
			return err
		default:
		}
		options = append(options, grpc.PerRPCCredentials(perRPC))
	}
	e.request.MechanismPreferences[0].Parameters["inodeURL"] = e.inode
	client := networkservice.NewNetworkServiceClient(cc)
	conn, err := client.Request(ctx, e.request, options...)
	if err != nil {
		return err
	}
	_, _ = client.Close(ctx, conn, options...)
	return nil
}
