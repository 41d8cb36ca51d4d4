package config

import (
	"fmt"
	"net"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.yaml.in/yaml/v3"

	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

// collector gathers the problems of one configuration.
type collector []*Problem

func (c *collector) add(key, format string, args ...any) {
	*c = append(*c, &Problem{Key: key, Text: fmt.Sprintf(format, args...)})
}

func (c *collector) oneOf(key, value string, allowed ...string) {
	if !slices.Contains(allowed, value) {
		c.add(key, "%q is none of %s", value, strings.Join(allowed, ", "))
	}
}

func (c *collector) positive(key string, value int) {
	if value < 1 {
		c.add(key, "%d is less than 1", value)
	}
}

func (c *collector) absolute(key, name string) {
	if !path.IsAbs(name) {
		c.add(key, "%q is not an absolute path", name)
	}
}

func (c *collector) ifSetAbsolute(key, name string) {
	if name != "" {
		c.absolute(key, name)
	}
}

// says checks that a document is what it should be, and whose.
func (c *collector) says(d document, wantKind, trustDomain string) {
	version, kind := d.header()
	if *version != APIVersion {
		c.add("apiVersion", "%q is not %q, the version this program reads", *version, APIVersion)
	}
	if *kind != wantKind {
		c.add("kind", "%q is not %q", *kind, wantKind)
	}
	if trustDomain == "" {
		c.add("trustDomain", "is missing; set it here or with --trust-domain, such as example.org")
	} else if _, err := spiffeid.TrustDomainFromString(trustDomain); err != nil {
		c.add("trustDomain", "%q: %v", trustDomain, err)
	}
}

func (a *Agent) header() (apiVersion, kind *string) { return &a.APIVersion, &a.Kind }

// problems checks everything that can be checked without touching the system,
// and fills in what depends on other keys.
func (a *Agent) problems(root *yaml.Node) []*Problem {
	var c collector
	c.says(a, Kind, a.TrustDomain)
	c.oneOf("mode", a.Mode, ModeStandalone, ModeKubernetes)
	a.checkNode(&c)
	a.checkSockets(&c)
	a.Authority.SpireServer.problems(&c)
	if !a.Authority.SpireServer.Enabled() {
		a.checkAuthority(&c)
	}
	a.checkPods(&c)
	c.oneOf("identity.x509SVIDKeyType", a.Identity.X509SVIDKeyType, "ec-p256", "ec-p384", "rsa-2048")
	c.oneOf("identity.defaultOrder", a.Identity.DefaultOrder, "node", "spire")
	if t := time.Duration(a.Identity.AvailabilityTarget); t != 0 && t < 24*time.Hour {
		c.add("identity.availabilityTarget", "%s is shorter than 24h; 0s renews at half of an SVID's life", t)
	}
	c.positive("identity.maxX509SVIDs", a.Identity.MaxX509SVIDs)
	c.positive("identity.maxJWTSVIDs", a.Identity.MaxJWTSVIDs)
	if a.WorkloadAPI.FetchWait < 0 {
		c.add("workloadAPI.fetchWait", "%s is negative; 0s answers at once", a.WorkloadAPI.FetchWait)
	}
	if a.SDS.Disabled && a.WorkloadAPI.Disabled {
		c.add("sds.disabled", "SDS and the Workload API are both disabled; nothing would be served")
	}
	c.positive("limits.connections", a.Limits.Connections)
	c.positive("limits.connectionsPerUID", a.Limits.ConnectionsPerUID)
	c.positive("limits.connectionsPerPod", a.Limits.ConnectionsPerPod)
	c.positive("limits.parkedPerPod", a.Limits.ParkedPerPod)
	c.positive("limits.streamsPerConnection", a.Limits.StreamsPerConn)
	if a.Health.Address != "" {
		if _, _, err := net.SplitHostPort(a.Health.Address); err != nil {
			c.add("health.address", "%q is not host:port", a.Health.Address)
		}
	}
	c.oneOf("log.level", strings.ToLower(a.Log.Level), "debug", "info", "warn", "error")
	c.oneOf("log.format", a.Log.Format, "json", "text")
	return append(c, a.oneAuthority(root)...)
}

func (a *Agent) checkNode(c *collector) {
	if a.Node.Name == "" {
		a.Node.Name = os.Getenv("MY_NODE_NAME")
	}
	if a.Node.Name == "" {
		if host, err := os.Hostname(); err == nil {
			a.Node.Name = host
		}
	}
	if err := spiffeid.ValidatePathSegment(a.Node.Name); err != nil {
		c.add("node.name", "%q cannot be part of the agent's SPIFFE ID: %v", a.Node.Name, err)
	}
	for i, s := range a.Node.Selectors {
		if _, err := selector.Parse(s); err != nil {
			c.add(fmt.Sprintf("node.selectors[%d]", i), "%v", err)
		}
	}
}

func (a *Agent) checkSockets(c *collector) {
	c.absolute("socket.directory", a.Socket.Directory)
	seen := map[string]bool{}
	for i, n := range append([]string{a.Socket.Name}, a.Socket.AlternateNames...) {
		key := "socket.name"
		if i > 0 {
			key = fmt.Sprintf("socket.alternateNames[%d]", i-1)
		}
		switch {
		case n == "" || n != path.Base(n) || strings.HasPrefix(n, "."):
			c.add(key, "%q must be a bare file name that does not start with a dot", n)
		case seen[n]:
			c.add(key, "%q is named twice", n)
		// sun_path holds 108 bytes, one of them the terminator; clients in pods use
		// longer directories than ours, the host's own path must fit in any case.
		case len(path.Join(a.Socket.Directory, n)) > 100:
			c.add(key, "%q is longer than a unix socket path may be (100 bytes)", path.Join(a.Socket.Directory, n))
		}
		seen[n] = true
	}
	c.absolute("admin.socketPath", a.Admin.SocketPath)
	outside := map[string]string{
		"admin.socketPath":             a.Admin.SocketPath,
		"identity.stateDirectory":      a.Identity.StateDirectory,
		"authority.embedded.statePath": a.Authority.Embedded.StatePath,
	}
	for key, name := range outside {
		if name != "" && within(a.Socket.Directory, name) && (key != "authority.embedded.statePath" || !a.Authority.SpireServer.Enabled()) {
			c.add(key, "%q lies in socket.directory, which every pod can read; choose another directory", name)
		}
	}
	if a.Identity.StateDirectory != "" && a.Identity.StateDirectory != StateAuto {
		c.absolute("identity.stateDirectory", a.Identity.StateDirectory)
	}
	if a.Mode == ModeKubernetes {
		c.absolute("attestation.kubernetes.ledgerDirectory", a.Attestation.Kubernetes.LedgerDirectory)
	}
}

func (a *Agent) checkAuthority(c *collector) {
	const key = "authority.embedded."
	a.Authority.Embedded.check(c, key)
	if socket := a.Authority.Embedded.Upstream.Parent.WorkloadAPISocket; socket != "" && within(a.Socket.Directory, socket) {
		c.add(key+"upstream.parent.workloadAPISocket", "%q lies in socket.directory: this agent would ask itself", socket)
	}
}

// check checks an authority's keys, which stand below key.
func (e *Embedded) check(c *collector, key string) {
	c.absolute(key+"statePath", e.StatePath)
	c.oneOf(key+"caKeyType", e.CAKeyType, "ec-p256", "ec-p384", "rsa-2048", "rsa-4096")
	if e.JWTKeyType == "" {
		e.JWTKeyType = e.CAKeyType
	}
	c.oneOf(key+"jwtKeyType", e.JWTKeyType, "ec-p256", "ec-p384", "rsa-2048", "rsa-4096")
	if time.Duration(e.CATTL) < time.Minute {
		c.add(key+"caTTL", "%s is shorter than 1m", e.CATTL)
	}
	e.Upstream.check(c, key+"upstream.")
	for name, ttl := range map[string]Duration{"defaultX509SVIDTTL": e.DefaultX509SVIDTTL, "defaultJWTSVIDTTL": e.DefaultJWTSVIDTTL} {
		if time.Duration(ttl) < time.Second {
			c.add(key+name, "%s is shorter than 1s", ttl)
		} else if ttl > e.CATTL {
			c.add(key+name, "%s is longer than caTTL (%s), which would cut it short", ttl, e.CATTL)
		}
	}
}

// within says whether name is dir or lies below it. Paths are those of the
// node, whatever machine the file is looked at on.
func within(dir, name string) bool {
	dir, name = path.Clean(dir), path.Clean(name)
	return name == dir || strings.HasPrefix(name, strings.TrimSuffix(dir, "/")+"/")
}
