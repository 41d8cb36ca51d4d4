package interop_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
)

func options(a *agent) workloadapi.ClientOption { return workloadapi.WithAddr("unix://" + a.socket()) }

func TestX509Source(t *testing.T) {
	a := startAgent(t, "")
	id := a.createEntry("/source", "-selector", self())
	ctx := withTimeout(t)
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(options(a)))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	svid, err := source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	if svid.ID.String() != "spiffe://example.org/source" {
		t.Errorf("ID %s", svid.ID)
	}
	bundle, err := source.GetX509BundleForTrustDomain(spiffeid.RequireTrustDomainFromString(trustDomain))
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := x509svid.Verify(svid.Certificates, bundle); err != nil {
		t.Errorf("the SVID does not verify against the bundle: %v", err)
	}
	before := svid.Certificates[0].SerialNumber
	a.cli("entry", "update", "-entryID", id, "-parentID", agentID, "-spiffeID", "spiffe://example.org/source", "-selector", self(), "-x509SVIDTTL", "900")
	for {
		svid, err := source.GetX509SVID()
		if err != nil {
			t.Fatal(err)
		}
		if svid.Certificates[0].SerialNumber.Cmp(before) != 0 {
			break
		}
		select {
		case <-source.Updated():
		case <-ctx.Done():
			t.Fatal("the source never saw the new SVID")
		}
	}
}

func TestJWT(t *testing.T) {
	a := startAgent(t, "")
	a.createEntry("/jwt", "-selector", self())
	ctx := withTimeout(t)
	source, err := workloadapi.NewJWTSource(ctx, workloadapi.WithClientOptions(options(a)))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	svid, err := source.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "db", ExtraAudiences: []string{"cache"}})
	if err != nil {
		t.Fatal(err)
	}
	if svid.ID.String() != "spiffe://example.org/jwt" || len(svid.Audience) != 2 {
		t.Errorf("ID %s, audience %v", svid.ID, svid.Audience)
	}
	if _, err := jwtsvid.ParseAndValidate(svid.Marshal(), source, []string{"cache"}); err != nil {
		t.Errorf("the token does not validate against the bundle: %v", err)
	}
	validated, err := workloadapi.ValidateJWTSVID(ctx, svid.Marshal(), "db", options(a))
	if err != nil || validated.ID != svid.ID {
		t.Errorf("ValidateJWTSVID: %v", err)
	}
	if _, err := workloadapi.ValidateJWTSVID(ctx, svid.Marshal(), "other", options(a)); status.Code(err) != codes.InvalidArgument {
		t.Errorf("wrong audience: %v", err)
	}
}

func TestUnregisteredCallerIsHeldThenTold(t *testing.T) {
	a := startAgent(t, "workloadAPI: {fetchWait: 300ms}\n")
	begin := time.Now()
	_, err := workloadapi.FetchX509SVIDs(withTimeout(t), options(a))
	if status.Code(err) != codes.PermissionDenied || !strings.Contains(err.Error(), "no identity issued") {
		t.Errorf("got %v", err)
	}
	if held := time.Since(begin); held < 250*time.Millisecond {
		t.Errorf("refused after %s; it should have been held", held)
	}
}

func TestHeldCallerIsServedWhenTheEntryAppears(t *testing.T) {
	a := startAgent(t, "workloadAPI: {fetchWait: 20s}\n")
	got := make(chan error, 1)
	go func() {
		svids, err := workloadapi.FetchX509SVIDs(withTimeout(t), options(a))
		if err == nil && svids[0].ID.String() != "spiffe://example.org/held" {
			err = fmt.Errorf("ID %s", svids[0].ID)
		}
		got <- err
	}()
	a.createEntry("/held", "-selector", self())
	if err := <-got; err != nil {
		t.Error(err)
	}
}

func TestSecurityHeader(t *testing.T) {
	a := startAgent(t, "")
	client := workload.NewSpiffeWorkloadAPIClient(a.dial())
	for name, md := range map[string]metadata.MD{
		"missing": {},
		"wrong":   {"workload.spiffe.io": {"True"}},
		"twice":   {"workload.spiffe.io": {"true", "true"}},
	} {
		_, err := client.FetchJWTSVID(metadata.NewOutgoingContext(withTimeout(t), md), &workload.JWTSVIDRequest{Audience: []string{"a"}})
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "security header missing from request") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestHints(t *testing.T) {
	a := startAgent(t, "")
	a.createEntry("/internal", "-selector", self(), "-hint", "internal")
	a.createEntry("/external", "-selector", self(), "-hint", "external")
	svids, err := workloadapi.FetchX509SVIDs(withTimeout(t), options(a))
	if err != nil {
		t.Fatal(err)
	}
	hints := map[string]string{}
	for _, s := range svids {
		hints[s.Hint] = s.ID.Path()
	}
	if hints["internal"] != "/internal" || hints["external"] != "/external" {
		t.Errorf("hints %v", hints)
	}
}

// asWorkload is what this test binary does when it is run as a workload: it
// serves or dials mutual TLS with go-spiffe alone.
const asWorkload = "SPIFFE_NODE_INTEROP_WORKLOAD"

func TestMain(m *testing.M) {
	if role := os.Getenv(asWorkload); role != "" {
		if err := workloadMain(role); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		return
	}
	code := m.Run()
	if dir, err := built(); err == nil {
		_ = os.RemoveAll(dir)
	}
	os.Exit(code)
}

func workloadMain(role string) error {
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	address := os.Getenv("ADDRESS")
	if role == "server" {
		l, err := spiffetls.Listen(ctx, "tcp", "127.0.0.1:0", tlsconfig.AuthorizeID(spiffeid.RequireFromString("spiffe://example.org/client")))
		if err != nil {
			return err
		}
		fmt.Println("listening", l.Addr())
		c, err := l.Accept()
		if err != nil {
			return err
		}
		defer c.Close()
		_, err = io.WriteString(c, "hello\n")
		return err
	}
	c, err := spiffetls.Dial(ctx, "tcp", address, tlsconfig.AuthorizeID(spiffeid.RequireFromString("spiffe://example.org/server")))
	if err != nil {
		return err
	}
	defer c.Close()
	line, err := bufio.NewReader(c).ReadString('\n')
	fmt.Print("answer ", line)
	return err
}

// startRole runs a copy of this binary, so that its path is its own.
func startRole(t *testing.T, a *agent, role, address string) *bufio.Reader {
	t.Helper()
	path := rolePath(t, a, role)
	cmd := exec.CommandContext(t.Context(), path)
	cmd.Env = append(os.Environ(), asWorkload+"="+role, "ADDRESS="+address, "SPIFFE_ENDPOINT_SOCKET=unix://"+a.socket())
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	return bufio.NewReader(out)
}

func rolePath(t *testing.T, a *agent, role string) string {
	t.Helper()
	path := filepath.Join(a.dir, role)
	if _, err := os.Stat(path); err == nil {
		return path
	}
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func TestMutualTLSBetweenTwoWorkloads(t *testing.T) {
	a := startAgent(t, "")
	for _, role := range []string{"server", "client"} {
		a.createEntry("/"+role, "-selector", "unix:path:"+rolePath(t, a, role))
	}
	server := startRole(t, a, "server", "")
	line, err := server.ReadString('\n')
	address, ok := strings.CutPrefix(strings.TrimSpace(line), "listening ")
	if err != nil || !ok {
		t.Fatalf("server: %q %v", line, err)
	}
	client := startRole(t, a, "client", address)
	if line, err := client.ReadString('\n'); err != nil || line != "answer hello\n" {
		t.Errorf("client: %q %v\n%s", line, err, a.log)
	}
}
