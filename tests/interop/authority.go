package main

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"flag"
	"fmt"
	"log"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

// authority is a CA with one Workload API socket for each identity: the quick
// stand-in for SPIRE. After two fifths of its life an SVID is replaced.
type authority struct {
	domain string
	ttl    time.Duration
	key    *ecdsa.PrivateKey
	cert   *x509.Certificate
}

func runAuthority(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("authority", flag.ContinueOnError)
	dir := flags.String("dir", "", "where the sockets are: DIR/NAME.sock")
	domain := flags.String("domain", "example.org", "trust domain")
	ttl := flags.Duration("ttl", time.Hour, "life of an SVID")
	if err := flags.Parse(args); err != nil {
		return err
	}
	a, err := newAuthority(*domain, *ttl)
	if err != nil {
		return err
	}
	failed := make(chan error, flags.NArg())
	for _, name := range flags.Args() {
		if err := a.listen(filepath.Join(*dir, name+".sock"), name, failed); err != nil {
			return err
		}
	}
	fmt.Println("ready")
	select {
	case <-ctx.Done():
		return nil
	case err := <-failed:
		return err
	}
}

func newAuthority(domain string, ttl time.Duration) (*authority, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	id := &url.URL{Scheme: "spiffe", Host: domain}
	template := &x509.Certificate{
		SerialNumber:          big.NewInt(1),
		Subject:               pkix.Name{CommonName: "interop"},
		NotBefore:             time.Now().Add(-time.Minute),
		NotAfter:              time.Now().Add(24 * time.Hour),
		IsCA:                  true,
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		URIs:                  []*url.URL{id},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	return &authority{domain: domain, ttl: ttl, key: key, cert: cert}, err
}

func (a *authority) listen(socket, name string, failed chan<- error) error {
	if err := os.Remove(socket); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	listener, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	id := &url.URL{Scheme: "spiffe", Host: a.domain, Path: "/ns/red/pod/" + strings.TrimSuffix(name, "!")}
	server := grpc.NewServer()
	workload.RegisterSpiffeWorkloadAPIServer(server, &workloadAPI{authority: a, id: id})
	go func() { failed <- server.Serve(listener) }()
	return nil
}

func (a *authority) issue(id *url.URL) (*workload.X509SVIDResponse, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		NotBefore:             time.Now().Add(-10 * time.Second),
		NotAfter:              time.Now().Add(a.ttl),
		BasicConstraintsValid: true,
		KeyUsage:              x509.KeyUsageDigitalSignature | x509.KeyUsageKeyAgreement,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth, x509.ExtKeyUsageServerAuth},
		URIs:                  []*url.URL{id},
	}
	der, err := x509.CreateCertificate(rand.Reader, template, a.cert, key.Public(), a.key)
	if err != nil {
		return nil, err
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return &workload.X509SVIDResponse{Svids: []*workload.X509SVID{{
		SpiffeId:    id.String(),
		X509Svid:    der,
		X509SvidKey: pkcs8,
		Bundle:      a.cert.Raw,
	}}}, nil
}

type workloadAPI struct {
	workload.UnimplementedSpiffeWorkloadAPIServer
	authority *authority
	id        *url.URL
}

func (w *workloadAPI) FetchX509SVID(_ *workload.X509SVIDRequest, stream workload.SpiffeWorkloadAPI_FetchX509SVIDServer) error {
	md, _ := metadata.FromIncomingContext(stream.Context())
	if got := md.Get("workload.spiffe.io"); len(got) != 1 || got[0] != "true" {
		return status.Error(codes.InvalidArgument, "security header missing from request")
	}
	for {
		answer, err := w.authority.issue(w.id)
		if err != nil {
			return err
		}
		if err := stream.Send(answer); err != nil {
			return err
		}
		log.Printf("issued %s", w.id)
		select {
		case <-stream.Context().Done():
			return nil
		case <-time.After(w.authority.ttl * 2 / 5):
		}
	}
}

func (w *workloadAPI) FetchX509Bundles(_ *workload.X509BundlesRequest, stream workload.SpiffeWorkloadAPI_FetchX509BundlesServer) error {
	bundle := map[string][]byte{"spiffe://" + w.authority.domain: w.authority.cert.Raw}
	if err := stream.Send(&workload.X509BundlesResponse{Bundles: bundle}); err != nil {
		return err
	}
	<-stream.Context().Done()
	return nil
}
