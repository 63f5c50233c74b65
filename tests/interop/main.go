// Command interop is a mesh of the Network Service Mesh SDK's own chains, one
// process for each part, and the scenarios that the daemon has to get through
// in it. See docs/interop.md.
package main

import (
	"bufio"
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"sync"
	"syscall"

	"github.com/sirupsen/logrus"
)

func main() {
	if err := run(os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "interop:", err)
		os.Exit(1)
	}
}

func run(args []string) error {
	ctx, cancel := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer cancel()
	logrus.SetLevel(logrus.InfoLevel)
	if level, err := logrus.ParseLevel(os.Getenv("INTEROP_LOG")); err == nil {
		logrus.SetLevel(level)
	}
	if len(args) == 0 {
		return fmt.Errorf("no role: authority, registry, nsmgr, forwarder, lb, target, run, judge, table")
	}
	switch args[0] {
	case "authority":
		return runAuthority(ctx, args[1:])
	case "registry":
		return runRegistry(ctx)
	case "nsmgr":
		return runNsmgr(ctx)
	case "forwarder":
		return runForwarder(ctx)
	case "lb":
		return runLB(ctx)
	case "service":
		return runService(ctx)
	case "refusals":
		return runRefusals(ctx)
	case "target":
		return runTarget(ctx)
	case "judge":
		return runJudge(ctx, args[1:])
	case "table":
		return printTable(os.Stdout, args[1:])
	case "run":
		return runScenarios(ctx, args[1:])
	default:
		return fmt.Errorf("unknown role %q", args[0])
	}
}

var sayMu sync.Mutex

// say tells the one who started this process, on one line of standard output.
func say(what string, err error) {
	sayMu.Lock()
	defer sayMu.Unlock()
	if err != nil {
		what = fmt.Sprintf("error %s: %s", what, strings.ReplaceAll(err.Error(), "\n", " "))
	}
	fmt.Println(what)
}

// commands executes the lines of standard input, and answers each with `ok` or
// `error …`.
func commands(ctx context.Context, execute func(words []string) error) {
	lines := bufio.NewScanner(os.Stdin)
	for lines.Scan() && ctx.Err() == nil {
		words := strings.Fields(lines.Text())
		if len(words) == 0 {
			continue
		}
		if err := execute(words); err != nil {
			say(words[0], err)
		} else {
			say("ok "+words[0], nil)
		}
	}
}
