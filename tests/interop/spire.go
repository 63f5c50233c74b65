package main

import (
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// spire is a real SPIRE server and agent with unix workload attestation: each
// part of the mesh runs from a path of its own, which is its selector.
type spire struct {
	bin, dir string
	ttl      time.Duration
}

const spireNode = "spiffe://example.org/node"

func (s *spire) socket() string { return filepath.Join(s.dir, "agent.sock") }

func (s *spire) admin() string { return filepath.Join(s.dir, "server.sock") }

func (s *spire) serverConfig() string {
	return fmt.Sprintf(`server {
	bind_address = "127.0.0.1"
	bind_port = "8081"
	socket_path = %q
	trust_domain = "example.org"
	data_dir = %q
	log_level = "INFO"
	ca_ttl = "24h"
	default_x509_svid_ttl = %q
}
plugins {
	DataStore "sql" { plugin_data { database_type = "sqlite3" connection_string = %q } }
	NodeAttestor "join_token" { plugin_data {} }
	KeyManager "memory" { plugin_data {} }
}
`, s.admin(), s.dir, s.ttl, filepath.Join(s.dir, "server.sqlite3"))
}

func (s *spire) agentConfig() string {
	return fmt.Sprintf(`agent {
	data_dir = %q
	log_level = "INFO"
	server_address = "127.0.0.1"
	server_port = "8081"
	socket_path = %q
	trust_bundle_path = %q
	trust_domain = "example.org"
}
plugins {
	NodeAttestor "join_token" { plugin_data {} }
	KeyManager "disk" { plugin_data { directory = %q } }
	WorkloadAttestor "unix" { plugin_data { discover_workload_path = true workload_size_limit = -1 } }
}
`, filepath.Join(s.dir, "agent"), s.socket(), filepath.Join(s.dir, "bundle.pem"), filepath.Join(s.dir, "agent"))
}

// server runs a command of spire-server until it succeeds.
func (s *spire) server(args ...string) (string, error) {
	args = append(args, "-socketPath", s.admin())
	deadline := time.Now().Add(30 * time.Second)
	for {
		out, err := exec.Command(filepath.Join(s.bin, "spire-server"), args...).CombinedOutput()
		if err == nil {
			return string(out), nil
		}
		if time.Now().After(deadline) {
			return "", fmt.Errorf("spire-server %s: %w: %s", strings.Join(args, " "), err, out)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// startSpire starts both, and registers all identities.
func (l *lab) startSpire() error {
	s := l.spire
	if err := os.MkdirAll(filepath.Join(s.dir, "agent"), 0o700); err != nil {
		return err
	}
	if err := os.Chmod(s.dir, 0o755); err != nil {
		return err
	}
	files := map[string]string{"server.conf": s.serverConfig(), "agent.conf": s.agentConfig()}
	type selector struct {
		Type  string `json:"type"`
		Value string `json:"value"`
	}
	type entry struct {
		Selectors []selector `json:"selectors"`
		ID        string     `json:"spiffe_id"`
		Parent    string     `json:"parent_id"`
		TTL       int        `json:"x509_svid_ttl"`
	}
	var entries []entry
	for _, name := range identities() {
		entries = append(entries, entry{
			Selectors: []selector{{"unix", "path:" + l.path("bin", name)}},
			ID:        "spiffe://example.org/ns/red/pod/" + name, Parent: spireNode, TTL: int(s.ttl.Seconds()),
		})
	}
	data, err := json.Marshal(map[string][]entry{"entries": entries})
	if err != nil {
		return err
	}
	files["entries.json"] = string(data)
	for name, text := range files {
		if err := os.WriteFile(filepath.Join(s.dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	if _, err := l.start(start{
		name: "spire-server", path: filepath.Join(s.bin, "spire-server"), ns: l.base,
		args: []string{"run", "-config", filepath.Join(s.dir, "server.conf")},
	}); err != nil {
		return err
	}
	bundle, err := s.server("bundle", "show")
	if err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(s.dir, "bundle.pem"), []byte(bundle), 0o644); err != nil {
		return err
	}
	token, err := s.server("token", "generate", "-spiffeID", spireNode)
	if err != nil {
		return err
	}
	if _, err := s.server("entry", "create", "-data", filepath.Join(s.dir, "entries.json")); err != nil {
		return err
	}
	return l.startAgent(strings.TrimSpace(strings.TrimPrefix(token, "Token:")))
}

// startAgent starts the agent; the token is for its first start.
func (l *lab) startAgent(token string) error {
	s := l.spire
	args := []string{"run", "-config", filepath.Join(s.dir, "agent.conf")}
	if token != "" {
		args = append(args, "-joinToken", token)
	}
	agent := filepath.Join(s.bin, "spire-agent")
	if _, err := l.start(start{name: "spire-agent", path: agent, args: args, ns: l.base}); err != nil {
		return err
	}
	deadline := time.Now().Add(30 * time.Second)
	for {
		out, err := exec.Command(agent, "healthcheck", "-socketPath", s.socket()).CombinedOutput()
		if err == nil {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("spire-agent: %w: %s", err, out)
		}
		time.Sleep(100 * time.Millisecond)
	}
}
