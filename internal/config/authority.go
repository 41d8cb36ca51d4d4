package config

import (
	"fmt"
	"net"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"
)

// AuthorityKind is the kind of an authority's configuration file.
const AuthorityKind = "AuthorityConfiguration"

// AuthorityProcess is the configuration file of cmd/authority. The doc tags are
// the reference that docs/configuration.md is made from; DefaultAuthority gives
// the defaults.
type AuthorityProcess struct {
	APIVersion      string          `yaml:"apiVersion" doc:"Version of this document; config.spiffe-node.io/v1alpha1."`
	Kind            string          `yaml:"kind" doc:"AuthorityConfiguration."`
	TrustDomain     string          `yaml:"trustDomain" doc:"Name of the trust domain, such as example.org. Required, here or as --trust-domain."`
	Server          AuthorityServer `yaml:"server"`
	Admin           AuthorityAdmin  `yaml:"admin"`
	Embedded        Embedded        `yaml:"embedded"`
	NodeAttestation NodeAttestation `yaml:"nodeAttestation"`
	Registration    Registration    `yaml:"registration"`
	Federation      Federation      `yaml:"federation"`
	StartupTaint    StartupTaint    `yaml:"startupTaint"`
	RateLimits      RateLimits      `yaml:"rateLimits"`
	Health          Health          `yaml:"health"`
	Log             Log             `yaml:"log"`
}

// AuthorityServer is the SPIRE Server API over TLS.
type AuthorityServer struct {
	Address  string   `yaml:"address" doc:"host:port of the SPIRE Server API for agents (TLS with the server's own X.509-SVID); empty: off."`
	AdminIDs []string `yaml:"adminIDs" doc:"SPIFFE IDs that may use the administrative calls over TLS, beside those with an admin entry. IDs of another trust domain need its bundle here."`
}

// AuthorityAdmin is the owner-only socket.
type AuthorityAdmin struct {
	SocketPath string `yaml:"socketPath" doc:"Owner-only socket with the whole SPIRE Server API."`
	Group      string `yaml:"group" doc:"Group that may use the socket beside the owner, name or number; empty: none."`
}

// NodeAttestation says how agents prove which node they run on.
type NodeAttestation struct {
	JoinToken JoinTokenAttestation `yaml:"joinToken"`
	K8sPSAT   K8sPSATAttestation   `yaml:"k8sPSAT"`
	X509PoP   X509PoPAttestation   `yaml:"x509pop"`
}

// JoinTokenAttestation lets agents attest with a token made by an administrator.
type JoinTokenAttestation struct {
	Disabled bool `yaml:"disabled" doc:"Attest nobody by join_token, and make no tokens."`
}

// K8sPSATAttestation lets agents attest with the projected service account
// token of their pod.
type K8sPSATAttestation struct {
	Cluster                 string   `yaml:"cluster" doc:"Name of the cluster, as the agents call it; part of their SPIFFE IDs. Empty: attest nobody by k8s_psat."`
	ServiceAccountAllowList []string `yaml:"serviceAccountAllowList" doc:"Service accounts (namespace:name) whose pods are agents. Required with cluster."`
	Audience                []string `yaml:"audience" doc:"Audiences of the agents' tokens, one of which must be in the token."`
	AllowedNodeLabelKeys    []string `yaml:"allowedNodeLabelKeys" doc:"Labels of the node that become agent_node_label selectors."`
	AllowedPodLabelKeys     []string `yaml:"allowedPodLabelKeys" doc:"Labels of the agent's pod that become agent_pod_label selectors."`
	KubeConfigFile          string   `yaml:"kubeConfigFile" doc:"Kubeconfig of the cluster; empty: the pod's own service account."`
}

// X509PoPAttestation lets agents attest with a certificate of their machine.
type X509PoPAttestation struct {
	Mode              string   `yaml:"mode" doc:"Whose certificates are agents (x509pop): external_pki = those of the CAs in caBundlePaths; spiffe = X.509-SVIDs of this trust domain below svidPrefix. Empty: attest nobody by x509pop."`
	CABundlePaths     []string `yaml:"caBundlePaths" doc:"Files with the CA certificates (PEM) of mode external_pki, read anew at each attestation. Everybody who has a certificate of such a CA is an agent."`
	SVIDPrefix        string   `yaml:"svidPrefix" doc:"Path below which an X.509-SVID makes an agent in mode spiffe; the rest of its path is in the agent's SPIFFE ID."`
	AgentPathTemplate string   `yaml:"agentPathTemplate" doc:"Go template for the agent's path below /spire/agent, which must begin with /x509pop/; fields as in SPIRE, no functions beside Go's own. Empty: /x509pop/ and the certificate's SHA-1 fingerprint, in mode spiffe the rest of the SVID's path."`
	MaxIntermediates  int      `yaml:"maxIntermediates" doc:"Intermediate certificates that an agent may send."`
	MaxRSAKeySize     int      `yaml:"maxRSAKeySize" doc:"Largest RSA key of a certificate, in bits."`
	VerifyClientIP    bool     `yaml:"verifyClientIP" doc:"Let an agent in only from an address that is an IP SAN of its certificate. Not behind a proxy."`
}

// Registration is the registrar for Kubernetes pods and the CRDs of
// spire.spiffe.io.
type Registration struct {
	Enabled          bool     `yaml:"enabled" doc:"Write entries for pods and for ClusterSPIFFEID, ClusterStaticEntry and ClusterFederatedTrustDomain. Off where a SPIRE controller manager does that."`
	ClusterDomain    string   `yaml:"clusterDomain" doc:"End of the DNS names of services, such as cluster.local; empty: names end in .svc."`
	IgnoreNamespaces []string `yaml:"ignoreNamespaces" doc:"Regular expressions; a namespace whose whole name matches one gets nothing from a ClusterSPIFFEID."`
	ClassName        string   `yaml:"className" doc:"Class of the resources that are handled beside those without a class."`
	IgnoreClassless  bool     `yaml:"ignoreClassless" doc:"Leave resources without a class to others."`
}

// StartupTaint is taken off nodes that can give pods their identities.
type StartupTaint struct {
	Key    string `yaml:"key" doc:"Taint that is removed from a node once its driver is registered and its agent can issue, whatever its effect; empty: none is. Needs the right to patch nodes."`
	Driver string `yaml:"driver" doc:"Name of the CSI driver that must be registered."`
}

// RateLimits are those of the TLS listener, per address of a caller.
type RateLimits struct {
	Attestation bool `yaml:"attestation" doc:"Let an address attest once per second; more wait."`
	Signing     bool `yaml:"signing" doc:"Let an address have 500 SVIDs of each kind signed per second; more wait."`
}

// DefaultAuthority is a configuration with every default filled in; only the
// trust domain is missing.
func DefaultAuthority() AuthorityProcess {
	agent := Default()
	return AuthorityProcess{
		APIVersion: APIVersion,
		Kind:       AuthorityKind,
		Server:     AuthorityServer{Address: "0.0.0.0:8081"},
		Admin:      AuthorityAdmin{SocketPath: agent.Admin.SocketPath},
		Embedded:   agent.Authority.Embedded,
		NodeAttestation: NodeAttestation{
			K8sPSAT: K8sPSATAttestation{Audience: []string{"spire-server"}},
			X509PoP: X509PoPAttestation{SVIDPrefix: "/spire-exchange/", MaxIntermediates: 4, MaxRSAKeySize: 8192},
		},
		Registration: Registration{IgnoreNamespaces: []string{"kube-system", "kube-public", "spire-system"}},
		Federation: Federation{BundleEndpoint: BundleEndpoint{
			Profile: ProfileSPIFFE, RefreshHint: Duration(5 * time.Minute),
			ACME: ACME{CacheDirectory: "/var/lib/spiffe-node/bundle-acme"},
		}},
		RateLimits:   RateLimits{Attestation: true, Signing: true},
		Health:       Health{Address: "0.0.0.0:9983"},
		Log:          agent.Log,
		StartupTaint: StartupTaint{Driver: "csi.spiffe.io"},
	}
}

// LoadAuthority is Load for the authority.
func LoadAuthority(path string, override func(*AuthorityProcess)) (*AuthorityProcess, error) {
	return load(path, override, ParseAuthority)
}

// ParseAuthority is Parse for the authority.
func ParseAuthority(name string, data []byte, override func(*AuthorityProcess)) (*AuthorityProcess, error) {
	return parse(name, data, DefaultAuthority(), override)
}

func (a *AuthorityProcess) header() (apiVersion, kind *string) { return &a.APIVersion, &a.Kind }

func (a *AuthorityProcess) problems(*yaml.Node) []*Problem {
	var c collector
	c.says(a, AuthorityKind, a.TrustDomain)
	c.hostPort("server.address", a.Server.Address)
	for i, id := range a.Server.AdminIDs {
		if _, err := spiffeid.FromString(id); err != nil {
			c.add(fmt.Sprintf("server.adminIDs[%d]", i), "%q: %v", id, err)
		}
	}
	c.absolute("admin.socketPath", a.Admin.SocketPath)
	a.Embedded.check(&c, "embedded.")
	a.NodeAttestation.K8sPSAT.check(&c)
	a.NodeAttestation.X509PoP.check(&c)
	if a.Registration.Enabled && a.NodeAttestation.K8sPSAT.Cluster == "" {
		c.add("registration.enabled", "needs nodeAttestation.k8sPSAT.cluster: entries name the agents by cluster and node")
	}
	a.StartupTaint.check(&c, a.NodeAttestation.K8sPSAT.Cluster)
	for i, text := range a.Registration.IgnoreNamespaces {
		if _, err := regexp.Compile(text); err != nil {
			c.add(fmt.Sprintf("registration.ignoreNamespaces[%d]", i), "%q: %v", text, err)
		}
	}
	a.Federation.BundleEndpoint.check(&c, time.Duration(a.Embedded.CATTL))
	c.hostPort("health.address", a.Health.Address)
	c.oneOf("log.level", strings.ToLower(a.Log.Level), "debug", "info", "warn", "error")
	c.oneOf("log.format", a.Log.Format, "json", "text")
	return c
}

// taintKey is what the API server takes for one.
var taintKey = regexp.MustCompile(`^([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$`)

func (s *StartupTaint) check(c *collector, cluster string) {
	if s.Key == "" {
		return
	}
	if !taintKey.MatchString(s.Key) {
		c.add("startupTaint.key", "%q is not the key of a taint, such as spiffe-node.io/agent-not-ready", s.Key)
	}
	if strings.HasPrefix(s.Key, "node.kubernetes.io/") || strings.HasPrefix(s.Key, "node-role.kubernetes.io/") {
		c.add("startupTaint.key", "%q belongs to Kubernetes; choose one of your own", s.Key)
	}
	if s.Driver == "" {
		c.add("startupTaint.driver", "is missing; name the CSI driver")
	}
	if cluster == "" {
		c.add("startupTaint.key", "needs nodeAttestation.k8sPSAT.cluster: an agent's ID says on which node it is")
	}
}

// hostPort checks an address that may be empty.
func (c *collector) hostPort(key, address string) {
	if address == "" {
		return
	}
	if _, _, err := net.SplitHostPort(address); err != nil {
		c.add(key, "%q is not host:port", address)
	}
}

func (k *K8sPSATAttestation) check(c *collector) {
	const key = "nodeAttestation.k8sPSAT."
	if k.Cluster == "" {
		if len(k.ServiceAccountAllowList) > 0 {
			c.add(key+"cluster", "is missing, but serviceAccountAllowList is set; name the cluster")
		}
		return
	}
	if err := spiffeid.ValidatePathSegment(k.Cluster); err != nil {
		c.add(key+"cluster", "%q cannot be part of an agent's SPIFFE ID: %v", k.Cluster, err)
	}
	if len(k.ServiceAccountAllowList) == 0 {
		c.add(key+"serviceAccountAllowList", "is empty; name the agents' service account, such as spiffe-node:spiffe-node")
	}
	for i, sa := range k.ServiceAccountAllowList {
		if namespace, name, ok := strings.Cut(sa, ":"); !ok || namespace == "" || name == "" || strings.Contains(name, ":") {
			c.add(fmt.Sprintf(key+"serviceAccountAllowList[%d]", i), "%q is not namespace:name", sa)
		}
	}
	if len(k.Audience) == 0 || slices.Contains(k.Audience, "") {
		c.add(key+"audience", "must name at least one audience, and no empty one: a token made for somebody else must not attest a node")
	}
	if k.KubeConfigFile != "" {
		c.absolute(key+"kubeConfigFile", k.KubeConfigFile)
	}
}

func (x *X509PoPAttestation) check(c *collector) {
	const key = "nodeAttestation.x509pop."
	if x.Mode != "" {
		c.oneOf(key+"mode", x.Mode, "external_pki", "spiffe")
	}
	switch {
	case x.Mode == "external_pki" && len(x.CABundlePaths) == 0:
		c.add(key+"caBundlePaths", "is empty; name the files with the CAs of the agents' certificates")
	case x.Mode == "spiffe" && len(x.CABundlePaths) > 0:
		c.add(key+"caBundlePaths", "does not count in mode spiffe, where the trust domain's own bundle does; leave it out")
	case x.Mode == "" && len(x.CABundlePaths) > 0:
		c.add(key+"mode", "is missing, but caBundlePaths is set; say external_pki")
	}
	for i, name := range x.CABundlePaths {
		c.absolute(fmt.Sprintf(key+"caBundlePaths[%d]", i), name)
	}
	if !strings.HasPrefix(x.SVIDPrefix, "/") || x.SVIDPrefix == "/" {
		c.add(key+"svidPrefix", "%q is not a path set aside for agents, such as /spire-exchange/", x.SVIDPrefix)
	}
	c.positive(key+"maxIntermediates", x.MaxIntermediates)
	c.positive(key+"maxRSAKeySize", x.MaxRSAKeySize)
}
