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
	AttestX509POP   = "x509pop"
)

// What to do when the server does not stand up to its trust bundle any more.
const (
	RebootstrapNever  = "never"
	RebootstrapAuto   = "auto"
	RebootstrapAlways = "always"
)

// SpireServer is an authority elsewhere that speaks the SPIRE Server API: a
// SPIRE Server or cmd/authority.
type SpireServer struct {
	Address         string           `yaml:"address" doc:"host:port of a SPIRE Server or authority that this agent gets identities from instead of authority.embedded; several, separated by commas, are tried in turn."`
	RequirePQKEM    bool             `yaml:"requirePQKEM" doc:"Refuse a server that does not agree on the post-quantum hybrid X25519MLKEM768 for the key of a connection (TLS 1.3)."`
	TrustBundle     TrustBundle      `yaml:"trustBundle"`
	Rebootstrap     Rebootstrap      `yaml:"rebootstrap"`
	NodeAttestation AgentAttestation `yaml:"nodeAttestation"`
	SyncInterval    Duration         `yaml:"syncInterval" doc:"Time between polls when nobody waits, give or take a tenth. A server that pushes changes is not polled."`
	WithdrawConfirm Duration         `yaml:"withdrawConfirm" doc:"How long an entry must have been missing from the server's answers before its identity is withdrawn; 0s: at the first, as SPIRE Agent does. Meanwhile it is not renewed. A server that pushes changes or refuses to sign is believed at once."`
}

// TrustBundle is where the first trust bundle comes from.
type TrustBundle struct {
	Path              string    `yaml:"path" doc:"File with the trust bundle for the first contact, such as a mounted ConfigMap; read anew for each attempt."`
	URL               string    `yaml:"url" doc:"https URL of the trust bundle instead of path; its server is verified with the system's roots."`
	UnixSocket        string    `yaml:"unixSocket" doc:"Socket at which url is fetched, as SPIRE Agent does it; url may be http then. Whoever listens there is trusted."`
	WorkloadAPISocket string    `yaml:"workloadAPISocket" doc:"Socket of a SPIFFE Workload API that knows the trust bundle, instead of path."`
	ConfigMap         BundleMap `yaml:"configMap"`
	Format            string    `yaml:"format" doc:"pem, or spiffe (SPIFFE bundle, JSON); of path, url and configMap."`
	Insecure          bool      `yaml:"insecure" doc:"Take the trust bundle from whoever answers first, instead of path. For trials only."`
}

// BundleMap is a ConfigMap with a trust bundle.
type BundleMap struct {
	Namespace string `yaml:"namespace" doc:"Namespace of configMap.name."`
	Name      string `yaml:"name" doc:"ConfigMap with the trust bundle, read through the API server with the agent's service account, instead of path."`
	Key       string `yaml:"key" doc:"Key of the trust bundle in it."`
}

// Rebootstrap is what to do about a server that has lost its keys.
type Rebootstrap struct {
	Mode  string   `yaml:"mode" doc:"What to do when the server does not stand up to its trust bundle any more, because it lost its keys or was installed anew: never (stay with the trust bundle), auto (take the bootstrap bundle again, and attest anew where possible) or always (auto, and refuse a node attestation that cannot be repeated)."`
	Delay Duration `yaml:"delay" doc:"How long that must last."`
}

// AgentAttestation is how the agent proves which node this is.
type AgentAttestation struct {
	Type              string `yaml:"type" doc:"k8s_psat, join_token or x509pop."`
	Cluster           string `yaml:"cluster" doc:"Name of the cluster in the server's configuration (k8s_psat)."`
	TokenPath         string `yaml:"tokenPath" doc:"File with the agent's projected service account token (k8s_psat), read anew each time."`
	JoinToken         string `yaml:"joinToken" doc:"Token for one attestation (join_token). A secret: prefer joinTokenFile."`
	JoinTokenFile     string `yaml:"joinTokenFile" doc:"File with the join token; read anew when the agent must attest again."`
	CertificatePath   string `yaml:"certificatePath" doc:"File with this node's certificate, PEM (x509pop), read anew each time."`
	PrivateKeyPath    string `yaml:"privateKeyPath" doc:"File with the certificate's private key, PEM, RSA or ECDSA (x509pop)."`
	IntermediatesPath string `yaml:"intermediatesPath" doc:"File with intermediate certificates, PEM (x509pop); empty: those that follow the certificate."`
	WorkloadAPISocket string `yaml:"workloadAPISocket" doc:"Socket of a SPIFFE Workload API whose X.509-SVID is the proof (x509pop in mode spiffe on the server), instead of the files."`
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
		TrustBundle:     TrustBundle{Format: "pem", ConfigMap: BundleMap{Key: "bundle.crt"}},
		Rebootstrap:     Rebootstrap{Mode: RebootstrapAuto, Delay: Duration(time.Minute)},
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
	s.rebootstrapProblems(c, key+"rebootstrap.")
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
	for _, set := range []bool{t.Path != "", t.URL != "", t.WorkloadAPISocket != "", t.ConfigMap.Name != "", t.Insecure} {
		if set {
			given++
		}
	}
	if given != 1 {
		c.add(strings.TrimSuffix(key, "."), "set exactly one of path, url, workloadAPISocket, configMap.name and insecure, so that the first contact knows whom to trust")
	}
	c.ifSetAbsolute(key+"path", t.Path)
	c.ifSetAbsolute(key+"unixSocket", t.UnixSocket)
	c.ifSetAbsolute(key+"workloadAPISocket", t.WorkloadAPISocket)
	u, err := url.Parse(t.URL)
	switch {
	case t.URL == "":
		if t.UnixSocket != "" {
			c.add(key+"url", "is missing; unixSocket only says through which socket it is fetched")
		}
	case err != nil || u.Host == "" || u.Scheme != "https" && (t.UnixSocket == "" || u.Scheme != "http"):
		c.add(key+"url", "%q is not an https URL; http needs unixSocket", t.URL)
	}
	m := t.ConfigMap
	switch {
	case m.Name == "" && m.Namespace != "":
		c.add(key+"configMap.name", "is missing, but the namespace is set")
	case m.Name != "" && m.Namespace == "":
		c.add(key+"configMap.namespace", "is missing")
	case m.Key == "":
		c.add(key+"configMap.key", "is missing")
	}
	c.oneOf(key+"format", t.Format, "pem", "spiffe")
}

func (s *SpireServer) rebootstrapProblems(c *collector, key string) {
	r := s.Rebootstrap
	c.oneOf(key+"mode", r.Mode, RebootstrapNever, RebootstrapAuto, RebootstrapAlways)
	if r.Mode == RebootstrapAlways && s.NodeAttestation.Type == AttestJoinToken {
		c.add(key+"mode", "always needs a node attestation that can be repeated; a join token cannot, use auto")
	}
	if r.Mode == RebootstrapAlways && s.TrustBundle.Insecure {
		c.add(key+"mode", "always needs a trust bundle to begin with anew, and trustBundle.insecure has none")
	}
	if time.Duration(r.Delay) < time.Second {
		c.add(key+"delay", "%s is shorter than 1s", r.Delay)
	}
}

func (n *AgentAttestation) problems(c *collector, key string) {
	c.oneOf(key+"type", n.Type, AttestPSAT, AttestJoinToken, AttestX509POP)
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
		c.ifSetAbsolute(key+"joinTokenFile", n.JoinTokenFile)
	case AttestX509POP:
		if (n.CertificatePath == "") != (n.PrivateKeyPath == "") || (n.CertificatePath == "") == (n.WorkloadAPISocket == "") {
			c.add(strings.TrimSuffix(key, "."), "x509pop needs either certificatePath and privateKeyPath or workloadAPISocket")
		}
		c.ifSetAbsolute(key+"certificatePath", n.CertificatePath)
		c.ifSetAbsolute(key+"privateKeyPath", n.PrivateKeyPath)
		c.ifSetAbsolute(key+"intermediatesPath", n.IntermediatesPath)
		c.ifSetAbsolute(key+"workloadAPISocket", n.WorkloadAPISocket)
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
