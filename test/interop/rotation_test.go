package interop_test

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"io"
	"net"
	"regexp"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	discovery "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	rpcstatus "google.golang.org/genproto/googleapis/rpc/status"
)

// keys is what localauthority show -o json says of one kind.
func (a *agent) keys(kind string) (active, prepared, old string) {
	a.t.Helper()
	var v map[string]struct {
		ID string `json:"authority_id"`
	}
	if err := json.Unmarshal([]byte(a.cli("localauthority", kind, "show", "-output", "json")), &v); err != nil {
		a.t.Fatal(err)
	}
	return v["active"].ID, v["prepared"].ID, v["old"].ID
}

// until waits for a text in the status.
func (a *agent) until(want ...string) string {
	a.t.Helper()
	out := ""
	for deadline := time.Now().Add(patience); time.Now().Before(deadline); time.Sleep(50 * time.Millisecond) {
		out = a.cli("status")
		all := true
		for _, w := range want {
			all = all && strings.Contains(out, w)
		}
		if all {
			return out
		}
	}
	a.t.Fatalf("status never had %q:\n%s", want, out)
	return ""
}

// mesh is a server and a client that shake hands without a pause, each with
// identities and roots of the Workload API.
func mesh(t *testing.T, a *agent) (handshakes *atomic.Int64, stop func()) {
	t.Helper()
	source := func() *workloadapi.X509Source {
		s, err := workloadapi.NewX509Source(withTimeout(t), workloadapi.WithClientOptions(workloadapi.WithAddr("unix:"+a.socket())))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = s.Close() })
		return s
	}
	server, client := source(), source()
	lis, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(server, server, tlsconfig.AuthorizeAny()))
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		for {
			conn, err := lis.Accept()
			if err != nil {
				return
			}
			go func() {
				_, _ = io.Copy(conn, conn)
				_ = conn.Close()
			}()
		}
	}()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	handshakes = new(atomic.Int64)
	shake := func() error {
		dialer := tls.Dialer{NetDialer: &net.Dialer{Timeout: patience}, Config: tlsconfig.MTLSClientConfig(client, client, tlsconfig.AuthorizeAny())}
		conn, err := dialer.DialContext(ctx, "tcp", lis.Addr().String())
		if err != nil {
			return err
		}
		defer conn.Close()
		if _, err := conn.Write([]byte("x")); err != nil {
			return err
		}
		_, err = io.ReadFull(conn, make([]byte, 1)) // the server accepted the client, too
		return err
	}
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			if err := shake(); err != nil && ctx.Err() == nil {
				t.Errorf("handshake %d: %v", handshakes.Load(), err)
				return
			}
			handshakes.Add(1)
			time.Sleep(5 * time.Millisecond)
		}
	}()
	return handshakes, func() {
		cancel()
		<-done
		_ = lis.Close()
	}
}

// rotateByHand takes the keys of an authority through prepare, activate, taint
// and revoke while callers of an agent are connected.
func rotateByHand(t *testing.T, a *agent, n *agent, identities func() bool) {
	t.Helper()
	handshakes, stop := mesh(t, n)
	defer stop()
	ctx := withTimeout(t)
	cert, root := openEnvoy(ctx, n, "default"), openEnvoy(ctx, n, "ROOTCA")
	first := leaf(t, secrets(t, cert.next())["default"])
	root.next()

	// One stream turns every bundle down, one never says a word.
	rejects := openEnvoy(ctx, n, "ROOTCA")
	reject := func() {
		res := <-rejects.answer
		rejects.send(&discovery.DiscoveryRequest{TypeUrl: secretType, ResourceNames: rejects.names, ResponseNonce: res.GetNonce(), ErrorDetail: &rpcstatus.Status{Code: 13, Message: "no such trust store"}})
	}
	reject()
	silent := openEnvoy(ctx, n, "ROOTCA")
	<-silent.answer
	a.until("rejected it: no such trust store", "has not acknowledged it", "2 consumers lagging of 6")

	old, _, _ := a.keys("x509")
	a.cli("localauthority", "x509", "prepare")
	_, prepared, _ := a.keys("x509")
	root.next()
	reject()
	a.until("prepared "+prepared[:12], "prepared key acknowledged by 0 of 1 agent", "rejected it", "2 consumers lagging of 6")
	out := a.cli("localauthority", "x509", "activate", "-authorityID", prepared)
	if !strings.Contains(out, "Warning: 1 of 1 agents and 2 of 6 consumers have not acknowledged it yet") || !strings.Contains(out, "rejected it") {
		t.Errorf("activate by hand printed %s", out)
	}
	if !strings.Contains(a.log.String(), "authority is activated by hand although not everybody has acknowledged it") {
		t.Error("the log does not say who lagged")
	}
	before := handshakes.Load()
	a.cli("localauthority", "x509", "taint", "-authorityID", old)
	second := leaf(t, secrets(t, cert.next())["default"])
	if string(second.AuthorityKeyId) == string(first.AuthorityKeyId) {
		t.Error("the new certificate hangs on the tainted key")
	}
	a.until("old "+old[:12], ", tainted")
	for deadline := time.Now().Add(patience); strings.Contains(a.cli("status"), "still to be replaced"); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("there are always SVIDs to be replaced")
		}
	}
	a.cli("localauthority", "x509", "revoke", "-authorityID", old)
	root.next()
	a.until("old "+old[:12], ", revoked")
	for deadline := time.Now().Add(patience); handshakes.Load() < before+50; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) || t.Failed() {
			t.Fatalf("%d handshakes since", handshakes.Load()-before)
		}
	}
	if !identities() {
		t.Error("a caller was without an identity")
	}
	select {
	case err := <-cert.end:
		t.Errorf("the stream of the identity ended: %v", err)
	case err := <-root.end:
		t.Errorf("the stream of the roots ended: %v", err)
	default:
	}
	t.Logf("%d handshakes", handshakes.Load())
}

// never watches a caller of the Workload API; the result says whether it always
// had an identity.
func never(t *testing.T, n *agent) func() bool {
	t.Helper()
	w := &watcher{}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = workloadapi.WatchX509Context(ctx, w, workloadapi.WithAddr("unix:"+n.socket()))
	}()
	t.Cleanup(func() { cancel(); <-done })
	return func() bool { return w.none.Load() == 0 && w.some.Load() > 0 }
}

type watcher struct{ none, some atomic.Int64 }

func (w *watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	if len(c.SVIDs) == 0 {
		w.none.Add(1)
	} else {
		w.some.Add(1)
	}
}

func (w *watcher) OnX509ContextWatchError(err error) {
	if strings.Contains(err.Error(), "PermissionDenied") {
		w.none.Add(1)
	}
}

// With the authority in the agent: no handshake fails and nobody is without an
// identity while the keys go through their lives.
func TestRotationByHandInProcess(t *testing.T) {
	n := startAgent(t, "")
	n.createEntry("/w", "-selector", self())
	rotateByHand(t, n, n, never(t, n))
}

// The same with an authority elsewhere.
func TestRotationByHand(t *testing.T) {
	a := startAuthority(t, "")
	token := a.token("")
	n := joined(t, a, a.address, token)
	a.register("spiffe://"+trustDomain+"/spire/agent/join_token/"+token, "/w")
	rotateByHand(t, a.agent, n, never(t, n))
}

// A stream that never says a word holds an activation by time back to the
// deadline and no longer: the status names it while it does, the JWT key, which
// everybody has, is activated on time, and nobody else notices anything.
func TestRotationWaitsForTheSilent(t *testing.T) {
	a := startAuthorityWith(t, ", caTTL: 80s, defaultX509SVIDTTL: 8s, defaultJWTSVIDTTL: 8s", "")
	token := a.token("")
	n := joined(t, a, a.address, token)
	a.register("spiffe://"+trustDomain+"/spire/agent/join_token/"+token, "/w")
	identities := never(t, n)
	handshakes, stop := mesh(t, n)
	defer stop()
	cert := openEnvoy(t.Context(), n, "default")
	first := leaf(t, secrets(t, cert.next())["default"])
	silent := openEnvoy(t.Context(), n, "ROOTCA")
	<-silent.answer

	// Half of the CA's life passes before there is another.
	halfLife := time.Now().Add(40 * time.Second)
	x509Active, _, _ := a.keys("x509")
	jwtActive, _, _ := a.keys("jwt")
	var prepared string
	for prepared == "" {
		if _, prepared, _ = a.keys("x509"); time.Now().After(halfLife.Add(patience)) {
			t.Fatal("no authority was prepared")
		}
		time.Sleep(200 * time.Millisecond)
	}
	status := a.until("next: activate, delayed since", "prepared "+prepared[:12], "prepared key acknowledged by 0 of 1 agent", "has not acknowledged it", "1 consumer lagging of")
	t.Logf("while it is delayed:\n%s", status)
	if active, _, _ := a.keys("x509"); active != x509Active {
		t.Errorf("active is %s while the status says that the activation of %s waits", active, prepared)
	}
	deadline := regexp.MustCompile(`at most until (\S+)`).FindStringSubmatch(status)
	if deadline == nil {
		t.Fatal("the status gives no deadline")
	}
	due, err := time.Parse(time.RFC3339, deadline[1])
	if err != nil {
		t.Fatal(err)
	}
	onTime := false
	for active := ""; active != prepared; time.Sleep(50 * time.Millisecond) {
		if !onTime {
			active, _, _ := a.keys("jwt")
			onTime = active != jwtActive && time.Now().Before(due)
		}
		if active, _, _ = a.keys("x509"); time.Since(due) > patience {
			t.Fatalf("%s is not active %s after the deadline", prepared, time.Since(due))
		}
	}
	if early := time.Until(due); early > 0 {
		t.Errorf("activated %s before the deadline although a stream had not acknowledged it", early)
	}
	if !onTime {
		t.Error("the JWT key, which nobody lacks, was not activated on time")
	}
	for _, want := range []string{"activation of the prepared authority waits for acknowledgements", "prepared authority is activated at its deadline although not everybody has acknowledged it"} {
		if !strings.Contains(a.log.String(), want) {
			t.Errorf("the log does not say %q", want)
		}
	}
	for key := first.AuthorityKeyId; string(key) == string(first.AuthorityKeyId); {
		key = leaf(t, secrets(t, cert.next())["default"]).AuthorityKeyId
	}
	before := handshakes.Load()
	for limit := time.Now().Add(patience); handshakes.Load() < before+50; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(limit) || t.Failed() {
			t.Fatalf("%d handshakes since", handshakes.Load()-before)
		}
	}
	if !identities() {
		t.Error("a caller was without an identity")
	}
	select {
	case err := <-silent.end:
		t.Errorf("the silent stream ended: %v", err)
	default:
	}
	t.Logf("%d handshakes", handshakes.Load())
}
