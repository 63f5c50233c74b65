package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/vishvananda/netns"
)

// result is one line of the table.
type result struct {
	Title  string `json:"title,omitempty"`
	Step   string `json:"step"`
	Took   string `json:"took,omitempty"`
	Loss   string `json:"loss,omitempty"`
	Note   string `json:"note,omitempty"`
	Failed string `json:"failed,omitempty"`
}

type report struct {
	title   string
	results []result
}

func (r *report) add(step result) {
	step.Title = r.title
	r.results = append(r.results, step)
	text, _ := json.Marshal(step)
	fmt.Println(string(text))
}

func (r *report) failed() int {
	failed := 0
	for _, step := range r.results {
		if step.Failed != "" {
			failed++
		}
	}
	return failed
}

func runScenarios(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("run", flag.ContinueOnError)
	daemon := flags.String("daemon", "target/debug/proxy", "the daemon")
	services := flags.String("services", "target/debug/services", "IPAM and NSP of the lab")
	probe := flags.String("probe", "", "grpc-health-probe")
	spireBin := flags.String("spire", "", "where spire-server and spire-agent are; empty: the in-process authority")
	title := flags.String("title", "", "stands in every line of the table")
	keep := flags.Bool("keep", false, "keep the logs")
	long := flags.Bool("long", false, "30 s tokens, SVIDs of 2 min, and five minutes of them instead of restarts")
	if err := flags.Parse(args); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("/var/tmp", "interop-")
	if err != nil {
		return err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	l, err := newLab(ctx, dir)
	if err != nil {
		return err
	}
	l.daemon, _ = filepath.Abs(*daemon)
	l.services, _ = filepath.Abs(*services)
	l.probe = *probe
	l.vips = []string{"20.0.0.1", "2000::1"}
	if *long {
		l.tokens, l.ttl = "30s", 2*time.Minute
	}
	if *spireBin != "" {
		l.spire = &spire{bin: *spireBin, dir: l.path("spire"), ttl: max(l.ttl, time.Minute)}
	}
	defer l.stop()
	r := &report{title: *title}
	err = l.scenario(r, *long)
	if err == nil && !*keep {
		_ = os.RemoveAll(dir)
	} else {
		fmt.Println("logs:", dir)
	}
	if failed := r.failed(); err == nil && failed > 0 {
		err = fmt.Errorf("%d steps failed", failed)
	}
	return err
}

// step runs one change and waits until the next hops and the traffic are as
// they should be; what was lost from the change on is in the table.
func (l *lab) step(r *report, name string, hops int, limit time.Duration, change func() error) {
	if l.ctx.Err() != nil {
		return
	}
	begun := time.Now()
	line := result{Step: name}
	err := change()
	if err == nil && hops >= 0 {
		_, err = l.waitHops(hops, limit)
		line.Took = time.Since(begun).Round(10 * time.Millisecond).String()
	}
	if err == nil && len(l.traffic.flows) > 0 {
		if _, err = l.traffic.settled(time.Now(), limit); err == nil {
			line.Loss = l.traffic.loss(begun, time.Now()).String()
		}
	}
	if err != nil {
		line.Failed = err.Error()
		l.dump(name)
	}
	r.add(line)
}

func (l *lab) scenario(r *report, long bool) error {
	identity := l.startAuthority
	if l.spire != nil {
		identity = l.startSpire
	}
	if err := identity(); err != nil {
		return err
	}
	for _, start := range []func() error{l.startRegistry, l.startNsmgr, l.startForwarder, l.startServices, l.foreignService, l.startDaemon} {
		if err := start(); err != nil {
			return err
		}
	}
	l.step(r, "two LBs appear", 2, 30*time.Second, func() error {
		for _, name := range []string{"lb-1", "lb-2"} {
			if err := l.startLB(name); err != nil {
				return err
			}
			if err := l.activate(name, true); err != nil {
				return err
			}
		}
		return nil
	})
	l.step(r, "probes", 2, 30*time.Second, l.probes)
	l.step(r, "what nsmgr refuses", 2, 30*time.Second, func() error { return l.refusals(r) })
	l.step(r, "two targets connect", 2, 30*time.Second, func() error {
		for _, name := range []string{"target-1", "target-2"} {
			if err := l.startTarget(name); err != nil {
				return err
			}
			if err := l.connectTarget(name); err != nil {
				return err
			}
		}
		return nil
	})
	if r.failed() > 0 {
		return fmt.Errorf("no mesh to go on with")
	}
	l.step(r, "traffic both ways", 2, 20*time.Second, func() error {
		if err := l.traffic.add(l.vips[0], source4, 16); err != nil {
			return err
		}
		return l.traffic.add(l.vips[1], source6, 16)
	})
	one, _ := l.carried("lb-1")
	two, _ := l.carried("lb-2")
	r.add(result{Step: "balanced", Note: fmt.Sprintf("lb-1 %d, lb-2 %d packets; targets %v", one, two, l.traffic.by())})
	if long {
		for i := range 5 {
			l.later(r, fmt.Sprintf("minute %d of refresh and rotation", i+1), time.Minute)
		}
		l.step(r, "rotations", 2, 10*time.Second, func() error { return l.rotated(5) })
		return nil
	}
	return l.changes(r)
}

// dump writes the kernel's state of all pods beside the logs.
func (l *lab) dump(name string) {
	pods := map[string]netns.NsHandle{"proxy": l.pod, "client": l.client}
	for name, pod := range l.lbs {
		pods[name] = pod.ns
	}
	for name, pod := range l.targets {
		pods[name] = pod.ns
	}
	file, err := os.OpenFile(l.path("log", "dump.txt"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return
	}
	defer func() { _ = file.Close() }()
	for pod, ns := range pods {
		fmt.Fprintf(file, "== %s: %s\n", name, pod)
		_ = in(ns, func() error {
			script := "ip -d link; ip addr; ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; ip neigh"
			out, err := exec.Command("sh", "-c", script).CombinedOutput()
			_, _ = file.Write(out)
			return err
		})
	}
}

// refusals makes every mistake of the table.
func (l *lab) refusals(r *report) error {
	ns, err := newNS()
	if err != nil {
		return err
	}
	p, err := l.own("lb-8", ns, []string{"refusals"})
	if err != nil {
		return err
	}
	_, err = p.line("done", 90*time.Second)
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, line := range p.lines {
		if strings.HasPrefix(line, "refusal | ") {
			r.add(result{Step: "refusal", Note: strings.TrimPrefix(line, "refusal | ")})
		}
	}
	return err
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

// probes asks the real grpc-health-probe.
func (l *lab) probes() error {
	if l.probe == "" {
		return fmt.Errorf("no grpc-health-probe given")
	}
	for _, service := range []string{"", "Readiness", "Liveness"} {
		deadline := time.Now().Add(20 * time.Second)
		for {
			out, err := exec.Command(l.probe, "-addr=unix://"+l.path("tmp", "health.sock"),
				"-service="+service, "-connect-timeout=400ms", "-rpc-timeout=400ms").CombinedOutput()
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("grpc-health-probe %q: %w: %s", service, err, out)
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
	return nil
}

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
		return l.restartLB("lb-1", limit)
	})
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
	l.restart(r, "registry", l.startRegistry)
	l.restart(r, "nsmgr", l.startNsmgr)
	l.restart(r, "forwarder", l.startForwarder)
	if l.spire != nil {
		l.restart(r, "spire-agent", func() error { return l.startAgent("") })
	}
	for how, stop := range map[string]func() error{
		"SIGTERM": func() error { return l.parts["proxy"].terminate(30 * time.Second) },
		"SIGKILL": func() error { l.parts["proxy"].kill(); return nil },
	} {
		l.step(r, "the daemon restarts ("+how+")", 2, 60*time.Second, func() error {
			if err := stop(); err != nil {
				return err
			}
			return l.startDaemon()
		})
		l.later(r, "30 s after the daemon's restart ("+how+")", 30*time.Second)
	}
	return nil
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
