package main

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"time"

	spiretools "github.com/networkservicemesh/sdk/pkg/tools/spire"
	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
)

// openFiles is how many more descriptors than at first the daemon may have:
// single connections of gRPC come and go.
const openFiles = 6

// leased are addresses of IPAM's. An orderly stop of the daemon gives those of its
// connections to load balancers back, and its successor asks for all at once, so
// that they may get each other's: their number is compared, and whose they are.
var leased = regexp.MustCompile(`(172\.16\.0\.|fd00::)[0-9a-f]+/[0-9]+`)

// rest is what exists while nothing changes. With the same load balancers and
// targets it is the same, whatever has happened in between.
type rest struct {
	// what is compared, by where it is
	things map[string]string
	// descriptors of the daemon
	files int
	// sums, for the table
	links, leases, streams, pairs int
}

// rest looks at all pods, IPAM, nsmgr, the forwarder and the daemon.
func (l *lab) rest() (*rest, error) {
	now := &rest{things: map[string]string{}}
	for pod, ns := range l.pods() {
		if pod == "client" {
			// It has a link of our own to each LB that there ever was.
			continue
		}
		links, text, err := inventory(ns)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", pod, err)
		}
		now.links += links
		if _, isLB := l.lbs[pod]; isLB {
			text = leased.ReplaceAllString(text, "leased")
		}
		now.things["pod "+pod] = text
	}
	ask := func(part, what string) ([]string, error) {
		line, err := l.parts[part].ask(5*time.Second, what)
		if err != nil {
			return nil, err
		}
		words := strings.Fields(line)[1:]
		slices.Sort(words)
		now.things[what+" of "+part] = strings.Join(words, " ")
		return words, nil
	}
	leases, err := ask("services", "leases")
	if err != nil {
		return nil, err
	}
	now.leases = len(leases)
	for i, lease := range leases {
		if child, _, _ := strings.Cut(lease, "="); strings.Contains(child, ".red-lb-") {
			leases[i] = child
		}
	}
	now.things["leases of services"] = strings.Join(leases, " ")
	streams, err := ask("nsmgr", "streams")
	if err != nil {
		return nil, err
	}
	for _, word := range streams {
		var count int
		if _, err := fmt.Sscanf(word[strings.LastIndex(word, "=")+1:], "%d", &count); err == nil {
			now.streams += count
		}
	}
	pairs, err := ask("forwarder", "pairs")
	if err != nil {
		return nil, err
	}
	now.pairs = len(pairs)
	files, err := os.ReadDir(filepath.Join("/proc", fmt.Sprint(l.parts["proxy"].cmd.Process.Pid), "fd"))
	now.files = len(files)
	return now, err
}

func (r *rest) String() string {
	return fmt.Sprintf("%d links, %d leases, %d streams, %d pairs, %d descriptors",
		r.links, r.leases, r.streams, r.pairs, r.files)
}

// differs says in what it is not like an earlier one.
func (r *rest) differs(before *rest) string {
	var lines []string
	for _, where := range slices.Sorted(maps.Keys(before.things)) {
		if was, is := before.things[where], r.things[where]; was != is {
			lines = append(lines, fmt.Sprintf("%s: %q instead of %q", where, is, was))
		}
	}
	if r.files > before.files+openFiles {
		lines = append(lines, fmt.Sprintf("%d descriptors after %d", r.files, before.files))
	}
	return strings.Join(lines, "; ")
}

// nothingLeft waits until all is as before.
func (l *lab) nothingLeft(r *report, after string, before *rest) {
	if before == nil || l.ctx.Err() != nil {
		return
	}
	begun, line := time.Now(), result{Step: "nothing left after " + after}
	for {
		now, err := l.rest()
		text := ""
		if err != nil {
			text = err.Error()
		} else {
			text = now.differs(before)
			line.Note = now.String()
		}
		if text == "" {
			line.Took = time.Since(begun).Round(10 * time.Millisecond).String()
			break
		}
		if time.Since(begun) > 90*time.Second {
			line.Failed = text
			l.dump(line.Step)
			break
		}
		time.Sleep(200 * time.Millisecond)
	}
	r.add(line)
}

// pods are all namespaces of the node.
func (l *lab) pods() map[string]netns.NsHandle {
	pods := map[string]netns.NsHandle{"proxy": l.pod, "client": l.client, "node": l.base}
	for name, pod := range l.lbs {
		pods[name] = pod.ns
	}
	for name, pod := range l.targets {
		pods[name] = pod.ns
	}
	return pods
}

// inventory of a namespace: how many interfaces there are, and which addresses.
func inventory(ns netns.NsHandle) (int, string, error) {
	nl, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return 0, "", err
	}
	defer nl.Close()
	links, err := nl.LinkList()
	if err != nil {
		return 0, "", err
	}
	addresses, err := nl.AddrList(nil, netlink.FAMILY_ALL)
	if err != nil {
		return 0, "", err
	}
	var texts []string
	for _, address := range addresses {
		if address.Scope == unix.RT_SCOPE_UNIVERSE {
			texts = append(texts, address.IPNet.String())
		}
	}
	slices.Sort(texts)
	return len(links), fmt.Sprintf("%d links, %s", len(links), strings.Join(texts, " ")), nil
}

func linksOf(ns netns.NsHandle) ([]netlink.Link, error) {
	nl, err := netlink.NewHandleAt(ns, unix.NETLINK_ROUTE)
	if err != nil {
		return nil, err
	}
	defer nl.Close()
	return nl.LinkList()
}

// isConnection says whether a forwarder made the interface.
func isConnection(link netlink.Link) bool {
	alias := link.Attrs().Alias
	return strings.HasPrefix(alias, "client-") || strings.HasPrefix(alias, "server-")
}

// indexes are the interfaces of all pods: none was made anew while they stay
// the same.
func (l *lab) indexes() (string, error) {
	var texts []string
	for pod, ns := range l.pods() {
		links, err := linksOf(ns)
		if err != nil {
			return "", err
		}
		for _, link := range links {
			texts = append(texts, fmt.Sprintf("%s/%s/%d", pod, link.Attrs().Name, link.Attrs().Index))
		}
	}
	slices.Sort(texts)
	return strings.Join(texts, " "), nil
}

// openStreams counts the server's streams that are open, by peer and method.
type openStreams struct {
	mu    sync.Mutex
	count map[string]int
}

func (o *openStreams) intercept(server any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	key := peerName(stream.Context()) + info.FullMethod
	o.add(key, 1)
	defer o.add(key, -1)
	return handler(server, stream)
}

func (o *openStreams) add(key string, change int) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.count[key] += change
	if o.count[key] == 0 {
		delete(o.count, key)
	}
}

// of tells the streams of one peer.
func (o *openStreams) of(peer string) string {
	o.mu.Lock()
	defer o.mu.Unlock()
	text := "streams"
	for key, count := range o.count {
		if strings.HasPrefix(key, peer+"/") {
			text += fmt.Sprintf(" %s=%d", key, count)
		}
	}
	return text
}

// peerName is the end of the SPIFFE ID that the peer has shown.
func peerName(ctx context.Context) string {
	id, err := spiretools.PeerSpiffeIDFromContext(ctx)
	if err != nil {
		return "unknown"
	}
	return filepath.Base(id.Path())
}
