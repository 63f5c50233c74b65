package main

import (
	"context"
	"flag"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/vishvananda/netns"
)

// verdict is what one nsmgr answers to one mistake.
type verdict struct {
	call, name, code, text string
}

// runJudge judges the lab's nsmgr by the SDK: its client and its endpoint have
// to get through, and what the real nsmgr refuses the lab's has to refuse with
// the same status.
func runJudge(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("judge", flag.ContinueOnError)
	services := flags.String("services", "target/debug/services", "the lab's nsmgr")
	title := flags.String("title", "", "stands in every line of the table")
	keep := flags.Bool("keep", false, "keep the logs")
	if err := flags.Parse(args); err != nil {
		return err
	}
	dir, err := os.MkdirTemp("/var/tmp", "interop-")
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r := &report{title: *title}
	err = func() error {
		real, err := realVerdicts(ctx, filepath.Join(dir, "real"))
		if err != nil {
			return fmt.Errorf("real nsmgr: %w", err)
		}
		lab, err := judgeLab(ctx, r, filepath.Join(dir, "lab"), *services)
		if err != nil {
			return fmt.Errorf("lab's nsmgr: %w", err)
		}
		compare(r, real, lab)
		return nil
	}()
	if failed := r.failed(); err == nil && failed > 0 {
		err = fmt.Errorf("%d steps failed", failed)
	}
	if err == nil && !*keep {
		_ = os.RemoveAll(dir)
	} else {
		fmt.Println("logs:", dir)
	}
	return err
}

// compare adds a line for each mistake.
func compare(r *report, real, lab []verdict) {
	if len(real) != len(lab) || len(real) == 0 {
		r.add(result{Step: "the same mistakes", Failed: fmt.Sprintf("%d made to the real nsmgr, %d to the lab's", len(real), len(lab))})
		return
	}
	for i, is := range real {
		line := result{Step: "mistake", Call: is.call, Mistake: is.name, Real: is.code, Lab: lab[i].code, Note: is.text}
		if is.code != lab[i].code || is.name != lab[i].name {
			line.Failed = fmt.Sprintf("the lab says %s: %s", lab[i].code, lab[i].text)
		}
		r.add(line)
	}
}

// realVerdicts makes the mistakes to the SDK's nsmgr, registry and forwarder.
func realVerdicts(ctx context.Context, dir string) ([]verdict, error) {
	l, err := newLab(ctx, dir)
	if err != nil {
		return nil, err
	}
	defer l.stop()
	for _, start := range []func() error{l.startAuthority, l.startRegistry, l.startNsmgr, l.startForwarder} {
		if err := start(); err != nil {
			return nil, err
		}
	}
	if err := l.startLB("lb-1"); err != nil {
		return nil, err
	}
	return l.refusals("spiffe://example.org/ns/red/pod/nsmgr")
}

// judgeLab lets the SDK's client and endpoint meet over the lab's nsmgr, and
// then makes the mistakes.
func judgeLab(ctx context.Context, r *report, dir, services string) ([]verdict, error) {
	l, err := newLab(ctx, dir)
	if err != nil {
		return nil, err
	}
	defer l.stop()
	l.services, _ = filepath.Abs(services)
	l.tokens = "30s"
	env := l.env("lab", "LAB_IDENTITIES="+l.path("wl"), "LAB_SOCKET="+l.path("nsm.io.sock"))
	args := append([]string{"nsmgr"}, identities()...)
	if err := l.ready(l.start(start{name: "lab", path: l.services, args: args, env: env, ns: l.base})); err != nil {
		return nil, err
	}
	if err := l.throughLab(r); err != nil {
		return nil, err
	}
	if r.failed() > 0 {
		return nil, fmt.Errorf("the SDK does not get through")
	}
	if err := l.startLB("lb-1"); err != nil {
		return nil, err
	}
	return l.refusals("spiffe://example.org/ns/nsm/sa/nsmgr")
}

// throughLab is the life of one connection of the SDK's client to the SDK's
// endpoint: Request, traffic, refreshes, Close, and the endpoint's farewell.
func (l *lab) throughLab(r *report) error {
	l.step(r, "the SDK's endpoint registers at the lab's nsmgr", -1, 0, func() error {
		l.lbEnv = []string{"INTEROP_PREFIXES=172.30.0.0/24,fd30::/64"}
		defer func() { l.lbEnv = nil }()
		if err := l.startLB("lb-1"); err != nil {
			return err
		}
		return l.labState("connections=0 crosses=0 made=0", "endpoints=lb-1")
	})
	l.step(r, "the SDK's client connects", -1, 10*time.Second, func() error {
		l.targetService = lbService
		if err := l.startTarget("target-1"); err != nil {
			return err
		}
		line, err := l.parts["target-1"].ask(20*time.Second, "context")
		if err != nil {
			return err
		}
		l.traffic.client = l.targets["target-1"].ns
		addresses := strings.Fields(line)[1:]
		if len(addresses) != 4 {
			return fmt.Errorf("not two pairs of addresses: %q", line)
		}
		for i := range 2 {
			source, _, err := net.ParseCIDR(addresses[i])
			if err != nil {
				return err
			}
			to, _, err := net.ParseCIDR(addresses[i+2])
			if err != nil {
				return err
			}
			if _, err := echo(l.lbs["lb-1"].ns, to.String(), "lb-1"); err != nil {
				return err
			}
			if err := l.traffic.add(to.String(), source.String(), 4); err != nil {
				return err
			}
		}
		return l.labState("connections=1 crosses=1 made=1", "endpoints=lb-1")
	})
	l.step(r, "20 s of traffic, tokens of 30 s", -1, 30*time.Second, func() error {
		before, err := l.indexes()
		if err != nil {
			return err
		}
		time.Sleep(20 * time.Second)
		if after, err := l.indexes(); err != nil || after != before {
			return fmt.Errorf("interfaces %s instead of %s (%v)", after, before, err)
		}
		if err := l.refreshed("target-1", 2); err != nil {
			return err
		}
		return l.labState("connections=1 crosses=1 made=1", "endpoints=lb-1")
	})
	l.traffic.stop()
	l.step(r, "the SDK's client closes", -1, 0, func() error {
		if err := l.parts["target-1"].command(20*time.Second, "close"); err != nil {
			return err
		}
		for pod, ns := range map[string]netns.NsHandle{"target-1": l.targets["target-1"].ns, "lb-1": l.lbs["lb-1"].ns} {
			links, err := linksOf(ns)
			if err != nil {
				return err
			}
			if slices.ContainsFunc(links, isConnection) {
				return fmt.Errorf("an interface is left in %s", pod)
			}
		}
		return l.labState("connections=0 crosses=0 made=1", "endpoints=lb-1")
	})
	l.step(r, "the SDK's endpoint unregisters", -1, 0, func() error {
		if err := l.parts["lb-1"].terminate(5 * time.Second); err != nil {
			return err
		}
		return l.labState("connections=0", "endpoints=")
	})
	l.step(r, "the lab had nothing to say against them", -1, 0, func() error {
		notes, err := l.parts["lab"].all(5*time.Second, "note ", "refusals")
		if err == nil && len(notes) > 0 {
			err = fmt.Errorf("%s", strings.Join(notes, "; "))
		}
		return err
	})
	return nil
}

// labState waits until the lab's nsmgr says so of itself.
func (l *lab) labState(begin, end string) error {
	deadline := time.Now().Add(10 * time.Second)
	for {
		line, err := l.parts["lab"].ask(5*time.Second, "state", lbService)
		if err != nil {
			return err
		}
		line = strings.TrimPrefix(line, "state ")
		if strings.HasPrefix(line, begin) && strings.HasSuffix(line, end) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%q instead of %q … %q", line, begin, end)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// refusals makes every mistake of the table.
func (l *lab) refusals(nsmgr string) ([]verdict, error) {
	ns, err := newNS()
	if err != nil {
		return nil, err
	}
	p, err := l.own("lb-8", ns, []string{"refusals"},
		"INTEROP_NSMGR_ID="+nsmgr, "INTEROP_OTHER=unix://"+l.path("wl", "lb-7.sock"))
	if err != nil {
		return nil, err
	}
	if _, err = p.line("done", 4*time.Minute); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var found []verdict
	for _, line := range p.lines {
		if words := strings.SplitN(line, " | ", 5); len(words) == 5 && words[0] == "refusal" {
			found = append(found, verdict{call: words[1], name: words[2], code: words[3], text: words[4]})
		}
	}
	return found, nil
}
