package main

import (
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netlink"
)

// changes is what happens to a running mesh.
func (l *lab) changes(r *report) error {
	const limit = 30 * time.Second
	l.step(r, "a VIP is added", 2, limit, func() error {
		l.vips = append(l.vips, "20.0.0.2")
		if err := l.tellVIPs(); err != nil {
			return err
		}
		for name := range l.targets {
			if err := l.setVIPs(name); err != nil {
				return err
			}
		}
		if err := l.spread(); err != nil {
			return err
		}
		return l.tellLBs()
	})
	l.step(r, "traffic to the added VIP", 2, limit, func() error {
		return l.traffic.add("20.0.0.2", source4, 8)
	})
	before, err := l.rest()
	if err != nil {
		return err
	}
	r.add(result{Step: "what is there with two LBs and two targets", Note: before.String()})
	l.step(r, "a third LB joins", 3, limit, func() error {
		if err := l.startLB("lb-3"); err != nil {
			return err
		}
		if _, err := l.waitHops(3, limit); err != nil {
			return err
		}
		if err := l.activate("lb-3", true); err != nil {
			return err
		}
		return l.tellLBs()
	})
	l.step(r, "an LB unregisters", 2, limit, func() error {
		if err := l.activate("lb-3", false); err != nil {
			return err
		}
		return l.parts["lb-3"].terminate(5 * time.Second)
	})
	l.step(r, "an LB dies", 1, 90*time.Second, func() error {
		if err := l.activate("lb-2", false); err != nil {
			return err
		}
		l.parts["lb-2"].kill()
		return nil
	})
	l.step(r, "the dead LB comes back", 2, 90*time.Second, func() error { return l.restartLB("lb-2", limit) })
	l.step(r, "an LB's process restarts", 2, 90*time.Second, func() error {
		if err := l.activate("lb-1", false); err != nil {
			return err
		}
		l.parts["lb-1"].kill()
		// Or it would be given traffic by way of what is about to be rebuilt.
		if _, err := l.waitHops(1, limit); err != nil {
			return err
		}
		return l.restartLB("lb-1", limit)
	})
	l.nothingLeft(r, "the LBs' changes", before)
	l.step(r, "a target closes", 2, limit, func() error {
		l.targets["target-2"].known = false
		if err := l.tellLBs(); err != nil {
			return err
		}
		return l.parts["target-2"].command(20*time.Second, "close")
	})
	l.step(r, "the target connects again", 2, limit, func() error { return l.connectTarget("target-2") })
	l.step(r, "a target is killed and recovers", 2, limit, func() error {
		before := fmt.Sprint(l.targets["target-2"].addresses)
		l.parts["target-2"].kill()
		if err := l.startTarget("target-2"); err != nil {
			return err
		}
		if err := l.connectTarget("target-2"); err != nil {
			return err
		}
		if after := fmt.Sprint(l.targets["target-2"].addresses); after != before {
			return fmt.Errorf("addresses %s instead of %s", after, before)
		}
		return nil
	})
	l.nothingLeft(r, "the targets' changes", before)
	l.restartIPAM(r)
	l.nothingLeft(r, "IPAM's restart", before)
	l.restartNSP(r)
	l.nothingLeft(r, "NSP's restart", before)
	l.restart(r, "registry", func() error {
		if err := l.startRegistry(); err != nil {
			return err
		}
		// It has forgotten everything, and nsmgr lets nobody but the first one
		// register the service anew: the proxy of the other node does.
		return l.foreignService()
	})
	l.nothingLeft(r, "the registry's restart", before)
	l.restart(r, "nsmgr", l.startNsmgr)
	l.nothingLeft(r, "the nsmgr's restart", before)
	l.restart(r, "forwarder", l.startForwarder)
	l.nothingLeft(r, "the forwarder's restart", before)
	if l.spire != nil {
		l.restart(r, "spire-agent", func() error { return l.startAgent("") })
		l.nothingLeft(r, "the spire-agent's restart", before)
	}
	l.restartDaemon(r, "SIGTERM", before, func() error { return l.parts["proxy"].terminate(30 * time.Second) })
	l.restartDaemon(r, "SIGKILL", before, func() error { l.parts["proxy"].kill(); return nil })
	return l.farewell(r)
}

func (l *lab) restartDaemon(r *report, how string, before *rest, stop func() error) {
	old, _ := l.ofLBs()
	l.step(r, "the daemon restarts ("+how+")", 2, 60*time.Second, func() error {
		if err := stop(); err != nil {
			return err
		}
		return l.startDaemon()
	})
	period := 30 * time.Second
	if l.short {
		period = 20 * time.Second
	}
	l.later(r, fmt.Sprintf("%v after the daemon's restart (%s)", period, how), period)
	l.nothingLeft(r, "the daemon's restart ("+how+")", before)
	now, err := l.ofLBs()
	kept := slices.DeleteFunc(now, func(link string) bool { return !slices.Contains(old, link) })
	line := result{Step: "interfaces to LBs that were taken over (" + how + ")", Note: fmt.Sprintf("%d of %d", len(kept), len(old))}
	if err != nil {
		line.Failed = err.Error()
	}
	r.add(line)
}

// ofLBs are the interfaces of connections in the load balancers' pods.
func (l *lab) ofLBs() ([]string, error) {
	var found []string
	for name, pod := range l.lbs {
		links, err := linksOf(pod.ns)
		if err != nil {
			return nil, err
		}
		for _, link := range links {
			if isConnection(link) {
				found = append(found, fmt.Sprintf("%s/%d", name, link.Attrs().Index))
			}
		}
	}
	return found, nil
}

// restartIPAM ends IPAM's server for a while, in which nothing is lost; after
// it a target's addresses can be had again. Its table stays, as the real one's
// database does.
func (l *lab) restartIPAM(r *report) {
	l.step(r, "IPAM restarts", 2, 30*time.Second, func() error { return l.restartService("ipam") })
	l.step(r, "a target closes and connects with the new IPAM", 2, 30*time.Second, func() error {
		before := slices.Clone(l.targets["target-2"].addresses)
		l.targets["target-2"].known = false
		if err := l.tellLBs(); err != nil {
			return err
		}
		if err := l.parts["target-2"].command(20*time.Second, "close"); err != nil {
			return err
		}
		if err := l.connectTarget("target-2"); err != nil {
			return err
		}
		if after := l.targets["target-2"].addresses; !slices.Equal(after, before) {
			return fmt.Errorf("addresses %v instead of %v", after, before)
		}
		return nil
	})
}

// restartNSP ends NSP's server for a while; the VIP that comes and the one that
// goes meanwhile are told by the new one.
func (l *lab) restartNSP(r *report) {
	const vip = "20.0.0.9"
	told := l.vips
	defer func() { l.vips = told }()
	for _, vips := range [][]string{append(slices.Clone(told), vip), told} {
		name := "NSP restarts, a VIP is gone"
		if len(vips) > len(told) {
			name = "NSP restarts, with one VIP more"
		}
		l.step(r, name, 2, 30*time.Second, func() error {
			l.vips = vips
			if err := l.parts["services"].command(5*time.Second, "stop", "nsp"); err != nil {
				return err
			}
			if err := l.tellVIPs(); err != nil {
				return err
			}
			time.Sleep(time.Second)
			if err := l.parts["services"].command(5*time.Second, "start", "nsp"); err != nil {
				return err
			}
			return l.waitRule(vip, slices.Contains(vips, vip), 30*time.Second)
		})
	}
}

func (l *lab) restartService(name string) error {
	if err := l.parts["services"].command(5*time.Second, "stop", name); err != nil {
		return err
	}
	time.Sleep(time.Second)
	return l.parts["services"].command(5*time.Second, "start", name)
}

// waitRule waits until the daemon routes a VIP, or does so no more.
func (l *lab) waitRule(vip string, wanted bool, limit time.Duration) error {
	deadline := time.Now().Add(limit)
	for {
		rules, err := l.podNL.RuleList(netlink.FAMILY_V4)
		if err != nil {
			return err
		}
		found := slices.ContainsFunc(rules, func(rule netlink.Rule) bool {
			return rule.Src != nil && rule.Src.IP.String() == vip
		})
		if found == wanted {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("rule of %s: there is %v instead of %v after %v", vip, found, wanted, limit)
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// farewell closes all in good order: nothing of the daemon's is left but what
// it leaves on purpose.
func (l *lab) farewell(r *report) error {
	l.traffic.stop()
	if err := l.ctx.Err(); err != nil {
		return err
	}
	line := result{Step: "all close, then the daemon stops"}
	err := func() error {
		for name := range l.targets {
			if err := l.parts[name].command(25*time.Second, "close"); err != nil {
				return err
			}
		}
		return l.parts["proxy"].terminate(30 * time.Second)
	}()
	deadline := time.Now().Add(30 * time.Second)
	for err == nil {
		var left string
		if left, err = l.leftBehind(); err != nil || left == "" {
			break
		}
		if time.Now().After(deadline) {
			err = fmt.Errorf("left behind: %s", left)
		}
		time.Sleep(200 * time.Millisecond)
	}
	if err != nil {
		line.Failed = err.Error()
		l.dump(line.Step)
	}
	r.add(line)
	return nil
}

// leftBehind names what is there after the end of all connections and should
// not be.
func (l *lab) leftBehind() (string, error) {
	var left []string
	for part, what := range map[string]string{"nsmgr": "streams", "forwarder": "pairs"} {
		line, err := l.parts[part].ask(5*time.Second, what)
		if err != nil {
			return "", err
		}
		if line != what && line != what+" " {
			left = append(left, line)
		}
	}
	line, err := l.parts["services"].ask(5*time.Second, "leases")
	if err != nil {
		return "", err
	}
	for _, lease := range strings.Fields(line)[1:] {
		if !strings.HasPrefix(lease, "bridge=") {
			left = append(left, "lease "+lease)
		}
	}
	for pod, ns := range l.pods() {
		links, err := linksOf(ns)
		if err != nil {
			return "", err
		}
		for _, link := range links {
			if isConnection(link) {
				left = append(left, fmt.Sprintf("interface %s of %s (%s)", link.Attrs().Name, pod, link.Attrs().Alias))
			}
		}
	}
	return strings.Join(left, ", "), nil
}

// restartLB starts the process again in the namespace where it was, and gives
// it flows when it is a next hop.
func (l *lab) restartLB(name string, limit time.Duration) error {
	if err := l.startLB(name); err != nil {
		return err
	}
	if _, err := l.waitHops(2, limit); err != nil {
		return err
	}
	if err := l.activate(name, true); err != nil {
		return err
	}
	return l.tellLBs()
}

// restart kills a part of the mesh and starts it a second later.
func (l *lab) restart(r *report, name string, start func() error) {
	l.step(r, "the "+name+" restarts", 2, 90*time.Second, func() error {
		l.parts[name].kill()
		time.Sleep(time.Second)
		return start()
	})
	// What a peer does only later (refresh, expiry) belongs to this restart; a
	// forwarder is found again after the longest time, up to 45 s.
	period := 20 * time.Second
	if name == "forwarder" {
		period = time.Minute
	}
	if l.short {
		period = 10 * time.Second
	}
	l.later(r, fmt.Sprintf("%v after the %s's restart", period, name), period)
}

// later looks at the traffic of a period in which nothing is done.
func (l *lab) later(r *report, name string, period time.Duration) {
	l.step(r, name, 2, 90*time.Second, func() error {
		select {
		case <-time.After(period):
		case <-l.ctx.Done():
		}
		return nil
	})
}
