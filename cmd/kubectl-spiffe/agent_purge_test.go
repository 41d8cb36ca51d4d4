package main

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// away is an agent whose SVID ended some time ago.
func away(name string, ago time.Duration, reattestable bool) *embedded.Agent {
	return &embedded.Agent{
		ID: spiffeid.RequireFromString("spiffe://td/spire/agent/x509pop/" + name), AttestationType: "x509pop", Serial: "7",
		ExpiresAt: time.Now().Add(-ago), CanReattest: reattestable,
	}
}

func agentsAway() []*embedded.Agent {
	const day = 24 * time.Hour
	return []*embedded.Agent{away("gone", 40*day, true), away("joined", 40*day, false), away("resting", 2*day, true)}
}

func runOn(t *testing.T, socket string, args ...string) outcome {
	t.Helper()
	var out, errs bytes.Buffer
	code := run(context.WithoutCancel(t.Context()), append(args, "-socketPath", socket), system{
		stdin: strings.NewReader(""), stdout: &out, stderr: &errs, getenv: func(string) string { return "" },
	})
	return outcome{out.String(), errs.String(), code != 0}
}

// Only agents that can come back are purged, and only after the time asked for.
func TestAgentPurge(t *testing.T) {
	socket := serveForReal(t, agentsAway()...)
	for _, tc := range []struct{ args, want string }{
		{"-dryRun", "Found 1 expired agent\n\n\nAgents that can be purged:\nSPIFFE ID         : spiffe://td/spire/agent/x509pop/gone\n"},
		{"-dryRun -expiredFor 24h -output json", `{"expired_agents":[{"agent_id":"spiffe://td/spire/agent/x509pop/gone","deleted":false},{"agent_id":"spiffe://td/spire/agent/x509pop/resting","deleted":false}]}` + "\n"},
		{"", "Found 1 expired agent\n\nAgents purged:\nSPIFFE ID         : spiffe://td/spire/agent/x509pop/gone\n"},
		{"", "No agents to purge.\n"},
		{"-expiredFor 24h -output json", `{"expired_agents":[{"agent_id":"spiffe://td/spire/agent/x509pop/resting","deleted":true}]}` + "\n"},
	} {
		if got := runOn(t, socket, append([]string{"agent", "purge"}, strings.Fields(tc.args)...)...); got.Stdout != tc.want || got.Failed {
			t.Errorf("purge %s: %+v, want %q", tc.args, got, tc.want)
		}
	}
	if got := runOn(t, socket, "agent", "count"); got.Stdout != "2 attested agents\n" {
		t.Errorf("left: %+v", got)
	}
}

// The real command prints the same, each on a server of its own.
func TestAgentPurgeAsSpireServer(t *testing.T) {
	bin := os.Getenv(spireServer)
	if bin == "" {
		t.Skip("no " + spireServer + " to call")
	}
	if v := releaseOf(t, bin); strings.HasPrefix(v, "1.14.") {
		t.Skip(bin + " is of release " + v + ", which prints other JSON")
	}
	ours, theirs := serveForReal(t, agentsAway()...), serveForReal(t, agentsAway()...)
	for _, args := range []string{"-dryRun", "-dryRun -output json", "-expiredFor 24h", "-expiredFor 24h", "-output json"} {
		all := append([]string{"agent", "purge"}, strings.Fields(args)...)
		var out bytes.Buffer
		cmd := exec.CommandContext(t.Context(), bin, append(all, "-socketPath", theirs)...)
		cmd.Stdout = &out
		if err := cmd.Run(); err != nil {
			t.Fatal(err)
		}
		if got := runOn(t, ours, all...); got.Stdout != out.String() {
			t.Errorf("purge %s: %q, the real command %q", args, got.Stdout, out.String())
		}
	}
}
