package cluster

import (
	"cmp"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
)

// Version is the Kubernetes release that [Build] builds and Up runs; it is the
// version that kubernetes/go.mod requires.
const Version = "v1.34.4"

// Addresses inside the cluster's network namespace. Nothing outside can reach
// them, so they need not be free on the host.
const (
	NodeIP      = "10.88.0.1"    // of the first node, where the API server is
	allPodsCIDR = "10.88.0.0/13" // of all nodes
	serviceCIDR = "10.96.0.0/16"
	apiIP       = "10.96.0.1"
	apiPort     = 443
	bridge      = "e2e0"
	bridgeMAC   = "0a:58:0a:58:00:01"
)

// Config says where a cluster lives and how long it may. The zero value is
// usable.
type Config struct {
	// Dir is the scratch directory, owned by the cluster: Up empties it and
	// Down removes it. Empty means spiffe-node-e2e below the temporary directory.
	Dir string `json:"dir"`
	// Cache keeps built binaries between runs. Empty means
	// spiffe-node-e2e/<version> below the user's cache directory.
	Cache string `json:"cache"`
	// NodeName defaults to e2e-node.
	NodeName string `json:"nodeName"`
	// Detach lets the cluster outlive the process that called Up.
	Detach bool `json:"detach"`
	// KubeProxy adds kube-proxy, for tests that reach Services.
	KubeProxy bool `json:"kubeProxy"`
	// Images are archives (see [WriteImage]) to import before the node is Ready.
	Images []string `json:"images"`
	// Joins is the directory of the cluster that this is one more node of; [Join] sets it.
	Joins string `json:"joins"`
	// Number tells the nodes of a cluster apart: 0 is the one with the control plane.
	Number int `json:"number"`
	// Log gets progress; nil discards it.
	Log *slog.Logger `json:"-"`
}

func (c Config) withDefaults() (Config, error) {
	c.Dir = cmp.Or(c.Dir, filepath.Join(os.TempDir(), "spiffe-node-e2e"))
	c.NodeName = cmp.Or(c.NodeName, "e2e-node")
	if c.Cache == "" {
		base, err := os.UserCacheDir()
		if err != nil {
			return c, fmt.Errorf("finding a cache directory for built binaries (set XDG_CACHE_HOME or HOME): %w", err)
		}
		c.Cache = filepath.Join(base, "spiffe-node-e2e", Version)
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	for _, p := range []*string{&c.Dir, &c.Cache} {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return c, fmt.Errorf("making %s absolute: %w", *p, err)
		}
		*p = abs
	}
	if strings.HasPrefix(c.Dir, "/var/lib/") || strings.HasPrefix(c.Dir, "/run/") {
		return c, fmt.Errorf("the scratch directory %s lies where the node sees its own files; choose another, such as below /tmp", c.Dir)
	}
	return c, nil
}

// CacheDir makes and returns a directory in cfg's cache.
func CacheDir(cfg Config, name string) (string, error) {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return "", err
	}
	dir := filepath.Join(cfg.Cache, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return "", fmt.Errorf("making a directory in the cache: %w", err)
	}
	return dir, nil
}

func (c Config) path(elem ...string) string {
	return filepath.Join(append([]string{c.Dir}, elem...)...)
}

func (c Config) bin(name string) string { return filepath.Join(c.Cache, "bin", name) }

func (c Config) pki(name string) string {
	return filepath.Join(cmp.Or(c.Joins, c.Dir), "pki", name)
}

// own is a name in the directory of certificates that is the node's and not
// the cluster's.
func (c Config) own(name string) string {
	if c.Number == 0 {
		return name
	}
	return fmt.Sprintf("%s-%d", name, c.Number)
}

// inPods is an address of the node's own pod network: 10.88.x.y on the first node.
func (c Config) inPods(xy string) string { return fmt.Sprintf("10.%d.%s", 88+c.Number, xy) }

func (c Config) nodeIP() string  { return c.inPods("0.1") }
func (c Config) podCIDR() string { return c.inPods("0.0/16") }

// uplink is an address on the link between the first node, which is end 1, and
// this one, end 2.
func (c Config) uplink(end int) string { return fmt.Sprintf("10.87.%d.%d", c.Number, end) }

// cgroupRoot is where the kubelet keeps its pods, since nodes share the
// machine's cgroups.
func (c Config) cgroupRoot() string {
	if c.Number == 0 {
		return "/"
	}
	return fmt.Sprintf("/%s%d", nodeCgroup, c.Number)
}
