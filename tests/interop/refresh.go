package main

import (
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"
)

// fiveMinutes of refresh and rotation, in which nothing else happens.
func (l *lab) fiveMinutes(r *report) error {
	before, err := l.rest()
	if err != nil {
		return err
	}
	interfaces, err := l.indexes()
	if err != nil {
		return err
	}
	routeless, err := l.routeless()
	if err != nil {
		return err
	}
	begun := time.Now()
	for i := range 5 {
		l.later(r, fmt.Sprintf("minute %d of refresh and rotation", i+1), time.Minute)
	}
	l.step(r, "no interface was made anew", 2, 10*time.Second, func() error {
		now, err := l.indexes()
		if err == nil && now != interfaces {
			err = fmt.Errorf("interfaces %s instead of %s", now, interfaces)
		}
		return err
	})
	l.step(r, "every refresh of the targets succeeded", 2, 10*time.Second, func() error {
		for name := range l.targets {
			if err := l.refreshed(name, 20); err != nil {
				return err
			}
		}
		return nil
	})
	l.step(r, "every refresh of the daemon succeeded", 2, 10*time.Second, func() error { return l.daemonRefreshed(40) })
	l.step(r, "rotations", 2, 10*time.Second, func() error { return l.rotated(5) })
	r.add(l.attributed(l.traffic.loss(begun, time.Now()), routeless))
	l.nothingLeft(r, "five minutes", before)
	return l.farewell(r)
}

// attributed is the loss of the five minutes: there must be none. Where there is,
// the kernels' counters of packets without a route help to find it.
func (l *lab) attributed(lost loss, before map[string]int) result {
	line := result{Step: "the flows of five minutes", Loss: lost.String()}
	if lost.lost == 0 {
		return line
	}
	line.Failed = lost.String()
	after, err := l.routeless()
	if err != nil {
		line.Note = err.Error()
		return line
	}
	for _, name := range slices.Sorted(maps.Keys(after)) {
		line.Failed += fmt.Sprintf(", %s had no route for %d", name, after[name]-before[name])
	}
	return line
}

// routeless is how many IPv6 packets the kernel had no route for, by pod.
func (l *lab) routeless() (map[string]int, error) {
	counts := map[string]int{}
	names := append(slices.Collect(maps.Keys(l.lbs)), "proxy")
	for _, name := range slices.AppendSeq(names, maps.Keys(l.targets)) {
		part, ok := l.parts[name]
		if !ok {
			continue
		}
		text, err := os.ReadFile(fmt.Sprintf("/proc/%d/net/snmp6", part.cmd.Process.Pid))
		if err != nil {
			return nil, err
		}
		fields := strings.Fields(string(text))
		for i := 0; i+1 < len(fields); i += 2 {
			if fields[i] != "Ip6InNoRoutes" && fields[i] != "Ip6OutNoRoutes" {
				continue
			}
			count, err := strconv.Atoi(fields[i+1])
			if err != nil {
				return nil, fmt.Errorf("%s of %s: %w", fields[i], name, err)
			}
			counts[name] += count
		}
	}
	return counts, nil
}

// refreshed checks that a target has sent at least so many Requests, and that
// all of them succeeded.
func (l *lab) refreshed(name string, least int) error {
	line, err := l.parts[name].ask(5*time.Second, "requests")
	if err != nil {
		return err
	}
	var good, bad int
	if _, err := fmt.Sscanf(line, "requests %d %d", &good, &bad); err != nil {
		return fmt.Errorf("%s: %q: %w", name, line, err)
	}
	if good < least || bad > 0 {
		return fmt.Errorf("%s: %d Requests succeeded and %d failed, wanted %d and none", name, good, bad, least)
	}
	return nil
}

// daemonRefreshed checks the same of the daemon, by its log.
func (l *lab) daemonRefreshed(least int) error {
	log, err := os.ReadFile(l.path("log", "proxy.log"))
	if err != nil {
		return err
	}
	good := 0
	for line := range strings.Lines(string(log)) {
		if strings.Contains(line, `"message":"request: refresh"`) {
			good++
		}
		if strings.Contains(line, `"message":"Request failed`) {
			return fmt.Errorf("a Request failed: %s", strings.TrimSpace(line))
		}
	}
	if good < least {
		return fmt.Errorf("%d refreshes, not %d", good, least)
	}
	return nil
}

// rotated checks that the daemon got that many new identities.
func (l *lab) rotated(least int) error {
	log, err := os.ReadFile(l.path("log", "proxy.log"))
	if err != nil {
		return err
	}
	if seen := strings.Count(string(log), `"message":"new SVID"`); seen <= least {
		return fmt.Errorf("%d identities, not more than %d", seen, least)
	}
	return nil
}
