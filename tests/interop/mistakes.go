package main

import (
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"time"

	"github.com/edwarnicke/grpcfd"
	"github.com/golang-jwt/jwt/v4"
	"github.com/networkservicemesh/api/pkg/api/networkservice"
	"github.com/networkservicemesh/api/pkg/api/networkservice/payload"
	"google.golang.org/protobuf/types/known/timestamppb"
)

const stranger = "spiffe://example.org/other"

// mistakes are all that the lab's nsmgr refuses or frowns at, for the real one
// and for the lab.
func mistakes(key *ecdsa.PrivateKey) []mistake {
	var all []mistake
	for _, call := range []string{request, closing, registerNS, unregisterNS, register, unregister, monitor, findNS, find} {
		all = append(all, ofEnvelope(call, key)...)
	}
	all = append(all,
		mistake{request, "no certificate", func(e *envelope) { e.tls = insecure() }},
		mistake{request, "certificate of another authority", func(e *envelope) { e.tls = insecure(forged()) }})
	all = append(all, ofRequest(key)...)
	all = append(all, ofClose()...)
	all = append(all, ofMonitor()...)
	all = append(all, ofRegistration()...)
	// Last, because the real registry does not survive it.
	return append(all, mistake{find, "no filter", func(e *envelope) { e.endpoint = nil }})
}

// ofEnvelope are mistakes that every call can have.
func ofEnvelope(call string, key *ecdsa.PrivateKey) []mistake {
	audience := func(e *envelope) string { return e.claims["aud"].([]string)[0] }
	return []mistake{
		{call, "nothing is wrong", func(*envelope) {}},
		{call, "no token header", func(e *envelope) { e.headers.Delete("nsm-client-token") }},
		{call, "two token headers", func(e *envelope) { e.headers.Append("nsm-client-token", "") }},
		{call, "no expires header", func(e *envelope) { e.headers.Delete("nsm-client-token-expires") }},
		{call, "expires is no time", func(e *envelope) { e.expires = "soon" }},
		{call, "expires is past", func(e *envelope) { e.expires = "2001-01-01T00:00:00Z" }},
		{call, "expires is later than the certificates", func(e *envelope) { e.expires = "2100-01-01T00:00:00Z" }},
		{call, "token is none", func(e *envelope) { e.token = "x" }},
		{call, "exp is past", func(e *envelope) { e.claims["exp"] = time.Now().Add(-time.Minute).Unix() }},
		{call, "no exp", func(e *envelope) { delete(e.claims, "exp") }},
		{call, "aud is another's", func(e *envelope) { e.claims["aud"] = []string{stranger} }},
		{call, "aud is a string", func(e *envelope) { e.claims["aud"] = audience(e) }},
		{call, "two aud", func(e *envelope) { e.claims["aud"] = []string{audience(e), stranger} }},
		{call, "no aud", func(e *envelope) { delete(e.claims, "aud") }},
		{call, "another's key", func(e *envelope) { e.key = key }},
		{call, "sub is another's", func(e *envelope) { e.claims["sub"] = stranger }},
		{call, "no sub", func(e *envelope) { delete(e.claims, "sub") }},
		{call, "no deadline", func(e *envelope) { e.limit = 0 }},
	}
}

func ofRequest(key *ecdsa.PrivateKey) []mistake {
	conn := func(e *envelope) *networkservice.Connection { return e.request.Connection }
	wish := func(e *envelope) *networkservice.Mechanism { return e.request.MechanismPreferences[0] }
	name := func(text string) func(*envelope) {
		return func(e *envelope) { wish(e).Parameters["name"] = text }
	}
	return []mistake{
		{request, "no connection", func(e *envelope) { e.request.Connection = nil }},
		{request, "no path", func(e *envelope) { conn(e).Path = nil }},
		{request, "path without segments", func(e *envelope) { conn(e).Path.PathSegments = nil }},
		{request, "segment id is not the connection's", func(e *envelope) { conn(e).Path.PathSegments[0].Id = "other" }},
		{request, "index beyond the path", func(e *envelope) { conn(e).Path.Index = 5 }},
		{request, "client is not the first of its path", func(e *envelope) {
			before := jwt.MapClaims{
				"sub": stranger, "aud": []string{e.claims["sub"].(string)}, "exp": time.Now().Add(time.Minute).Unix(),
			}
			token, _ := jwt.NewWithClaims(jwt.SigningMethodES256, before).SignedString(key)
			conn(e).Path = &networkservice.Path{Index: 1, PathSegments: []*networkservice.PathSegment{
				{Name: "before", Id: "before", Token: token, Expires: timestamppb.New(time.Now().Add(time.Minute))},
				{Name: "refused", Id: conn(e).Id},
			}}
		}},
		{request, "unknown service", func(e *envelope) { conn(e).NetworkService = "nothing" }},
		{request, "other payload", func(e *envelope) { conn(e).Payload = payload.IP }},
		{request, "no payload", func(e *envelope) { conn(e).Payload = "" }},
		{request, "unknown endpoint", func(e *envelope) { conn(e).NetworkServiceEndpointName = "nothing" }},
		{request, "no endpoint", func(e *envelope) { conn(e).NetworkServiceEndpointName = "" }},
		{request, "no mechanism", func(e *envelope) { e.request.MechanismPreferences = nil }},
		{request, "mechanism that nobody has", func(e *envelope) { wish(e).Type = "VXLAN" }},
		{request, "mechanism of another class", func(e *envelope) { wish(e).Cls = "REMOTE" }},
		{request, "no inodeURL", func(e *envelope) { delete(wish(e).Parameters, "inodeURL") }},
		{request, "inodeURL is no number", func(e *envelope) { wish(e).Parameters["inodeURL"] = "inode://x/y" }},
		{request, "inodeURL without its descriptor", func(e *envelope) {
			wish(e).Parameters["inodeURL"] = "inode://4/1"
			e.file = ""
		}},
		{request, "interface of 16 bytes", name("refused-90123456")},
		{request, "interface with a slash", name("refused/0")},
		{request, "interface with a space", name("refused 0")},
		{request, "interface without a name", func(e *envelope) { delete(wish(e).Parameters, "name") }},
	}
}

func ofClose() []mistake {
	return []mistake{
		{closing, "nsmgr's segment is not sent again", func(e *envelope) {
			e.close.Path.PathSegments = e.close.Path.PathSegments[:1]
		}},
		{closing, "no path", func(e *envelope) { e.close.Path = nil }},
		{closing, "segment id is not the connection's", func(e *envelope) { e.close.Path.PathSegments[0].Id = "other" }},
		{closing, "index beyond the path", func(e *envelope) { e.close.Path.Index = 5 }},
	}
}

func ofMonitor() []mistake {
	return []mistake{
		{monitor, "no selector", func(e *envelope) { e.selector = &networkservice.MonitorScopeSelector{} }},
		{monitor, "unknown connection", func(e *envelope) { e.selector.PathSegments[0].Id = "other" }},
		{monitor, "by name alone", func(e *envelope) {
			e.selector.PathSegments[0] = &networkservice.PathSegment{Name: "refused"}
		}},
	}
}

func ofRegistration() []mistake {
	var all []mistake
	for _, call := range []string{registerNS, unregisterNS, register, unregister} {
		path := func(text string) func(*envelope) {
			return func(e *envelope) { e.headers.Set("path", text) }
		}
		all = append(all,
			mistake{call, "no path header", func(e *envelope) { e.headers.Delete("path") }},
			mistake{call, "path is no JSON", path("x")},
			mistake{call, "index beyond the path", path(`{"Index":5,"PathSegments":[{"token":"x"}]}`)},
			mistake{call, "no name", func(e *envelope) { e.service.Name, e.endpoint.Name = "", "" }},
			mistake{call, "another's", func(e *envelope) { e.service.Name, e.endpoint.Name = "of another", "of-another" }},
			mistake{call, "unknown name", func(e *envelope) { e.service.Name, e.endpoint.Name = "unknown", "unknown" }},
		)
	}
	all = append(all,
		mistake{registerNS, "no payload", func(e *envelope) { e.service.Payload = "" }},
		mistake{register, "no service", func(e *envelope) {
			e.endpoint.NetworkServiceNames, e.endpoint.NetworkServiceLabels = nil, nil
		}},
		mistake{register, "no labels for its service", func(e *envelope) { e.endpoint.NetworkServiceLabels = nil }},
		mistake{register, "name is no DNS name", func(e *envelope) { e.endpoint.Name = "No Name" }},
		mistake{register, "nobody listens at its socket", func(e *envelope) { e.endpoint.Url, e.file = deadSocket() }},
		mistake{unregister, "unknown name, without its descriptor", func(e *envelope) {
			e.endpoint.Name, e.endpoint.Url, e.file = "unknown", "inode://4/1", ""
		}},
		mistake{register, "has been expired", func(e *envelope) {
			e.endpoint.ExpirationTime = timestamppb.New(time.Now().Add(-time.Minute))
		}},
	)
	for _, call := range []string{register, unregister} {
		all = append(all,
			mistake{call, "no URL", func(e *envelope) { e.endpoint.Url = "" }},
			mistake{call, "URL is none", func(e *envelope) { e.endpoint.Url = "%" }},
			mistake{call, "URL of a file", func(e *envelope) { e.endpoint.Url = "unix:///nowhere.sock" }},
			mistake{call, "inode is no number", func(e *envelope) { e.endpoint.Url = "inode://x/y" }},
			mistake{call, "inode without its descriptor", func(e *envelope) {
				e.endpoint.Url, e.file = "inode://4/1", ""
			}},
		)
	}
	return all
}

// insecure trusts everybody.
func insecure(own ...tls.Certificate) *tls.Config {
	return &tls.Config{InsecureSkipVerify: true, Certificates: own, MinVersion: tls.VersionTLS12}
}

// forged is a certificate for a good SPIFFE ID, which a stranger has issued.
func forged() tls.Certificate {
	a, err := newAuthority("example.org", time.Hour)
	if err != nil {
		return tls.Certificate{}
	}
	answer, err := a.issue(&url.URL{Scheme: "spiffe", Host: a.domain, Path: "/ns/red/pod/lb-8"})
	if err != nil {
		return tls.Certificate{}
	}
	svid := answer.GetSvids()[0]
	key, err := x509.ParsePKCS8PrivateKey(svid.GetX509SvidKey())
	if err != nil {
		return tls.Certificate{}
	}
	return tls.Certificate{Certificate: [][]byte{svid.GetX509Svid()}, PrivateKey: key}
}

// deadSocket is a socket whose server has gone: its URL and its file.
func deadSocket() (string, string) {
	path := filepath.Join(os.Getenv("INTEROP_DIR"), "dead.sock")
	if listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"}); err == nil {
		listener.SetUnlinkOnClose(false)
		_ = listener.Close()
	}
	inode, err := grpcfd.FilenameToURL(path)
	if err != nil {
		return "", ""
	}
	return inode.String(), path
}
