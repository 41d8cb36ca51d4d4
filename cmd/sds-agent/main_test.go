package main

import (
	"context"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/spiffe-node/spiffe-node/internal/command"
	"github.com/spiffe-node/spiffe-node/internal/config"
	"github.com/spiffe-node/spiffe-node/internal/doctest"
)

var update = flag.Bool("update", false, "rewrite the flag table in docs/configuration.md")

func TestFlagsAreDocumented(t *testing.T) {
	doctest.Block(t, "../../docs/configuration.md", "agent-flags", doctest.Flags(commandLine().FlagSet()), *update)
}

func TestFlagsOverrideTheFile(t *testing.T) {
	file := filepath.Join(t.TempDir(), "agent.yaml")
	if err := os.WriteFile(file, []byte("apiVersion: "+config.APIVersion+"\nkind: AgentConfiguration\ntrustDomain: file.example\nlog: {level: warn}\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	var c *config.Agent
	cmd := commandLine()
	cmd.Run = func(_ context.Context, cfg *config.Agent, _ command.Logs) error {
		c = cfg
		return nil
	}
	if err := cmd.Execute(t.Context(), []string{"--config", file, "--trust-domain", "flag.example"}, io.Discard, io.Discard); err != nil {
		t.Fatal(err)
	}
	if c.TrustDomain != "flag.example" || c.Log.Level != "warn" {
		t.Errorf("trust domain %q, level %q", c.TrustDomain, c.Log.Level)
	}
}

func TestRun(t *testing.T) {
	for name, tc := range map[string]struct {
		args []string
		out  string
		err  string
	}{
		"version":         {args: []string{"--version"}, out: version + "\n"},
		"valid":           {args: []string{"--validate", "--trust-domain", "example.org"}, out: "configuration is valid\n"},
		"no trust domain": {args: []string{"--validate"}, err: "trustDomain: is missing"},
		"no such file":    {args: []string{"--config", "/no/such/file"}, err: "/no/such/file"},
		"no such flag":    {args: []string{"--trustdomain", "x"}, err: "not defined"},
		"argument":        {args: []string{"run"}, err: `unexpected argument "run"`},
		"bad level":       {args: []string{"--trust-domain", "example.org", "--log-level", "loud"}, err: "log.level"},
		"bad address":     {args: []string{"--trust-domain", "example.org", "--health-address", "256.0.0.1:99999"}, err: "listen for health and metrics"},
	} {
		t.Run(name, func(t *testing.T) {
			var out strings.Builder
			err := commandLine().Execute(t.Context(), tc.args, &out, io.Discard)
			if tc.err == "" && (err != nil || out.String() != tc.out) {
				t.Errorf("got %q, %v", out.String(), err)
			}
			if tc.err != "" && (err == nil || !strings.Contains(err.Error(), tc.err)) {
				t.Errorf("got %v, want %s", err, tc.err)
			}
		})
	}
	if err := commandLine().Execute(t.Context(), []string{"-h"}, io.Discard, io.Discard); !errors.Is(err, flag.ErrHelp) {
		t.Errorf("-h: %v", err)
	}
}
