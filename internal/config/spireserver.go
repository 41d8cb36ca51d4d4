package config

import (
	"net"
	"net/url"
	"strings"
	"time"

	"go.yaml.in/yaml/v3"
)

// Node attestation types.
const (
	AttestPSAT      = "k8s_psat"
	AttestJoinToken = "join_token"
)

// SpireServer is an authority elsewhere that speaks the SPIRE Server API: a
// SPIRE Server or cmd/authority.
type SpireServer struct {
	Address         string           `yaml:"address" doc:"host:port of a SPIRE Server or authority that this agent gets identities from instead of authority.embedded; several, separated by commas, are tried in turn."`
	TrustBundle     TrustBundle      `yaml:"trustBundle"`
	NodeAttestation AgentAttestation `yaml:"nodeAttestation"`
	SyncInterval    Duration         `yaml:"syncInterval" doc:"Time between polls when nobody waits, give or take a tenth. A server that pushes changes is not polled."`
	WithdrawConfirm Duration         `yaml:"withdrawConfirm" doc:"How long an entry must have been missing from the server's answers before its identity is withdrawn; 0s: at the first, as SPIRE Agent does. Meanwhile it is not renewed. A server that pushes changes or refuses to sign is believed at once."`
}

// TrustBundle is where the first trust bundle comes from.
type TrustBundle struct {
	Path     string `yaml:"path" doc:"File with the trust bundle for the first contact, such as a mounted ConfigMap; read anew for each attempt."`
	URL      string `yaml:"url" doc:"https URL of the trust bundle instead of path; its server is verified with the system's roots."`
	Format   string `yaml:"format" doc:"pem, or spiffe (SPIFFE bundle, JSON)."`
	Insecure bool   `yaml:"insecure" doc:"Take the trust bundle from whoever answers first, instead of path or url. For trials only."`
}

// AgentAttestation is how the agent proves which node this is.
type AgentAttestation struct {
	Type          string `yaml:"type" doc:"k8s_psat or join_token."`
	Cluster       string `yaml:"cluster" doc:"Name of the cluster in the server's configuration (k8s_psat)."`
	TokenPath     string `yaml:"tokenPath" doc:"File with the agent's projected service account token (k8s_psat), read anew each time."`
	JoinToken     string `yaml:"joinToken" doc:"Token for one attestation (join_token). A secret: prefer joinTokenFile."`
	JoinTokenFile string `yaml:"joinTokenFile" doc:"File with the join token; read anew when the agent must attest again."`
}

// Enabled says whether the authority is elsewhere.
func (s *SpireServer) Enabled() bool { return s.Address != "" }

// Addresses are those in Address.
func (s *SpireServer) Addresses() []string {
	var out []string
	for a := range strings.SplitSeq(s.Address, ",") {
		if a = strings.TrimSpace(a); a != "" {
			out = append(out, a)
		}
	}
	return out
}

func defaultSpireServer() SpireServer {
	return SpireServer{
		TrustBundle:     TrustBundle{Format: "pem"},
		NodeAttestation: AgentAttestation{Type: AttestPSAT, TokenPath: "/var/run/secrets/tokens/spire-agent"}, //nolint:gosec // a path
		SyncInterval:    Duration(5 * time.Second),
		WithdrawConfirm: Duration(10 * time.Second),
	}
}

func (s *SpireServer) problems(c *collector) {
	const key = "authority.spireServer."
	if !s.Enabled() {
		if *s != defaultSpireServer() {
			c.add(key+"address", "is missing, but other keys of authority.spireServer are set")
		}
		return
	}
	if len(s.Addresses()) == 0 {
		c.add(key+"address", "%q is not host:port", s.Address)
	}
	for _, a := range s.Addresses() {
		if host, port, err := net.SplitHostPort(a); err != nil || host == "" || port == "" {
			c.add(key+"address", "%q is not host:port", a)
		}
	}
	s.TrustBundle.problems(c, key+"trustBundle.")
	s.NodeAttestation.problems(c, key+"nodeAttestation.")
	if time.Duration(s.SyncInterval) < time.Second {
		c.add(key+"syncInterval", "%s is shorter than 1s", s.SyncInterval)
	}
	if s.WithdrawConfirm < 0 {
		c.add(key+"withdrawConfirm", "%s is negative; 0s withdraws at once", s.WithdrawConfirm)
	}
}

func (t *TrustBundle) problems(c *collector, key string) {
	given := 0
	for _, set := range []bool{t.Path != "", t.URL != "", t.Insecure} {
		if set {
			given++
		}
	}
	if given != 1 {
		c.add(strings.TrimSuffix(key, "."), "set exactly one of path, url and insecure, so that the first contact knows whom to trust")
	}
	if t.Path != "" {
		c.absolute(key+"path", t.Path)
	}
	if u, err := url.Parse(t.URL); t.URL != "" && (err != nil || u.Scheme != "https" || u.Host == "") {
		c.add(key+"url", "%q is not an https URL", t.URL)
	}
	c.oneOf(key+"format", t.Format, "pem", "spiffe")
}

func (n *AgentAttestation) problems(c *collector, key string) {
	c.oneOf(key+"type", n.Type, AttestPSAT, AttestJoinToken)
	switch n.Type {
	case AttestPSAT:
		if n.Cluster == "" {
			c.add(key+"cluster", "is missing; k8s_psat needs the cluster's name in the server's configuration")
		}
		c.absolute(key+"tokenPath", n.TokenPath)
	case AttestJoinToken:
		if (n.JoinToken == "") == (n.JoinTokenFile == "") {
			c.add(strings.TrimSuffix(key, "."), "set exactly one of joinToken and joinTokenFile")
		}
		if n.JoinTokenFile != "" {
			c.absolute(key+"joinTokenFile", n.JoinTokenFile)
		}
	}
}

// oneAuthority refuses a file that configures both authorities.
func (a *Agent) oneAuthority(root *yaml.Node) []*Problem {
	if !a.Authority.SpireServer.Enabled() || root.Kind != yaml.DocumentNode || len(root.Content) == 0 {
		return nil
	}
	n := child(root.Content[0], "authority")
	if n == nil || child(n, "embedded") == nil {
		return nil
	}
	return []*Problem{{
		Key:  "authority.embedded",
		Text: "and authority.spireServer exclude each other; remove one of the two",
	}}
}
