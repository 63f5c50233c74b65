package main

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const (
	trafficPort = 5000
	pace        = 20 * time.Millisecond
	// answerTime is how long an answer may take.
	answerTime = 500 * time.Millisecond
)

// flow is one UDP socket; packet n has the time in sent[n].
type flow struct {
	mu       sync.Mutex
	vip      string
	sent     []time.Time
	answered []bool
	by       map[string]int
	end      chan struct{}
}

// traffic is steady: each flow sends a packet every 20 ms.
type traffic struct {
	client netns.NsHandle
	mu     sync.Mutex
	flows  []*flow
	ctx    context.Context
}

func (t *traffic) add(vip, source string, flows int) error {
	for range flows {
		var conn net.Conn
		err := in(t.client, func() error {
			dialer := net.Dialer{
				LocalAddr: &net.UDPAddr{IP: net.ParseIP(source)},
				Control:   func(_, _ string, raw syscall.RawConn) error { return raw.Control(roomy) },
			}
			var err error
			conn, err = dialer.Dial("udp", net.JoinHostPort(vip, fmt.Sprint(trafficPort)))
			return err
		})
		if err != nil {
			return err
		}
		f := &flow{vip: vip, by: map[string]int{}, end: make(chan struct{})}
		t.mu.Lock()
		t.flows = append(t.flows, f)
		t.mu.Unlock()
		go f.send(t.ctx, conn)
		go f.receive(conn)
	}
	return nil
}

// stop ends all flows.
func (t *traffic) stop() {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, f := range t.flows {
		close(f.end)
	}
	t.flows = nil
}

func (f *flow) send(ctx context.Context, conn net.Conn) {
	defer func() { _ = conn.Close() }()
	ticks := time.NewTicker(pace)
	defer ticks.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-f.end:
			return
		case now := <-ticks.C:
			f.mu.Lock()
			number := len(f.sent)
			f.sent = append(f.sent, now)
			f.answered = append(f.answered, false)
			f.mu.Unlock()
			packet := binary.BigEndian.AppendUint64(nil, uint64(number))
			_, _ = conn.Write(packet)
		}
	}
}

func (f *flow) receive(conn net.Conn) {
	buffer := make([]byte, 256)
	for {
		n, err := conn.Read(buffer)
		if err != nil {
			if isClosed(err) {
				return
			}
			// An ICMP error for an earlier packet, which counts as lost.
			continue
		}
		if n < 8 {
			continue
		}
		number := binary.BigEndian.Uint64(buffer)
		f.mu.Lock()
		if number < uint64(len(f.answered)) {
			f.answered[number] = true
			f.by[string(buffer[8:n])]++
		}
		f.mu.Unlock()
	}
}

// loss of the packets that were sent in a period, and the longest time in
// which no packet of one flow was answered. Waits for the last answers.
type loss struct {
	sent, lost int
	gap        time.Duration
}

func (l loss) String() string {
	return fmt.Sprintf("%d of %d lost, longest gap %v", l.lost, l.sent, l.gap.Round(10*time.Millisecond))
}

func (t *traffic) loss(from, to time.Time) loss {
	time.Sleep(time.Until(to.Add(answerTime)))
	t.mu.Lock()
	defer t.mu.Unlock()
	var result loss
	for _, f := range t.flows {
		f.mu.Lock()
		var begin time.Time
		for number, sent := range f.sent {
			if sent.Before(from) || !sent.Before(to) {
				continue
			}
			result.sent++
			if f.answered[number] {
				begin = time.Time{}
				continue
			}
			result.lost++
			if begin.IsZero() {
				begin = sent
			}
			result.gap = max(result.gap, sent.Sub(begin)+pace)
		}
		f.mu.Unlock()
	}
	return result
}

// settled waits until every flow has been answered without loss for a second
// that began after `since`; returns when the last lost packet was sent.
func (t *traffic) settled(since time.Time, limit time.Duration) (time.Time, error) {
	const quiet = time.Second
	deadline := time.Now().Add(limit)
	for {
		end := time.Now().Add(-answerTime)
		last, where := t.lastLost(end)
		if last.Before(since) {
			last = since
		}
		if end.Sub(last) > quiet {
			return last, nil
		}
		if time.Now().After(deadline) {
			return last, fmt.Errorf("not answered after %v: %s", limit, where)
		}
		time.Sleep(50 * time.Millisecond)
	}
}

// lastLost says when the last packet was sent that got no answer, and to which
// VIPs packets of the last second were lost.
func (t *traffic) lastLost(end time.Time) (time.Time, string) {
	t.mu.Lock()
	defer t.mu.Unlock()
	last, lost := time.Time{}, map[string]int{}
	for _, f := range t.flows {
		f.mu.Lock()
		for number := len(f.sent) - 1; number >= 0; number-- {
			sent := f.sent[number]
			if sent.Before(end.Add(-2 * time.Second)) {
				break
			}
			if sent.After(end) || f.answered[number] {
				continue
			}
			if sent.After(last) {
				last = sent
			}
			if sent.After(end.Add(-time.Second)) {
				lost[f.vip]++
			}
		}
		f.mu.Unlock()
	}
	return last, fmt.Sprint(lost)
}

// by says which targets answered how many packets.
func (t *traffic) by() map[string]int {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := map[string]int{}
	for _, f := range t.flows {
		f.mu.Lock()
		for name, count := range f.by {
			all[name] += count
		}
		f.mu.Unlock()
	}
	return all
}

// echo answers at a VIP in a target's namespace, also before the VIP is there.
func echo(ns netns.NsHandle, vip, name string) (net.PacketConn, error) {
	config := net.ListenConfig{Control: func(_, _ string, raw syscall.RawConn) error {
		var result error
		err := raw.Control(func(fd uintptr) {
			roomy(fd)
			if net.ParseIP(vip).To4() != nil {
				result = unix.SetsockoptInt(int(fd), unix.SOL_IP, unix.IP_FREEBIND, 1)
			} else {
				result = unix.SetsockoptInt(int(fd), unix.SOL_IPV6, unix.IPV6_FREEBIND, 1)
			}
		})
		if err != nil {
			return err
		}
		return result
	}}
	var conn net.PacketConn
	err := in(ns, func() error {
		var err error
		conn, err = config.ListenPacket(context.Background(), "udp", net.JoinHostPort(vip, fmt.Sprint(trafficPort)))
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("echo at %s: %w", vip, err)
	}
	go func() {
		buffer := make([]byte, 256)
		for {
			n, from, err := conn.ReadFrom(buffer)
			if isClosed(err) {
				return
			}
			if err == nil && n >= 8 {
				_, _ = conn.WriteTo(append(buffer[:8:8], name...), from)
			}
		}
	}()
	return conn, nil
}

// room of a socket for packets that wait while this process does not run. What the
// kernel drops for want of it would count as lost on the way.
const room = 8 << 20

// roomy gives a socket that room, or what may be had without privilege.
func roomy(fd uintptr) {
	if unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUFFORCE, room) != nil {
		_ = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_RCVBUF, room)
	}
}

func isClosed(err error) bool { return errors.Is(err, net.ErrClosed) }
