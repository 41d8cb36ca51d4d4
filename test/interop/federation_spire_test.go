package interop_test

import (
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"time"
)

// spireSite starts a SPIRE Server whose bundle endpoint has the profile.
func spireSite(t *testing.T, td, profile string) *site {
	t.Helper()
	if os.Getenv("SPIRE_SERVER") == "" {
		t.Skip("SPIRE_SERVER does not name a spire-server binary")
	}
	dir, err := os.MkdirTemp("", "sn-") //nolint:usetesting // t.TempDir is too long for a socket
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	server := &spireServer{&authority{agent: &agent{t: t, dir: dir, log: &logBuffer{}}, address: freeAddress(t)}}
	s := &site{authority: server.authority, td: td, endpoint: freeAddress(t)}
	_, port, err := net.SplitHostPort(s.address)
	if err != nil {
		t.Fatal(err)
	}
	_, endpointPort, err := net.SplitHostPort(s.endpoint)
	if err != nil {
		t.Fatal(err)
	}
	doc := fmt.Sprintf(`server {
	bind_address = "127.0.0.1"
	bind_port = %q
	socket_path = %q
	trust_domain = %q
	data_dir = %q
	federation { bundle_endpoint { address = "127.0.0.1" port = %s refresh_hint = "1m" %s } }
}
plugins {
	DataStore "sql" { plugin_data { database_type = "sqlite3" connection_string = %q } }
	NodeAttestor "join_token" { plugin_data {} }
	KeyManager "memory" { plugin_data {} }
}
`, port, s.admin(), td, dir, endpointPort, profile, s.path("db.sqlite3"))
	if err := os.WriteFile(s.path("server.conf"), []byte(doc), 0o600); err != nil {
		t.Fatal(err)
	}
	server.start()
	t.Cleanup(s.stop)
	if err := os.WriteFile(s.path("bundle.pem"), []byte(s.cli("bundle", "show")), 0o600); err != nil {
		t.Fatal(err)
	}
	return s
}

// Our authority and a SPIRE Server federate with each other.
func TestFederationWithSPIREServer(t *testing.T) {
	cert, key, roots := webCertificate(t, t.TempDir())
	for name, profile := range map[string]string{
		"https_spiffe": `profile "https_spiffe" {}`,
		"https_web":    fmt.Sprintf(`profile "https_web" { serving_cert_file { cert_file_path = %q key_file_path = %q file_sync_interval = "1h" } }`, cert, key),
	} {
		t.Run(name, func(t *testing.T) {
			theirs := spireSite(t, "spire.test", profile)
			ours := startSite(t, "node.test", "24h", "", "SSL_CERT_FILE="+roots)
			args := []string{"federation", "create", "-trustDomain", theirs.td, "-bundleEndpointProfile", name, "-bundleEndpointURL", "https://" + theirs.endpoint}
			if name == "https_spiffe" {
				args = append(args, "-endpointSpiffeID", "spiffe://"+theirs.td+"/spire/server", "-trustDomainBundlePath", theirs.path("bundle.pem"))
			}
			ours.cli(args...)
			theirs.cli("federation", "create", "-trustDomain", ours.td, "-bundleEndpointProfile", "https_spiffe", "-bundleEndpointURL", "https://"+ours.endpoint,
				"-endpointSpiffeID", "spiffe://"+ours.td+"/spire/server", "-trustDomainBundlePath", ours.path("bundle.pem"))
			for name, pair := range map[string][2]*site{"ours has theirs": {ours, theirs}, "theirs has ours": {theirs, ours}} {
				eventually(t, 30*time.Second, name, func() error {
					have, err := pair[0].tryCLI("bundle", "list", "-id", pair[1].td)
					if err != nil || have != pair[1].cli("bundle", "show") {
						return fmt.Errorf("it has %s, %w", have, err)
					}
					if doc := pair[0].cli("bundle", "list", "-id", pair[1].td, "-format", "spiffe"); !strings.Contains(doc, "jwt-svid") {
						return fmt.Errorf("JWT keys are missing: %s", doc)
					}
					return nil
				})
				if out := pair[0].cli("federation", "refresh", "-id", pair[1].td); strings.TrimSpace(out) != "Bundle refreshed" {
					t.Error(out)
				}
			}
			if out := theirs.cli("federation", "list", "-o", "wide"); !strings.Contains(out, ours.td) {
				t.Error(out)
			}
		})
	}
}
