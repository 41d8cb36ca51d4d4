package interop_test

import (
	"crypto/tls"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// openssl runs it in a directory; it must succeed.
func openssl(t *testing.T, dir string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "openssl", args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("openssl %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// companyRoot makes a company's root with openssl, as docs/operations.md does:
// NAME.pem and NAME.key in dir.
func companyRoot(t *testing.T, dir, name string) {
	t.Helper()
	openssl(t, dir, "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-384", "-nodes", "-days", "3650",
		"-subj", "/O=Example/CN="+name, "-addext", "basicConstraints=critical,CA:true", "-addext", "keyUsage=critical,keyCertSign,cRLSign",
		"-keyout", name+".key", "-out", name+".pem")
}

// companyIssuing has root sign the CA for the trust domain: tls.crt, tls.key.
func companyIssuing(t *testing.T, dir, root string) {
	t.Helper()
	openssl(t, dir, "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-subj", "/O=Example/CN=SPIFFE of "+trustDomain,
		"-keyout", "tls.key", "-out", "tls.csr")
	ext := "basicConstraints=critical,CA:true,pathlen:1\nkeyUsage=critical,keyCertSign,cRLSign\nsubjectKeyIdentifier=hash\n" +
		"authorityKeyIdentifier=keyid\nnameConstraints=critical,permitted;URI:" + trustDomain + "\n"
	if err := os.WriteFile(filepath.Join(dir, "tls.ext"), []byte(ext), 0o600); err != nil {
		t.Fatal(err)
	}
	openssl(t, dir, "x509", "-req", "-in", "tls.csr", "-CA", root+".pem", "-CAkey", root+".key", "-CAcreateserial", "-days", "365",
		"-extfile", "tls.ext", "-out", "tls.crt")
}

// reconfigure replaces text in the configuration and starts anew.
func (a *agent) reconfigure(from, to string) {
	a.t.Helper()
	data, err := os.ReadFile(a.path("agent.yaml"))
	if err != nil || !strings.Contains(string(data), from) {
		a.t.Fatalf("%v\n%s", err, data)
	}
	a.stop()
	if err := os.WriteFile(a.path("agent.yaml"), []byte(strings.Replace(string(data), from, to, 1)), 0o600); err != nil {
		a.t.Fatal(err)
	}
	a.start()
}

// identity is that of a new entry, as a workload gets it.
func (a *agent) identity(path string) *x509svid.SVID {
	a.t.Helper()
	id := a.createEntry(path, "-selector", self())
	defer a.cli("entry", "delete", "-entryID", id)
	for ctx := withTimeout(a.t); ; {
		svids, err := workloadapi.FetchX509SVIDs(ctx, options(a))
		for _, s := range svids {
			if s.ID.Path() == path {
				return s
			}
		}
		if ctx.Err() != nil {
			a.t.Fatalf("no SVID for %s: %v\n%s", path, err, a.log)
		}
	}
}

func writeCerts(t *testing.T, path string, s *x509svid.SVID, from, to int) {
	t.Helper()
	var out []byte
	for _, c := range s.Certificates[from:to] {
		out = append(out, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.Raw})...)
	}
	if err := os.WriteFile(path, out, 0o600); err != nil {
		t.Fatal(err)
	}
}

// opensslVerifies checks an SVID as a stranger does who has the company's root
// alone and is given the chain.
func opensslVerifies(t *testing.T, dir, root string, s *x509svid.SVID) {
	t.Helper()
	writeCerts(t, filepath.Join(dir, "leaf.pem"), s, 0, 1)
	writeCerts(t, filepath.Join(dir, "chain.pem"), s, 1, len(s.Certificates))
	for _, purpose := range []string{"sslserver", "sslclient"} {
		openssl(t, dir, "verify", "-x509_strict", "-purpose", purpose, "-CAfile", root+".pem", "-untrusted", "chain.pem", "leaf.pem")
	}
}

// shakeHands has two workloads meet, each with the bundle it holds.
func shakeHands(t *testing.T, server, client *x509svid.SVID, serverTrusts, clientTrusts x509bundle.Source) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	done := make(chan error, 1)
	go func() {
		conn, err := l.Accept()
		if err == nil {
			defer conn.Close()
			err = tls.Server(conn, tlsconfig.MTLSServerConfig(server, serverTrusts, tlsconfig.AuthorizeID(client.ID))).HandshakeContext(t.Context())
		}
		done <- err
	}()
	d := tls.Dialer{Config: tlsconfig.MTLSClientConfig(client, clientTrusts, tlsconfig.AuthorizeID(server.ID))}
	conn, err := d.DialContext(t.Context(), "tcp", l.Addr().String())
	if err != nil {
		t.Errorf("%s to %s: %v", client.ID, server.ID, err)
	} else {
		defer conn.Close()
	}
	if err := <-done; err != nil {
		t.Errorf("%s at %s: %v", client.ID, server.ID, err)
	}
}

func (a *agent) bundleNow() *spiffebundle.Bundle {
	a.t.Helper()
	b, err := spiffebundle.Parse(serverID.TrustDomain(), []byte(a.cli("bundle", "show", "-format", "spiffe")))
	if err != nil {
		a.t.Fatal(err)
	}
	return b
}

var authorityLine = regexp.MustCompile(`(?m)^\s+(Authority ID|Upstream authority [^:]*): (\S+)$`)

// shown are the IDs in a section of localauthority x509 show.
func (a *agent) shown(section string) (id, upstream string) {
	a.t.Helper()
	_, rest, _ := strings.Cut(a.cli("localauthority", "x509", "show"), section+" X.509 authority:\n")
	rest, _, _ = strings.Cut(rest, "\n\n")
	for _, m := range authorityLine.FindAllStringSubmatch(rest, -1) {
		if m[1] == "Authority ID" {
			id = m[2]
		} else {
			upstream = m[2]
		}
	}
	return id, upstream
}

// takeOver has the prepared CA sign.
func (a *agent) takeOver() {
	a.t.Helper()
	id, _ := a.shown("Prepared")
	a.cli("localauthority", "x509", "activate", "-authorityID", id)
}

func (a *agent) readyz() (int, string) {
	a.t.Helper()
	req, err := http.NewRequestWithContext(a.t.Context(), http.MethodGet, "http://"+a.health+"/readyz", nil)
	if err != nil {
		a.t.Fatal(err)
	}
	res, err := http.DefaultClient.Do(req)
	if err != nil {
		a.t.Fatal(err)
	}
	defer res.Body.Close()
	body, err := io.ReadAll(res.Body)
	if err != nil {
		a.t.Fatal(err)
	}
	return res.StatusCode, string(body)
}

// until asks again until it is so.
func until(t *testing.T, what string, so func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !so(); time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("never: %s", what)
		}
	}
}

// TestCompanyRoot: an agent with an authority in it goes below a company's root
// that openssl made, rotates there, and follows the company to its next root.
func TestCompanyRoot(t *testing.T) {
	if _, err := exec.LookPath("openssl"); err != nil {
		t.Skip("no openssl here")
	}
	a := startAgent(t, "")
	before := a.identity("/before")
	dir := t.TempDir()
	companyRoot(t, dir, "root1")
	companyIssuing(t, dir, "root1")
	bundle := filepath.Join(dir, "bundle.crt")
	copyFile := func(to string, from ...string) {
		t.Helper()
		var all []byte
		for _, name := range from {
			data, err := os.ReadFile(filepath.Join(dir, name))
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, data...)
		}
		if err := os.WriteFile(to, all, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	copyFile(bundle, "root1.pem")
	a.reconfigure("authority.db}}", fmt.Sprintf("authority.db, upstream: {disk: {certFile: %s/tls.crt, keyFile: %s/tls.key, bundleFile: %s}}}}", dir, dir, bundle))

	until(t, "a CA below the company's root is prepared", func() bool { _, up := a.shown("Prepared"); return up != "" })
	a.takeOver()
	after := a.identity("/after")
	if len(after.Certificates) != 3 {
		t.Fatalf("a chain of %d", len(after.Certificates))
	}
	opensslVerifies(t, dir, "root1", after)
	if roots := a.bundleNow().X509Authorities(); len(roots) != 2 {
		t.Errorf("%d roots: the old own one and the company's are wanted", len(roots))
	}
	shakeHands(t, before, after, a.bundleNow(), a.bundleNow())
	shakeHands(t, after, before, a.bundleNow(), a.bundleNow())

	// The next CA below the same root.
	a.cli("localauthority", "x509", "prepare")
	a.takeOver()
	rotated := a.identity("/rotated")
	if rotated.Certificates[1].Equal(after.Certificates[1]) {
		t.Error("the CA is the same")
	}
	opensslVerifies(t, dir, "root1", rotated)
	shakeHands(t, after, rotated, a.bundleNow(), a.bundleNow())

	// Without the files, what is there serves on, over a restart too.
	if err := os.Rename(filepath.Join(dir, "tls.key"), filepath.Join(dir, "tls.away")); err != nil {
		t.Fatal(err)
	}
	a.kill()
	a.start()
	opensslVerifies(t, dir, "root1", a.identity("/restarted"))
	until(t, "readiness remarks that the key is away", func() bool {
		code, body := a.readyz()
		return code == http.StatusOK && strings.Contains(body, "ok, but: ") && strings.Contains(body, "tls.key")
	})

	// The company's next root: announced first, then it signs.
	companyRoot(t, dir, "root2")
	copyFile(bundle, "root1.pem", "root2.pem")
	companyIssuing(t, dir, "root2")
	until(t, "the next root is in the bundle", func() bool { return len(a.bundleNow().X509Authorities()) == 3 })
	_, old := a.shown("Active")
	a.cli("localauthority", "x509", "prepare")
	a.takeOver()
	next := a.identity("/next")
	opensslVerifies(t, dir, "root2", next)
	shakeHands(t, rotated, next, a.bundleNow(), a.bundleNow())
	a.cli("upstreamauthority", "taint", "-subjectKeyID", old)
	a.cli("upstreamauthority", "revoke", "-subjectKeyID", old)
	if _, _, err := x509svid.Verify(rotated.Certificates, a.bundleNow()); err == nil {
		t.Error("SVIDs below the revoked root verify still")
	}
	if _, _, err := x509svid.Verify(next.Certificates, a.bundleNow()); err != nil {
		t.Error(err)
	}
}

// minted is an SVID that an administrator has made.
func (a *agent) minted(path string) *x509svid.SVID {
	a.t.Helper()
	dir := a.t.TempDir()
	a.cli("x509", "mint", "-spiffeID", "spiffe://"+trustDomain+path, "-write", dir)
	svid, err := x509svid.Load(filepath.Join(dir, "svid.pem"), filepath.Join(dir, "key.pem"))
	if err != nil {
		a.t.Fatal(err)
	}
	return svid
}

// below checks a running child of a parent: workloads of both meet, and tokens
// of the child are good at the parent.
func below(t *testing.T, parent *agent, child *authority) {
	t.Helper()
	token := child.token("")
	n := joined(t, child, child.address, token)
	child.createEntry("/below", "-parentID", "spiffe://"+trustDomain+"/spire/agent/join_token/"+token, "-selector", self())
	down := waitForSVID(t, n, n.socket())
	if len(down.Certificates) != 2 {
		t.Errorf("a chain of %d", len(down.Certificates))
	}
	up := parent.minted("/above")
	shakeHands(t, up, down, parent.bundleNow(), child.bundleNow())
	shakeHands(t, down, up, child.bundleNow(), parent.bundleNow())
	source, err := workloadapi.FetchX509Context(withTimeout(t), options(n))
	if err != nil {
		t.Fatal(err)
	}
	shakeHands(t, down, up, source.Bundles, parent.bundleNow())
	jwt, err := workloadapi.FetchJWTSVID(withTimeout(t), jwtsvid.Params{Audience: "audience"}, options(n))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jwtsvid.ParseAndValidate(jwt.Marshal(), parent.bundleNow(), []string{"audience"}); err != nil {
		t.Errorf("JWT-SVID of the child at the parent: %v", err)
	}
	until(t, "the child knows the parent's JWT keys", func() bool { return len(child.bundleNow().JWTAuthorities()) == 2 })
}

// startChild starts an authority below another, whose agent serves a socket.
func startChild(t *testing.T, parentAddress, socket string) *authority {
	t.Helper()
	return startAuthorityWith(t, fmt.Sprintf(`, upstream: {parent: {address: "%s", workloadAPISocket: %s}}`, parentAddress, socket), "")
}

func TestChildOfAnAuthority(t *testing.T) {
	parent := startAuthority(t, "")
	token := parent.token("")
	n := joined(t, parent, parent.address, token)
	parent.createEntry("/child", "-parentID", "spiffe://"+trustDomain+"/spire/agent/join_token/"+token, "-selector", self(), "-downstream")
	waitForSVID(t, n, n.socket())
	child := startChild(t, parent.address, n.socket())
	below(t, parent.agent, child)

	// The parent gets a new root; the child hears of it without a step of its own.
	parent.cli("localauthority", "x509", "prepare")
	until(t, "the parent's next root is in the child's bundle", func() bool { return len(child.bundleNow().X509Authorities()) == 2 })
	// With the parent away the child comes back from its state.
	parent.kill()
	child.kill()
	child.start()
	if svid := child.minted("/alone"); len(svid.Certificates) != 2 {
		t.Errorf("a chain of %d", len(svid.Certificates))
	}
	parent.start()
}

func TestChildOfASPIREServer(t *testing.T) {
	if os.Getenv("SPIRE_AGENT") == "" || os.Getenv("SPIRE_SERVER") == "" {
		t.Skip("SPIRE_AGENT and SPIRE_SERVER do not name binaries")
	}
	s := startSPIREServer(t)
	token := s.token("")
	dir := socketDir(t)
	n := startSPIREAgent(t, s, dir, t.TempDir(), token)
	s.createEntry("/child", "-parentID", "spiffe://"+trustDomain+"/spire/agent/join_token/"+token, "-selector", self(), "-downstream")
	waitForSVID(t, n, dir+"/spire-agent.sock")
	child := startChild(t, s.address, dir+"/spire-agent.sock")
	below(t, s.agent, child)

	// A taint at the parent gets the child off the old root.
	_, old := child.shown("Active")
	s.cli("localauthority", "x509", "prepare")
	s.takeOver()
	s.cli("localauthority", "x509", "taint", "-authorityID", old)
	until(t, "the child's CA stands below the parent's new root", func() bool { _, up := child.shown("Active"); return up != old && up != "" })
	s.cli("localauthority", "x509", "revoke", "-authorityID", old)
	until(t, "the child has revoked the old root", func() bool { return len(child.bundleNow().X509Authorities()) == 1 })
	if _, _, err := x509svid.Verify(child.minted("/late").Certificates, s.bundleNow()); err != nil {
		t.Error(err)
	}
}
