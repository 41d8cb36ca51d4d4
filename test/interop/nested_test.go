package interop_test

import (
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
)

// socketDir is a directory whose path is short enough for a socket.
func socketDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "sn-") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

// waitForSVID asks an agent until it has one.
func waitForSVID(t *testing.T, of *agent, socket string) *x509svid.SVID {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(50 * time.Millisecond) {
		svid, err := workloadapi.FetchX509SVID(withTimeout(t), workloadapi.WithAddr("unix:"+socket))
		if err == nil {
			return svid
		}
		if time.Now().After(deadline) {
			t.Fatalf("%v\n%s", err, of.log)
		}
	}
}

// A SPIRE Server takes its CA from our authority, as a downstream entry lets
// it; what it signs is good for whoever trusts our bundle.
func TestNestedSPIREServer(t *testing.T) {
	if os.Getenv("SPIRE_AGENT") == "" || spireServerBinary() == "" {
		t.Skip("SPIRE_AGENT and SPIFFE_NODE_TEST_SPIRE_SERVER do not name binaries")
	}
	const join = `NodeAttestor "join_token" { plugin_data {} }`
	a := startAuthority(t, "")
	token := a.token("")
	upper := socketDir(t)
	upperAgent := runSPIREAgent(t, a, upper, t.TempDir(), fmt.Sprintf("join_token = %q", token), join)
	a.createEntry("/nested", "-parentID", "spiffe://"+trustDomain+"/spire/agent/join_token/"+token, "-selector", self(), "-downstream")
	waitForSVID(t, upperAgent, upper+"/spire-agent.sock")

	host, port, err := net.SplitHostPort(a.address)
	if err != nil {
		t.Fatal(err)
	}
	nested := startSPIREServer(t, "", fmt.Sprintf(`UpstreamAuthority "spire" { plugin_data {
		server_address = %q
		server_port = %q
		workload_api_socket = %q
	} }`, host, port, upper+"/spire-agent.sock"))
	token = nested.token("")
	nested.createEntry("/below", "-parentID", "spiffe://"+trustDomain+"/spire/agent/join_token/"+token, "-selector", self())
	lower := socketDir(t)
	// It trusts our bundle, which is all that it is given.
	lowerAgent := runSPIREAgent(t, &authority{agent: a.agent, address: nested.address}, lower, t.TempDir(), fmt.Sprintf("join_token = %q", token), join)
	svid := waitForSVID(t, lowerAgent, lower+"/spire-agent.sock")
	if _, _, err := x509svid.Verify(svid.Certificates, a.bundle); err != nil || svid.ID.Path() != "/below" || len(svid.Certificates) < 2 {
		t.Errorf("%s with a chain of %d: %v", svid.ID, len(svid.Certificates), err)
	}
	// Its JWT key has been published in our bundle.
	token2, err := workloadapi.FetchJWTSVID(withTimeout(t), jwtsvid.Params{Audience: "audience"}, workloadapi.WithAddr("unix:"+lower+"/spire-agent.sock"))
	if err != nil {
		t.Fatal(err)
	}
	ours, err := spiffebundle.Parse(serverID.TrustDomain(), []byte(a.cli("bundle", "show", "-format", "spiffe")))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := jwtsvid.ParseAndValidate(token2.Marshal(), ours, []string{"audience"}); err != nil {
		t.Errorf("JWT-SVID: %v", err)
	}
	if out := nested.cli("bundle", "show"); strings.TrimSpace(out) != strings.TrimSpace(a.cli("bundle", "show")) {
		t.Errorf("the nested server's bundle is another:\n%s", out)
	}
}
