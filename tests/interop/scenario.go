package main

import (
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"
)

// result is one line of the table.
type result struct {
	Title  string `json:"title,omitempty"`
	Step   string `json:"step"`
	Took   string `json:"took,omitempty"`
	Loss   string `json:"loss,omitempty"`
	Note   string `json:"note,omitempty"`
	Failed string `json:"failed,omitempty"`
	// a mistake, and what the real nsmgr and the lab's answer to it
	Call    string `json:"call,omitempty"`
	Mistake string `json:"mistake,omitempty"`
	Real    string `json:"real,omitempty"`
	Lab     string `json:"lab,omitempty"`
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
	short := flags.Bool("short", false, "look at the time after a restart for a shorter while")
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
	l.probe, l.short = *probe, *short
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
		return l.fiveMinutes(r)
	}
	return l.changes(r)
}

// dump writes the kernel's state of all pods beside the logs.
func (l *lab) dump(name string) {
	file, err := os.OpenFile(l.path("log", "dump.txt"), os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return
	}
	defer func() { _ = file.Close() }()
	for pod, ns := range l.pods() {
		fmt.Fprintf(file, "== %s: %s\n", name, pod)
		_ = in(ns, func() error {
			script := "ip -d link; ip addr; ip rule; ip -6 rule; ip route show table all; ip -6 route show table all; ip neigh"
			out, err := exec.Command("sh", "-c", script).CombinedOutput()
			_, _ = file.Write(out)
			return err
		})
	}
}

// probes asks the real grpc-health-probe: the health socket, and with an SVID
// the endpoint itself.
func (l *lab) probes() error {
	if l.probe == "" {
		return fmt.Errorf("no grpc-health-probe given")
	}
	const name = "lb-6"
	path, err := l.binary(name, l.probe)
	if err != nil {
		return err
	}
	endpoints, err := filepath.Glob(l.path("tmp", "proxy-*", "listen.on"))
	if err != nil || len(endpoints) != 1 {
		return fmt.Errorf("not one endpoint: %v (%w)", endpoints, err)
	}
	health := l.path("tmp", "health.sock")
	for _, args := range [][]string{
		{"-addr=unix://" + health, "-service="},
		{"-addr=unix://" + health, "-service=Readiness"},
		{"-addr=unix://" + health, "-service=Liveness"},
		{"-addr=unix://" + endpoints[0], "-service=", "-spiffe"},
	} {
		deadline := time.Now().Add(20 * time.Second)
		for {
			probe := exec.Command(path, append(args, "-connect-timeout=1s", "-rpc-timeout=1s")...)
			probe.Env = l.env(name)
			out, err := probe.CombinedOutput()
			if err == nil {
				break
			}
			if time.Now().After(deadline) {
				return fmt.Errorf("grpc-health-probe %q: %w: %s", args, err, out)
			}
			time.Sleep(100 * time.Millisecond)
		}
	}
	return nil
}
