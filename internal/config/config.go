// Package config reads the agent's configuration file: a versioned YAML document
// in the manner of a Kubernetes component configuration.
//
// It promises that a wrong file is refused before anything starts, with the
// file, line and key, that unknown and repeated keys are refused, and that
// what Parse returns has been checked and defaulted. The file holds no secrets,
// unless a join token is put there for a trial.
package config

import (
	"fmt"
	"time"

	"go.yaml.in/yaml/v3"
)

// APIVersion and Kind are what a configuration file must say it is.
const (
	APIVersion = "config.spiffe-node.io/v1alpha1"
	Kind       = "AgentConfiguration"
)

// Modes of an agent.
const (
	// ModeStandalone attests processes of one machine by unix selectors.
	ModeStandalone = "standalone"
	// ModeKubernetes attests pods too; the agent must share the host's PID
	// namespace.
	ModeKubernetes = "kubernetes"
)

// StateAuto keeps restart state where it may be kept: in DefaultStateDirectory
// if /run is in memory, as it is on every systemd machine, else nowhere.
const (
	StateAuto             = "auto"
	DefaultStateDirectory = "/run/spiffe-node/state"
)

// Agent is the configuration file. The doc tags are the reference that
// docs/configuration.md is made from; Default gives the defaults.
type Agent struct {
	APIVersion  string      `yaml:"apiVersion" doc:"Version of this document; config.spiffe-node.io/v1alpha1."`
	Kind        string      `yaml:"kind" doc:"AgentConfiguration."`
	TrustDomain string      `yaml:"trustDomain" doc:"Name of the trust domain, such as example.org. Required, here or as --trust-domain."`
	Mode        string      `yaml:"mode" doc:"standalone (processes of one machine) or kubernetes (pods; needs the host's PID namespace)."`
	Node        Node        `yaml:"node"`
	Socket      Socket      `yaml:"socket"`
	Admin       Admin       `yaml:"admin"`
	Authority   Authority   `yaml:"authority"`
	Attestation Attestation `yaml:"attestation"`
	Identity    Identity    `yaml:"identity"`
	SDS         SDS         `yaml:"sds"`
	WorkloadAPI WorkloadAPI `yaml:"workloadAPI"`
	Limits      Limits      `yaml:"limits"`
	Inspect     Inspect     `yaml:"inspect"`
	Health      Health      `yaml:"health"`
	Log         Log         `yaml:"log"`
}

// Node says which node this is.
type Node struct {
	Name      string   `yaml:"name" doc:"Name of this node; the agent's ID is spiffe://TRUST_DOMAIN/spire/agent/local/NAME. Empty: MY_NODE_NAME, else the host name."`
	Selectors []string `yaml:"selectors" doc:"Node selectors (type:value) besides local:node:NAME, so that node-alias entries written for another attestor match this node."`
}

// Socket is the public socket directory.
type Socket struct {
	Directory      string   `yaml:"directory" doc:"Directory that pods mount; made if missing, adopted if present, never removed."`
	Name           string   `yaml:"name" doc:"File name of the socket. Istio looks for socket."`
	AlternateNames []string `yaml:"alternateNames" doc:"Further names, as relative links to the socket."`
}

// Admin is the owner-only socket of the SPIRE Server API and Inspect.
type Admin struct {
	SocketPath string `yaml:"socketPath" doc:"Owner-only socket with the SPIRE Server API and Inspect. Must lie outside socket.directory."`
}

// Authority says where identities come from: the embedded authority, unless
// spireServer.address names another.
type Authority struct {
	Embedded    Embedded    `yaml:"embedded"`
	SpireServer SpireServer `yaml:"spireServer"`
}

// Embedded is the in-process authority.
type Embedded struct {
	StatePath          string    `yaml:"statePath" doc:"File with CA keys, bundles and registration entries; its directory must be owner-only."`
	CAKeyType          string    `yaml:"caKeyType" doc:"ec-p256, ec-p384, rsa-2048 or rsa-4096."`
	JWTKeyType         string    `yaml:"jwtKeyType" doc:"As caKeyType; empty: the same."`
	CATTL              Duration  `yaml:"caTTL" doc:"Life of a CA. A new one is prepared at half of it and signs from five sixths on."`
	CASubject          CASubject `yaml:"caSubject"`
	Upstream           Upstream  `yaml:"upstream"`
	DefaultX509SVIDTTL Duration  `yaml:"defaultX509SVIDTTL" doc:"Life of an X.509-SVID whose entry names none."`
	DefaultJWTSVIDTTL  Duration  `yaml:"defaultJWTSVIDTTL" doc:"Life of a JWT-SVID whose entry names none."`
	JWTIssuer          string    `yaml:"jwtIssuer" doc:"iss claim of JWT-SVIDs; empty: none."`
}

// CASubject is the subject of CA certificates.
type CASubject struct {
	Country      []string `yaml:"country" doc:"Country names."`
	Organization []string `yaml:"organization" doc:"Organization names."`
	CommonName   string   `yaml:"commonName" doc:"Common name; empty: none."`
}

// Attestation says how callers become selectors.
type Attestation struct {
	RequirePeerPIDFD bool           `yaml:"requirePeerPIDFD" doc:"Refuse to start on a kernel without SO_PEERPIDFD (older than 6.5) instead of falling back to process start times."`
	Unix             UnixAttestor   `yaml:"unix"`
	Kubernetes       KubernetesAtts `yaml:"kubernetes"`
}

// UnixAttestor gives the unix selectors.
type UnixAttestor struct {
	DiscoverWorkloadPath bool  `yaml:"discoverWorkloadPath" doc:"Add unix:path and unix:sha256 of the caller's executable."`
	WorkloadSizeLimit    int64 `yaml:"workloadSizeLimit" doc:"Largest executable in bytes that is hashed; 0: no limit, negative: never hash."`
}

// KubernetesAtts gives the k8s selectors.
type KubernetesAtts struct {
	LedgerDirectory string `yaml:"ledgerDirectory" doc:"Directory with the csi-driver's publish records (kubernetes mode)."`
	RequireLedger   bool   `yaml:"requireLedger" doc:"Give a pod no k8s selectors until a publish record names it."`
	CgroupRoot      string `yaml:"cgroupRoot" doc:"Cgroup below which the kubelet keeps pods, such as /kubepods.slice; empty: found at start."`
	Pods            Pods   `yaml:"pods"`
}

// Identity says how SVIDs are kept and chosen.
type Identity struct {
	X509SVIDKeyType    string   `yaml:"x509SVIDKeyType" doc:"ec-p256, ec-p384 or rsa-2048."`
	AvailabilityTarget Duration `yaml:"availabilityTarget" doc:"How long an X.509-SVID should still be valid whenever the authority goes away: it is renewed when that much of its life is left, not at half of it. 24h at least, and only for SVIDs that live half a day longer; 0s: at half of their life."`
	DefaultOrder       string   `yaml:"defaultOrder" doc:"Which of several matching entries is the default: node (most selectors, then oldest) or spire (smallest entry ID, as SPIRE Agent)."`
	StateDirectory     string   `yaml:"stateDirectory" doc:"Directory on tmpfs for restart state (SVIDs and keys, owner-only); empty: none is kept. auto: /run/spiffe-node/state if that is on tmpfs, else none. Must lie outside socket.directory."`
	MaxX509SVIDs       int      `yaml:"maxX509SVIDs" doc:"SVIDs kept ready for pods that have not called yet; those in use are always kept."`
	MaxJWTSVIDs        int      `yaml:"maxJWTSVIDs" doc:"JWT-SVIDs kept for reuse."`
}

// SDS is the Envoy Secret Discovery Service.
type SDS struct {
	Disabled                    bool    `yaml:"disabled" doc:"Do not serve SDS."`
	DefaultSVIDName             *string `yaml:"defaultSVIDName" doc:"Resource name of the caller's default identity; \"null\" or empty switches it off."`
	DefaultBundleName           *string `yaml:"defaultBundleName" doc:"Resource name of the own trust bundle; \"null\" or empty switches it off."`
	DefaultAllBundlesName       *string `yaml:"defaultAllBundlesName" doc:"Resource name of own and federated bundles together; \"null\" or empty switches it off."`
	DefaultHint                 string  `yaml:"defaultHint" doc:"Prefer the matching entry with this hint as default identity; empty: hints do not decide."`
	DisableSPIFFECertValidation bool    `yaml:"disableSPIFFECertValidation" doc:"Serve bundles as plain trusted_ca instead of Envoy's SPIFFE validator."`
}

// WorkloadAPI is the SPIFFE Workload API.
type WorkloadAPI struct {
	Disabled                      bool     `yaml:"disabled" doc:"Do not serve the Workload API."`
	FetchWait                     Duration `yaml:"fetchWait" doc:"How long a call without an identity is held before it gets PermissionDenied; never past 80 % of the caller's deadline. Also for FetchSecrets."`
	AllowUnauthenticatedVerifiers bool     `yaml:"allowUnauthenticatedVerifiers" doc:"Give the own trust bundle to callers without an identity."`
	AllowedForeignJWTClaims       []string `yaml:"allowedForeignJWTClaims" doc:"Claims of federated JWT-SVIDs that ValidateJWTSVID returns besides sub, exp and aud."`
}

// Limits bound what callers can use up. They apply before attestation.
type Limits struct {
	Connections       int `yaml:"connections" doc:"Open connections of all callers."`
	ConnectionsPerUID int `yaml:"connectionsPerUID" doc:"Open connections of one user ID. Pods often share one, so keep it high."`
	ConnectionsPerPod int `yaml:"connectionsPerPod" doc:"Open connections of one pod, or of one user outside pods."`
	ParkedPerPod      int `yaml:"parkedPerPod" doc:"Waiting calls of one pod, or of one user outside pods."`
	StreamsPerConn    int `yaml:"streamsPerConnection" doc:"Open streams on one connection."`
}

// Inspect is the endpoint that answers kubectl spiffe without a shell.
type Inspect struct {
	Address string `yaml:"address" doc:"host:port of the Inspect service over TLS, with the agent's SVID, for callers whose tokens and rights the API server confirms (kubernetes mode; attestation.kubernetes.pods.kubeconfig names the API server outside a pod). A loopback address is enough for kubectl spiffe. Empty: off."`
}

// Health is the health and metrics endpoint.
type Health struct {
	Address   string `yaml:"address" doc:"host:port of /livez, /readyz and /metrics; empty: off."`
	Profiling bool   `yaml:"profiling" doc:"Serve /debug/pprof there too."`
}

// Log says what is logged.
type Log struct {
	Level  string `yaml:"level" doc:"debug, info, warn or error; can be changed at run time with kubectl spiffe logger set."`
	Format string `yaml:"format" doc:"json or text."`
}

// Default is a configuration with every default filled in; only the trust
// domain is missing.
func Default() Agent {
	return Agent{
		APIVersion: APIVersion,
		Kind:       Kind,
		Mode:       ModeStandalone,
		Socket: Socket{
			Directory:      "/run/spiffe-node/public",
			Name:           "socket",
			AlternateNames: []string{"spire-agent.sock", "api.sock"},
		},
		Admin: Admin{SocketPath: "/run/spiffe-node/admin/api.sock"},
		Authority: Authority{SpireServer: defaultSpireServer(), Embedded: Embedded{
			StatePath:          "/var/lib/spiffe-node/authority/authority.db",
			CAKeyType:          "ec-p256",
			CATTL:              Duration(24 * time.Hour),
			CASubject:          CASubject{Country: []string{"US"}, Organization: []string{"SPIFFE"}},
			DefaultX509SVIDTTL: Duration(time.Hour),
			DefaultJWTSVIDTTL:  Duration(5 * time.Minute),
		}},
		Attestation: Attestation{Kubernetes: KubernetesAtts{
			LedgerDirectory: "/run/spiffe-node/ledger",
			Pods:            Pods{Source: PodsAuto},
		}},
		Identity: Identity{
			X509SVIDKeyType: "ec-p256",
			DefaultOrder:    "node",
			StateDirectory:  StateAuto,
			MaxX509SVIDs:    1000,
			MaxJWTSVIDs:     1000,
		},
		SDS: SDS{
			DefaultSVIDName:       new("default"),
			DefaultBundleName:     new("ROOTCA"),
			DefaultAllBundlesName: new("ALL"),
		},
		WorkloadAPI: WorkloadAPI{FetchWait: Duration(2 * time.Second)},
		Limits: Limits{
			Connections:       10_000,
			ConnectionsPerUID: 5_000,
			ConnectionsPerPod: 256,
			ParkedPerPod:      64,
			StreamsPerConn:    2_048,
		},
		Health: Health{Address: "127.0.0.1:9982"},
		Log:    Log{Level: "info", Format: "json"},
	}
}

// Duration is a time.Duration written as Go writes it: 90s, 1h30m.
type Duration time.Duration

// UnmarshalYAML reads a Go duration; its error names the line.
func (d *Duration) UnmarshalYAML(n *yaml.Node) error {
	v, err := time.ParseDuration(n.Value)
	if err != nil || n.Kind != yaml.ScalarNode {
		return &yaml.TypeError{Errors: []string{fmt.Sprintf("line %d: %q is not a duration such as 90s or 1h30m", n.Line, n.Value)}}
	}
	*d = Duration(v)
	return nil
}

// MarshalText writes a Go duration.
func (d Duration) MarshalText() ([]byte, error) { return []byte(d.String()), nil }

// String writes a Go duration.
func (d Duration) String() string { return time.Duration(d).String() }
