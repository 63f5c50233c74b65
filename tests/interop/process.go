package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netns"
)

// spawner starts all processes from one thread, which lives as long as this
// process: they are to die with it, not with one of its threads.
var spawner = func() chan func() {
	work := make(chan func())
	go func() {
		runtime.LockOSThread()
		for job := range work {
			job()
		}
	}()
	return work
}()

// in runs a function on a thread that is in the namespace.
func in(ns netns.NsHandle, run func() error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		if err := netns.Set(ns); err != nil {
			done <- fmt.Errorf("enter namespace: %w", err)
			return
		}
		done <- run()
	}()
	return <-done
}

func newNS() (netns.NsHandle, error) {
	var ns netns.NsHandle
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		var err error
		ns, err = netns.New()
		done <- err
	}()
	if err := <-done; err != nil {
		return ns, fmt.Errorf("new namespace: %w", err)
	}
	return ns, in(ns, func() error {
		settings := map[string]string{
			"ipv4/conf/all/forwarding": "0", "ipv6/conf/all/forwarding": "0",
			"ipv4/conf/all/rp_filter": "0", "ipv4/conf/default/rp_filter": "0",
			"ipv6/conf/all/accept_dad": "0", "ipv6/conf/default/accept_dad": "0",
		}
		for key, value := range settings {
			if err := sysctl(key, value); err != nil {
				return err
			}
		}
		return exec.Command("ip", "link", "set", "lo", "up").Run()
	})
}

// sysctl sets one of the namespace that the thread is in.
func sysctl(key, value string) error {
	return os.WriteFile(filepath.Join("/proc/sys/net", key), []byte(value), 0o644)
}

// routes lets the namespace forward packets, flow by flow.
func routes(ns netns.NsHandle) error {
	return in(ns, func() error {
		for _, key := range []string{
			"ipv4/conf/all/forwarding", "ipv6/conf/all/forwarding",
			"ipv4/fib_multipath_hash_policy", "ipv6/fib_multipath_hash_policy",
		} {
			if err := sysctl(key, "1"); err != nil {
				return err
			}
		}
		return nil
	})
}

// ip runs iproute2 in the namespace.
func ip(ns netns.NsHandle, args ...string) error {
	return in(ns, func() error {
		out, err := exec.Command("ip", args...).CombinedOutput()
		if err != nil {
			return fmt.Errorf("ip %s: %w: %s", strings.Join(args, " "), err, out)
		}
		return nil
	})
}

// process is one part of the mesh.
type process struct {
	name  string
	cmd   *exec.Cmd
	stdin io.WriteCloser
	mu    sync.Mutex
	lines []string
	read  int
	more  chan struct{}
	ended chan struct{}
	err   error
}

type start struct {
	name string
	path string
	args []string
	env  []string
	ns   netns.NsHandle
	log  string
}

func (s start) run() (*process, error) {
	logs, err := os.OpenFile(s.log, os.O_APPEND|os.O_CREATE|os.O_WRONLY, 0o644)
	if err != nil {
		return nil, err
	}
	p := &process{name: s.name, more: make(chan struct{}, 1), ended: make(chan struct{})}
	p.cmd = exec.Command(s.path, s.args...)
	p.cmd.Env = s.env
	p.cmd.Stderr = logs
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	out, err := p.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if p.stdin, err = p.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	started := make(chan error, 1)
	spawner <- func() {
		home, err := netns.Get()
		if err == nil {
			err = netns.Set(s.ns)
		}
		if err == nil {
			err = p.cmd.Start()
		}
		err = errors.Join(err, netns.Set(home), home.Close())
		started <- err
	}
	if err := <-started; err != nil {
		return nil, fmt.Errorf("start %s: %w", s.name, err)
	}
	go p.follow(out, logs)
	return p, nil
}

func (p *process) follow(out io.Reader, logs *os.File) {
	lines := bufio.NewScanner(out)
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		fmt.Fprintln(logs, lines.Text())
		p.mu.Lock()
		p.lines = append(p.lines, lines.Text())
		p.mu.Unlock()
		p.wake()
	}
	p.err = p.cmd.Wait()
	_ = logs.Close()
	close(p.ended)
}

func (p *process) wake() {
	select {
	case p.more <- struct{}{}:
	default:
	}
}

// line waits for the next line of standard output that begins so; an `error`
// line ends the wait, too.
func (p *process) line(prefix string, limit time.Duration) (string, error) {
	deadline := time.After(limit)
	for {
		p.mu.Lock()
		for p.read < len(p.lines) {
			line := p.lines[p.read]
			p.read++
			if strings.HasPrefix(line, prefix) || strings.HasPrefix(line, "error ") {
				p.mu.Unlock()
				if strings.HasPrefix(line, "error ") {
					return line, fmt.Errorf("%s: %s", p.name, line)
				}
				return line, nil
			}
		}
		p.mu.Unlock()
		select {
		case <-p.more:
		case <-p.ended:
			return "", fmt.Errorf("%s ended: %v", p.name, p.err)
		case <-deadline:
			return "", fmt.Errorf("%s: no line %q in %v", p.name, prefix, limit)
		}
	}
}

// command sends a line and waits for its answer.
func (p *process) command(limit time.Duration, words ...string) error {
	if _, err := fmt.Fprintln(p.stdin, strings.Join(words, " ")); err != nil {
		return fmt.Errorf("%s: %w", p.name, err)
	}
	_, err := p.line("ok", limit)
	return err
}

// ask sends a command and waits for the line that begins with its name, and for
// the end of the answer.
func (p *process) ask(limit time.Duration, what string, words ...string) (string, error) {
	if _, err := fmt.Fprintln(p.stdin, strings.Join(append([]string{what}, words...), " ")); err != nil {
		return "", fmt.Errorf("%s: %w", p.name, err)
	}
	line, err := p.line(what, limit)
	if err == nil {
		_, err = p.line("ok", limit)
	}
	return line, err
}

// all sends a command and gathers the lines of its answer that begin so.
func (p *process) all(limit time.Duration, prefix string, words ...string) ([]string, error) {
	p.mu.Lock()
	from := len(p.lines)
	p.mu.Unlock()
	if err := p.command(limit, words...); err != nil {
		return nil, err
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var found []string
	for _, line := range p.lines[from:] {
		if text, ok := strings.CutPrefix(line, prefix); ok {
			found = append(found, text)
		}
	}
	return found, nil
}

func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	<-p.ended
}

// terminate asks it to end; kills it if it does not.
func (p *process) terminate(limit time.Duration) error {
	_ = p.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-p.ended:
		return nil
	case <-time.After(limit):
		p.kill()
		return fmt.Errorf("%s did not end in %v", p.name, limit)
	}
}
