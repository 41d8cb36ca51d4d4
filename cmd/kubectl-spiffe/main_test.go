package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/federation"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"kubectl-spiffe": main})
}

// TestScripts drives the program against a server with an embedded authority,
// one of each per script.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:                 "testdata/script",
		RequireExplicitExec: true,
		UpdateScripts:       os.Getenv("UPDATE_SCRIPTS") != "",
		Setup: func(env *testscript.Env) error {
			dir, err := os.MkdirTemp("", "sn") //nolint:usetesting // socket paths must be short
			if err != nil {
				return err
			}
			env.Defer(func() { _ = os.RemoveAll(dir) })
			socket, err := serve(env, dir)
			if err != nil {
				return err
			}
			env.Setenv(envSocket, socket)
			env.Setenv("SOCKET", socket)
			env.Setenv("TZ", "UTC")
			env.Setenv("CA_DAYS", strconv.Itoa(int(time.Until(caEnds)/(24*time.Hour))))
			for variable, name := range map[string]string{"CLUSTER": "shop", "SPIRE_CLUSTER": "spire"} {
				kubeconfig := filepath.Join(env.WorkDir, name+".kubeconfig")
				data, err := os.ReadFile(filepath.Join("testdata", "cluster", name+".yaml"))
				if err != nil {
					return err
				}
				api := &fakeAPI{command: tunnelInto(socket)}
				if err := api.parse(data); err != nil {
					return err
				}
				if err := api.start(env.Defer, kubeconfig, "shop"); err != nil {
					return err
				}
				env.Setenv(variable, kubeconfig)
			}
			env.Setenv("HOME", env.WorkDir)
			return nil
		},
	})
}

var caEnds = time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC)

func serve(env *testscript.Env, dir string) (string, error) {
	td := spiffeid.RequireTrustDomainFromString("td")
	agent := spiffeid.RequireFromString("spiffe://td/spire/agent/local/node1")
	a, err := embedded.Open(embedded.Config{TrustDomain: td, StatePath: filepath.Join(dir, "state", "authority.db")})
	if err != nil {
		return "", err
	}
	_, err = a.UpsertAgent(context.Background(), &embedded.Agent{
		ID: agent, AttestationType: "local", Serial: "42", ExpiresAt: time.Date(2100, 1, 1, 0, 0, 0, 0, time.UTC),
		Selectors: attest.MustSelectors("local:node:node1"), Version: "1.2.3",
	})
	if err != nil {
		return "", errors.Join(err, a.Close())
	}
	socket := filepath.Join(dir, "admin", "api.sock")
	ctx, cancel := context.WithCancel(context.Background())
	p, err := federation.New(federation.Config{Store: a, Fetch: scriptFetch})
	if err != nil {
		cancel()
		return "", errors.Join(err, a.Close())
	}
	s, err := adminapi.New(ctx, adminapi.Config{
		Federation: p,
		SocketPath: socket, TrustDomain: td, Authority: a, LocalAgent: agent, LogLevel: new(slog.LevelVar), Source: &scriptSource{now: time.Now()},
	})
	if err != nil {
		cancel()
		return "", errors.Join(err, a.Close())
	}
	done := make(chan error, 2)
	go func() { done <- s.Run(ctx) }()
	go func() { done <- p.Run(ctx) }()
	env.Defer(func() {
		cancel()
		if err := errors.Join(<-done, <-done, a.Close()); err != nil {
			panic(err)
		}
	})
	return socket, nil
}

// scriptFetch answers for the trust domain good.org with an empty bundle: all
// its keys are withdrawn.
func scriptFetch(_ context.Context, r embedded.Relationship) (*spiffebundle.Bundle, error) {
	if r.TrustDomain.Name() != "good.org" {
		return nil, errors.New("nobody is there")
	}
	b := spiffebundle.New(r.TrustDomain)
	b.SetSequenceNumber(7)
	return b, nil
}

// scriptSource is an agent with one caller of each kind. Its times are such
// that what is printed does not depend on the second.
type scriptSource struct{ now time.Time }

func (s *scriptSource) ago(d time.Duration) time.Time { return s.now.Add(-d - 30*time.Second) }

func (s *scriptSource) Status(context.Context) (*adminapi.Status, error) {
	return &adminapi.Status{
		TrustDomain: "td", AgentID: "spiffe://td/spire/agent/local/node1", Version: "1.2.3", StartedAt: s.ago(26 * time.Hour),
		Mode: "kubernetes", PeerIdentification: "pidfd",
		Authority: adminapi.AuthorityStatus{
			Kind: "embedded", State: "ready", X509AuthorityID: "0123456789abcdef0123456789abcdef01234567",
			X509AuthorityEnds: caEnds,
		},
		Entries: 3, Connections: 3, Streams: 4, Parked: 1,
		Limits:   []adminapi.Limit{{Name: "connections", Used: 3, Max: 4096}, {Name: "connections per pod", Used: 1, Max: 64}},
		Sockets:  []string{"/run/spiffe-node/public/socket", "/run/spiffe-node/public/spire-agent.sock"},
		Warnings: []string{"no pod watch: labels and images of pods are unknown."},
	}, nil
}

func (s *scriptSource) web() adminapi.CallerInfo {
	return adminapi.CallerInfo{
		PID: 4711, UID: 1000, GID: 1000, PodUID: "7d9f", PodNamespace: "shop", PodName: "web-0", ServiceAccount: "web",
		ContainerID: "0123456789abcdef0123456789abcdef", Witnesses: []string{"cgroup", "ledger"},
		Selectors: attest.MustSelectors("k8s:ns:shop", "k8s:sa:web", "unix:uid:1000"),
	}
}

func (s *scriptSource) Connections(context.Context) ([]adminapi.Connection, error) {
	batch := adminapi.CallerInfo{PID: 4800, PodNamespace: "shop", PodName: "batch-1", Witnesses: []string{"cgroup"}, Selectors: attest.MustSelectors("k8s:ns:shop")}
	return []adminapi.Connection{
		{ID: 1, Caller: s.web(), Since: s.ago(5 * time.Hour), Streams: []adminapi.Stream{
			{
				API: "sds", Since: s.ago(5 * time.Hour), Names: []string{"default"}, Version: "v1", LastPush: s.ago(20 * time.Minute), LastACK: s.ago(20 * time.Minute),
				Served: []adminapi.Served{{Name: "default", SPIFFEID: "spiffe://td/web", Serial: "123456789", ExpiresAt: s.now.Add(40*time.Minute + 30*time.Second)}},
			},
			{
				API: "sds", Since: s.ago(5 * time.Hour), Names: []string{"ROOTCA"}, Version: "v1", LastPush: s.ago(5 * time.Hour), LastACK: s.ago(6 * time.Hour),
				LastNACK: s.ago(5 * time.Hour), NACKText: "no such\x1b[31m trust\nstore", Served: []adminapi.Served{{Name: "ROOTCA"}},
			},
		}},
		{ID: 2, Caller: batch, Since: s.ago(20 * time.Minute), Streams: []adminapi.Stream{
			{API: "sds-delta", Since: s.ago(20 * time.Minute), Names: []string{"default", "file-cert:x"}, Late: []string{"default"}, Unknown: []string{"file-cert:x"}, ParkedSince: s.ago(20 * time.Minute)},
		}},
		{ID: 3, Caller: adminapi.CallerInfo{PID: 4900, UID: 33, Denied: "cgroup and ledger disagree"}, Since: s.ago(15 * time.Minute)},
	}, nil
}

func (s *scriptSource) Explain(ctx context.Context, target adminapi.Target) ([]adminapi.Explanation, error) {
	all, err := s.Connections(ctx)
	if err != nil {
		return nil, err
	}
	at := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	switch {
	case target.PID == 4711 || target.PodNamespace == "shop" && target.PodName == "web-0":
		return []adminapi.Explanation{{
			Caller: s.web(), Verdict: adminapi.VerdictIssued,
			Phases: []adminapi.Phase{
				{Name: "connected", At: at, Detail: "connection 1"},
				{Name: "bound", At: at.Add(310 * time.Microsecond), Detail: "pod shop/web-0"},
				{Name: "matched", At: at.Add(330 * time.Microsecond), Detail: "2 entries"},
				{Name: "served", At: at.Add(2330 * time.Microsecond)},
			},
			Matches: []adminapi.Match{
				{EntryID: "web", SPIFFEID: "spiffe://td/web", Default: true, Serial: "123456789", ExpiresAt: s.now.Add(40*time.Minute + 30*time.Second), Hint: "main"},
				{EntryID: "web-old", SPIFFEID: "spiffe://td/web-old", LastError: "authority refused: no such entry"},
			},
			Connections: all[:1],
		}}, nil
	case target.PID == 4900:
		return []adminapi.Explanation{{
			Caller: all[2].Caller, Verdict: adminapi.VerdictDenied, NextStep: "look at the pod's volume: another pod's publish record names this cgroup.",
		}}, nil
	case target.PodNamespace == "shop" && target.PodName == "batch-1":
		return []adminapi.Explanation{{
			Caller: all[1].Caller, Verdict: adminapi.VerdictLate, NextStep: "create an entry whose selectors are among the caller's.",
			Nearest: []adminapi.Near{{
				EntryID: "batch", SPIFFEID: "spiffe://td/batch", Selectors: attest.MustSelectors("k8s:ns:shop", "k8s:sa:batch"),
				Missing: []attest.Selector{attest.MustSelector("k8s:sa:batch")},
			}},
			Connections: all[1:2],
		}}, nil
	}
	return nil, fmt.Errorf("no process %d has called this agent; see kubectl spiffe status: %w", target.PID, adminapi.ErrNotFound)
}

func TestCommandsAreNamedAsPeopleTypeThem(t *testing.T) {
	a := &app{output: formatPretty}
	var walk func(path string)
	root := a.rootCommand()
	names := map[string]bool{}
	walk = func(path string) {
		cmd, _, err := root.Find(strings.Fields(path))
		if err != nil {
			t.Fatal(err)
		}
		names[path] = true
		for _, sub := range cmd.Commands() {
			walk(strings.TrimSpace(path + " " + sub.Name()))
		}
	}
	walk("")
	for _, path := range []string{
		"entry create", "entry show", "entry update", "entry delete", "entry count",
		"bundle show", "bundle list", "bundle set", "bundle delete", "bundle count",
		"federation create", "federation list", "federation show", "federation update", "federation refresh", "federation delete",
		"agent list", "agent show", "agent count", "agent ban", "agent evict",
		"localauthority x509 show", "localauthority x509 prepare", "localauthority x509 activate", "localauthority x509 taint", "localauthority x509 revoke",
		"localauthority jwt show", "localauthority jwt prepare", "localauthority jwt activate", "localauthority jwt taint", "localauthority jwt revoke",
		"upstreamauthority taint", "upstreamauthority revoke",
		"x509 mint", "jwt mint", "healthcheck", "logger get", "logger set", "logger reset", "debug getinfo",
		"status", "explain", "secret", "check", "migrate config", "migrate plan", "version",
	} {
		if !names[path] {
			t.Errorf("no command %q", path)
		}
	}
}
