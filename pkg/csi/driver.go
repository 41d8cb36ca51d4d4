package csi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"regexp"
	"strings"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"

	"github.com/spiffe-node/spiffe-node/internal/ledger"
	"github.com/spiffe-node/spiffe-node/internal/mount"
)

// DefaultName is the driver's name in pods and in the CSIDriver object.
const DefaultName = "csi.spiffe.io"

// DefaultKubeletRoot is the kubelet's --root-dir where nobody changed it.
const DefaultKubeletRoot = "/var/lib/kubelet"

// DefaultSocketNames are the names under which an agent may listen in the
// socket directory: Istio's, SPIRE's, and the one of older set-ups.
func DefaultSocketNames() []string { return []string{"socket", "spire-agent.sock", "api.sock"} }

// Config is what a Driver needs.
type Config struct {
	// Name is the driver's name; empty is DefaultName.
	Name string
	// Version is shown by GetPluginInfo; empty is "unknown".
	Version string
	// NodeID is the node's name as the kubelet knows it.
	NodeID string
	// SourceDir is the agent's socket directory, as the driver sees it.
	SourceDir string
	// SocketNames are the names an agent may listen under; nil is
	// DefaultSocketNames.
	SocketNames []string
	// AgentCheck says what a publish asks of the agent; empty is CheckConnect.
	AgentCheck AgentCheck
	// KubeletRoot is the kubelet's --root-dir; empty is DefaultKubeletRoot. It
	// must exist; it may be a symbolic link.
	KubeletRoot string
	// AnyVolumeID accepts volume IDs that are not the kubelet's for the pod
	// and volume of the target path. The path is checked all the same.
	AnyVolumeID bool
	// ReadOnly makes the mount on the host read-only too. It is read-write by
	// default, as with spiffe-csi, so that a runtime that relabels volumes
	// for SELinux can; in containers it is read-only either way.
	ReadOnly bool
	// Ledger takes the records.
	Ledger Ledger
	// Mounts does the mounting; nil is the kernel.
	Mounts Mounts
	// Logger may be nil.
	Logger *slog.Logger
	// Metrics may be nil.
	Metrics *Metrics
}

// Ledger keeps the records of published volumes. [ledger.Store] is one. It must
// be safe for concurrent use, and what Put returned nil for must be seen by
// readers in other processes.
type Ledger interface {
	Get(volumeID string) (ledger.Record, bool)
	Put(r ledger.Record) error
	Delete(volumeID string) error
	List() []ledger.Record
	Len() int
	// Refresh reads again what another process may have written.
	Refresh() error
	// Writable is nil if Put would work now.
	Writable() error
}

// Mounts opens mount targets.
type Mounts interface {
	// Target is [mount.OpenTarget].
	Target(root, rel string) (Target, error)
	// Table is [mount.ReadTable].
	Table() (mount.Table, error)
}

// Target is one open mount target; see [mount.Target] for the contract of each
// method.
type Target interface {
	Path() string
	Lock(ctx context.Context) error
	Look() (mount.State, error)
	OpenMounted() (*mount.Source, error)
	Mkdir(perm uint32) error
	Bind(src *mount.Source, o mount.Options) error
	Unmount() (lazy bool, err error)
	Rmdir() error
	Close()
}

// hostMounts is the kernel.
type hostMounts struct{}

func (hostMounts) Target(root, rel string) (Target, error) {
	t, err := mount.OpenTarget(root, rel)
	if err != nil {
		return nil, err // not a nil *mount.Target in a non-nil interface
	}
	return t, nil
}

func (hostMounts) Table() (mount.Table, error) { return mount.ReadTable() }

// HostMounts is the kernel as Mounts, for those who wrap it.
func HostMounts() Mounts { return hostMounts{} }

// Driver implements the Identity and Node services. Safe for concurrent use.
type Driver struct {
	csipb.UnimplementedIdentityServer
	csipb.UnimplementedNodeServer

	cfg     Config
	log     *slog.Logger
	metrics *Metrics
	agent   *agentCheck
	locks   keyLocks
	copies  mount.Copies
	// roots are the spellings of the kubelet root in target paths: as
	// configured and with symbolic links resolved.
	roots []string
}

// nameRule is the one csi-sanity and the kubelet's file names ask for.
var nameRule = regexp.MustCompile(`^[A-Za-z]([A-Za-z0-9._-]{0,61}[A-Za-z])?$`)

// New checks the configuration and builds a driver.
func New(cfg Config) (*Driver, error) {
	if cfg.Name == "" {
		cfg.Name = DefaultName
	}
	if cfg.Version == "" {
		cfg.Version = "unknown"
	}
	if cfg.SocketNames == nil {
		cfg.SocketNames = DefaultSocketNames()
	}
	if cfg.KubeletRoot == "" {
		cfg.KubeletRoot = DefaultKubeletRoot
	}
	if cfg.Mounts == nil {
		cfg.Mounts = hostMounts{}
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = NewMetrics(nil)
	}
	if err := cfg.validate(); err != nil {
		return nil, fmt.Errorf("configure the CSI driver: %w", err)
	}
	cfg.KubeletRoot = filepath.Clean(cfg.KubeletRoot)
	cfg.SourceDir = filepath.Clean(cfg.SourceDir)
	resolved, err := filepath.EvalSymlinks(cfg.KubeletRoot)
	if err != nil {
		return nil, fmt.Errorf("configure the CSI driver: kubelet root: %w; it must be the kubelet's --root-dir and be mounted into this container at the same path", err)
	}
	check, err := newAgentCheck(cfg.AgentCheck, cfg.SocketNames)
	if err != nil {
		return nil, fmt.Errorf("configure the CSI driver: %w", err)
	}
	d := &Driver{cfg: cfg, log: cfg.Logger, metrics: cfg.Metrics, agent: check, roots: []string{cfg.KubeletRoot}}
	if resolved != cfg.KubeletRoot {
		d.roots = append(d.roots, resolved)
	}
	return d, nil
}

func (c Config) validate() error {
	switch {
	case !nameRule.MatchString(c.Name):
		return fmt.Errorf("plugin name %q must start and end with a letter and have only letters, digits, '.', '_' and '-' between, 63 at most", c.Name)
	case c.NodeID == "":
		return errors.New("node ID is empty: set it to the name of the node, for example from spec.nodeName")
	case len(c.NodeID) > 256:
		return fmt.Errorf("node ID has %d bytes, the most is 256", len(c.NodeID))
	case c.SourceDir == "":
		return errors.New("the agent's socket directory is not set")
	case !filepath.IsAbs(c.SourceDir):
		return fmt.Errorf("the agent's socket directory %q is not an absolute path", c.SourceDir)
	case !filepath.IsAbs(c.KubeletRoot):
		return fmt.Errorf("kubelet root %q is not an absolute path", c.KubeletRoot)
	case c.Ledger == nil:
		return errors.New("no publish ledger")
	}
	for _, n := range c.SocketNames {
		if n == "" || n == "." || n == ".." || strings.ContainsAny(n, "/\x00") {
			return fmt.Errorf("socket name %q is not a file name", n)
		}
	}
	return nil
}

// Name is the driver's name.
func (d *Driver) Name() string { return d.cfg.Name }

// Register adds the driver's services to a server.
func (d *Driver) Register(s grpc.ServiceRegistrar) {
	csipb.RegisterIdentityServer(s, d)
	csipb.RegisterNodeServer(s, d)
}
