package main

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/federation"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// With the path of a spire-server binary in spireServer, TestSameAsSpireServer
// runs it and this program with the same arguments against our server and
// compares what they print. With a SPIRE Server's private socket in spireSocket
// (trust domain td), both run against that server instead.
const (
	spireServer = "SPIFFE_NODE_TEST_SPIRE_SERVER"
	spireSocket = "SPIFFE_NODE_TEST_SPIRE_SOCKET"
)

// outcome is what a user sees of a command.
type outcome struct {
	Stdout, Stderr string
	Failed         bool
}

// releaseOf is what a spire-server binary says of itself.
func releaseOf(t *testing.T, bin string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), bin, "--version").CombinedOutput()
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

func TestSameAsSpireServer(t *testing.T) {
	bin := os.Getenv(spireServer)
	if bin == "" {
		t.Skip("no " + spireServer + " to compare with")
	}
	if v := releaseOf(t, bin); strings.HasPrefix(v, "1.14.") {
		t.Skip(bin + " is of release " + v + ", which lacks flags and lines of 1.15's output")
	}
	socket := os.Getenv(spireSocket)
	if socket == "" {
		socket = serveForReal(t)
	}
	dir := t.TempDir()
	theirs := func(args ...string) outcome {
		var out, errs bytes.Buffer
		cmd := exec.CommandContext(t.Context(), bin, append(args, "-socketPath", socket)...)
		cmd.Stdout, cmd.Stderr = &out, &errs
		err := cmd.Run()
		if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
			t.Fatal(err)
		}
		return outcome{out.String(), errs.String(), err != nil}
	}
	ours := func(args ...string) outcome {
		var out, errs bytes.Buffer
		code := run(context.WithoutCancel(t.Context()), append(args, "-socketPath", socket), system{
			stdin: strings.NewReader(""), stdout: &out, stderr: &errs, getenv: func(string) string { return "" },
		})
		return outcome{out.String(), errs.String(), code != 0}
	}
	file := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	pem := file("b.pem", ours("bundle", "show").Stdout)
	doc := file("b.json", ours("bundle", "show", "-format", "spiffe").Stdout)
	prepare := [][]string{
		{"entry", "create", "-data", file("data.json", `{"entries":[
			{"entry_id":"c1","selectors":[{"type":"unix","value":"uid:1"}],"parent_id":"spiffe://td/x","spiffe_id":"spiffe://td/c1","x509_svid_ttl":5,"entryExpiry":4102444800,"dns_names":["a","b"],"additional_attributes":{"jwt_svid_include_jti":true}},
			{"entry_id":"c2","selectors":[{"type":"unix","value":"uid:2"},{"type":"unix","value":"uid:1"}],"parent_id":"spiffe://td/x","spiffe_id":"spiffe://td/c2"},
			{"entry_id":"c3","selectors":[{"type":"unix","value":"uid:1"}],"parent_id":"spiffe://td/spire/server","spiffe_id":"spiffe://td/n","admin":true,"downstream":true,"hint":"h<>","jwt_svid_ttl":9}]}`)},
		{"bundle", "set", "-id", "other", "-path", doc, "-format", "spiffe"},
		{"bundle", "set", "-id", "more", "-path", pem},
		{"federation", "create", "-trustDomain", "other", "-bundleEndpointURL", "https://127.0.0.1:1/other", "-bundleEndpointProfile", "https_spiffe", "-endpointSpiffeID", "spiffe://other/spire/server"},
		{"federation", "create", "-trustDomain", "web", "-bundleEndpointURL", "https://127.0.0.1:1", "-bundleEndpointProfile", "https_web"},
	}
	for _, args := range prepare {
		if o := ours(args...); o.Failed {
			t.Fatalf("%v: %s", args, o.Stderr)
		}
	}
	t.Cleanup(func() {
		for _, id := range []string{"c1", "c2", "c3"} {
			ours("entry", "delete", "-entryID", id)
		}
		ours("bundle", "delete", "-id", "other")
		ours("bundle", "delete", "-id", "more")
		ours("federation", "delete", "-id", "other")
		ours("federation", "delete", "-id", "web")
	})
	for line := range strings.Lines(sameCommands) {
		line = strings.NewReplacer("PEM", pem, "DOC", doc,
			"BAD", file("bad.json", "{"), "EMPTY", file("empty.json", "{}"), "TYPES", file("types.json", `{"entries":[{"spiffe_id":1}]}`),
			"NOID", file("noid.json", `{"entries":[{}]}`), "RELS", file("rels.json", sameRelationships), "RELTYPE", file("reltype.json", `{"federationRelationships":[{"trustDomain":1}]}`),
			"IDS", file("ids.json", `{"ids":["zz","yy"]}`)).Replace(strings.TrimSpace(line))
		if line == "" {
			continue
		}
		for _, format := range []string{"", "json", "PRETTYPRINT"} {
			args := strings.Fields(line)
			if format != "" && args[0] != "healthcheck" {
				args = append(args, "-output", format)
			}
			if diff := cmp.Diff(theirs(args...), ours(args...)); diff != "" {
				t.Errorf("%s (-spire-server +kubectl-spiffe):\n%s", strings.Join(args, " "), diff)
			}
		}
	}
}

// sameCommands change nothing, so that both programs find the same state.
const sameCommands = `
entry show
entry show -entryID c1
entry show -entryID none
entry show -spiffeID spiffe://td/c2
entry show -parentID spiffe://td/x
entry show -selector unix:uid:1
entry show -selector unix:uid:1 -matchSelectorsOn exact
entry show -selector unix:uid:1 -selector unix:uid:2 -matchSelectorsOn any
entry show -selector unix:uid:1 -selector unix:uid:2 -matchSelectorsOn subset
entry show -selector unix:uid:1 -matchSelectorsOn some
entry show -selector x
entry show -hint h<>
entry show -downstream
entry show -spiffeID x
entry show -parentID x
entry show -spiffeID spiffe://td
entry show -spiffeID spiffe://td/spire/x
entry show -federatesWith Other
entry show -selector a:b -entryID c1
entry count
entry count -downstream
entry count -selector unix:uid:1
entry count -federatesWith other -matchFederatesWithOn some
entry create
entry create -selector a:b
entry create -selector a:b -parentID spiffe://td/x
entry create -selector a:b -parentID x -spiffeID y
entry create -selector a -parentID spiffe://td/x -spiffeID spiffe://td/y
entry create -selector a:b -parentID spiffe://td/x -spiffeID spiffe://td/y -x509SVIDTTL -1
entry create -selector a:b -parentID spiffe://td/x -spiffeID spiffe://td/y -jwtSVIDTTL -1
entry create -selector a:b -parentID spiffe://td/x -spiffeID spiffe://td/y -x509SVIDTTL 99999999999
entry create -node -selector a:b -spiffeID spiffe://td/n -federatesWith other
entry create -selector unix:uid:1 -parentID spiffe://td/x -spiffeID spiffe://td/c1
entry create -selector a:b -selector a:b -parentID spiffe://td/x -spiffeID spiffe://td/y
entry create -selector a:b -parentID spiffe://td/x -spiffeID spiffe://td/y -federatesWith none
entry create -selector a:b -parentID spiffe://other/x -spiffeID spiffe://td/y
entry create -selector a:b -parentID spiffe://td/x -spiffeID spiffe://td/spire/y
entry create -selector a:b -parentID spiffe://td/x -spiffeID spiffe://td/y -dns a..b
entry create -selector a:b -parentID spiffe://td/x -spiffeID spiffe://td/y -dns a -dns a
entry create -selector a:b -parentID spiffe://td/x -spiffeID spiffe://td/y -storeSVID -disableX509SVIDPrefetch
entry create -selector a:b -selector b:b -parentID spiffe://td/x -spiffeID spiffe://td/y -storeSVID
entry create -selector a:b -parentID spiffe://td/x -spiffeID spiffe://td/y -entryID c1
entry create -selector a:b -parentID spiffe://td/x -spiffeID spiffe://td/y -entryID a/b
entry create -selector a: -parentID spiffe://td/x -spiffeID spiffe://td/y
entry create -data /nonexistent
entry create -data BAD
entry create -data EMPTY
entry create -data TYPES
entry create -data NOID
entry update
entry update -entryID c1
entry update -entryID c1 -selector a:b
entry update -entryID c1 -selector a:b -parentID spiffe://td/x
entry update -entryID c1 -selector a: -parentID spiffe://td/x -spiffeID spiffe://td/y
entry update -entryID none -selector a:b -parentID spiffe://td/x -spiffeID spiffe://td/y
entry update -entryID none -selector a:b -parentID spiffe://td/x -spiffeID spiffe://td/y -jwtSVIDIncludeJTI
entry update -data BAD
entry delete
entry delete -entryID none
entry delete -file IDS
entry delete -file EMPTY
entry delete -file /nonexistent
bundle show
bundle show -format spiffe
bundle show -format der
bundle list
bundle list -format spiffe
bundle list -format der
bundle list -id other -format spiffe
bundle list -id spiffe://more
bundle list -id td
bundle list -id none
bundle count
bundle set
bundle set -id x
bundle set -id x -path /nonexistent
bundle set -id x -path DOC
bundle set -id x -path PEM -format spiffe
bundle set -id X -path PEM
bundle set -id td -path PEM
bundle set -id more -path PEM
bundle delete
bundle delete -id x -mode all
bundle delete -id none
bundle delete -id td
federation list
federation show
federation show -trustDomain other
federation show -trustDomain spiffe://web/x
federation show -trustDomain none
federation show -trustDomain A
federation refresh
federation refresh -id none
federation refresh -id A
federation refresh -id web
federation delete
federation delete -id none
federation delete -id A
federation create
federation create -trustDomain x
federation create -trustDomain x -bundleEndpointURL https://x
federation create -trustDomain x -bundleEndpointURL https://x -bundleEndpointProfile web
federation create -trustDomain x -bundleEndpointURL https://x -bundleEndpointProfile https_spiffe
federation create -trustDomain x -bundleEndpointURL https://x -bundleEndpointProfile https_spiffe -endpointSpiffeID x
federation create -trustDomain x -bundleEndpointURL http://x -bundleEndpointProfile https_web
federation create -trustDomain x -bundleEndpointURL https:/x -bundleEndpointProfile https_web
federation create -trustDomain x -bundleEndpointURL https://u@x -bundleEndpointProfile https_web
federation create -trustDomain x -bundleEndpointURL https://x:y -bundleEndpointProfile https_web
federation create -trustDomain X -bundleEndpointURL https://x -bundleEndpointProfile https_web
federation create -trustDomain td -bundleEndpointURL https://x -bundleEndpointProfile https_web
federation create -trustDomain web -bundleEndpointURL https://x -bundleEndpointProfile https_web
federation create -trustDomain x -bundleEndpointURL https://x -bundleEndpointProfile https_web -trustDomainBundlePath /nonexistent
federation create -trustDomain x -bundleEndpointURL https://x -bundleEndpointProfile https_web -trustDomainBundlePath DOC
federation create -trustDomain x -bundleEndpointURL https://x -bundleEndpointProfile https_web -trustDomainBundlePath PEM -trustDomainBundleFormat spiffe
federation create -trustDomain x -bundleEndpointURL https://x -bundleEndpointProfile https_spiffe -endpointSpiffeID spiffe://y/z -trustDomainBundlePath PEM
federation create -data BAD
federation create -data EMPTY
federation create -data RELTYPE
federation create -data /nonexistent
federation create -data RELS
federation create -data EMPTY -trustDomain x
federation update -trustDomain none -bundleEndpointURL https://x -bundleEndpointProfile https_web
federation update -trustDomain td -bundleEndpointURL https://x -bundleEndpointProfile https_web
federation update -trustDomain web -bundleEndpointURL http://x -bundleEndpointProfile https_web
federation update -data EMPTY
agent list
agent list -banned true
agent list -banned maybe
agent list -attestationType local
agent list -selector a:b
agent list -selector a
agent list -selector a:b -matchSelectorsOn some
agent list -expiresBefore soon
agent list -canReattest false
agent list -canReattest true
agent count
agent count -banned false
agent count -banned true
agent count -attestationType local
agent count -canReattest true
agent count -selector a:b
token generate -ttl 0
token generate -ttl 10 -spiffeID x
agent show
agent show -spiffeID x
agent show -spiffeID spiffe://td/x
agent show -spiffeID spiffe://td/spire/agent/none
agent show -spiffeID spiffe://td/spire/agent/local/node1
agent ban
agent ban -spiffeID spiffe://td/spire/agent/none
agent evict -spiffeID spiffe://td/spire/agent/none
x509 mint
x509 mint -spiffeID x
x509 mint -spiffeID spiffe://td/spire/x
x509 mint -spiffeID spiffe://other/x
x509 mint -spiffeID spiffe://td/x -dns a..b
x509 mint -spiffeID spiffe://td/x -write /nonexistent
jwt mint
jwt mint -spiffeID spiffe://td/x
jwt mint -spiffeID x -audience a
jwt mint -spiffeID spiffe://td/spire/x -audience a
jwt mint -spiffeID spiffe://td/x -audience a -write /nonexistent/x
localauthority x509 show
localauthority x509 activate
localauthority x509 activate -authorityID none
localauthority x509 taint
localauthority x509 taint -authorityID none
localauthority x509 revoke
localauthority x509 revoke -authorityID none
localauthority jwt show
localauthority jwt activate
localauthority jwt activate -authorityID none
localauthority jwt taint
localauthority jwt taint -authorityID none
localauthority jwt revoke
localauthority jwt revoke -authorityID none
upstreamauthority taint
upstreamauthority taint -subjectKeyID none
upstreamauthority revoke
upstreamauthority revoke -subjectKeyID none
healthcheck
healthcheck -verbose
healthcheck -shallow
logger get
logger set
logger set -level loud
logger set -level debug
logger set -level WARN
logger set -level trace
logger reset
debug getinfo
`

// sameRelationships cannot be created, each for its own reason.
const sameRelationships = `{"federationRelationships":[
	{"trustDomain":"web","bundleEndpointURL":"https://x","bundleEndpointProfile":"https_web"},
	{"trustDomain":"td","bundleEndpointURL":"https://x","bundleEndpointProfile":"https_spiffe","endpointSPIFFEID":"spiffe://td/x"}]}`

// serveForReal is our server with an embedded authority.
func serveForReal(t *testing.T, agents ...*embedded.Agent) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sn") //nolint:usetesting // socket paths must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	td := spiffeid.RequireTrustDomainFromString("td")
	a, err := embedded.Open(embedded.Config{TrustDomain: td, StatePath: filepath.Join(dir, "state", "authority.db")})
	if err != nil {
		t.Fatal(err)
	}
	agent := spiffeid.RequireFromString("spiffe://td/spire/agent/local/node1")
	for _, known := range append(agents, &embedded.Agent{
		ID: agent, AttestationType: "local", Serial: "42", ExpiresAt: time.Now().Add(time.Hour),
		Selectors: attest.MustSelectors("local:node:node1"), Version: "1.2.3",
	}) {
		if _, err := a.UpsertAgent(t.Context(), known); err != nil {
			t.Fatal(err)
		}
	}
	socket := filepath.Join(dir, "admin", "api.sock")
	p, err := federation.New(federation.Config{Store: a})
	if err != nil {
		t.Fatal(err)
	}
	s, err := adminapi.New(t.Context(), adminapi.Config{SocketPath: socket, TrustDomain: td, Authority: a, Federation: p, LocalAgent: agent, LogLevel: new(slog.LevelVar)})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 2)
	go func() { done <- s.Run(ctx) }()
	go func() { done <- p.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := errors.Join(<-done, <-done, a.Close()); err != nil {
			t.Error(err)
		}
	})
	return socket
}
