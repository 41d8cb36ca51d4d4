package attest

import (
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/spiffe-node/spiffe-node/internal/procfs"
)

// Mode says which kinds of selectors callers get.
type Mode string

const (
	// ModeAuto is ModeBoth if this process runs in a pod or the configuration
	// speaks of pods (KubeletCgroups, RequireLedger), else ModeUnix.
	ModeAuto Mode = ""
	// ModeUnix gives unix selectors; cgroups are not looked at.
	ModeUnix Mode = "unix"
	// ModeKubernetes gives k8s selectors; callers outside pods get none.
	ModeKubernetes Mode = "k8s"
	// ModeBoth gives unix selectors, and k8s selectors inside pods.
	ModeBoth Mode = "k8s+unix"
)

// Config is what New needs. The zero value works on a machine without
// Kubernetes.
type Config struct {
	Mode Mode
	// Pods is the witness that knows pods by their UID; nil: none, callers get
	// no more of their pod than its UID.
	Pods PodSource
	// RequireLedger gives a caller in a pod no selectors at all until Pods
	// knows the pod from the ledger.
	RequireLedger bool
	// KubeletCgroups are the absolute cgroups below which the kubelet puts
	// pods, such as /kubepods.slice. Empty: learned from this process's own
	// group if it runs in a pod, else the kubelet's and kind's usual places.
	KubeletCgroups []string
	// OwnCgroup is the absolute cgroup that is the root of this process's
	// cgroup namespace; "" to learn it. Needed only in a cgroup namespace of
	// one's own where the host's cgroups cannot be seen.
	OwnCgroup string
	// HostCgroupFS is a directory where the host's cgroup file systems are
	// mounted; "": found among the mounts, else /proc/1/root/sys/fs/cgroup (which
	// needs the rights of ptrace). Read once, to learn OwnCgroup.
	HostCgroupFS string
	// Unix says what unix selectors are made of.
	Unix UnixConfig
	// Proc is the mount point of proc; "" is /proc.
	Proc string
	// Logger receives what an operator should know; nil: nothing is logged.
	Logger *slog.Logger
}

// UnixConfig says what unix selectors are made of.
type UnixConfig struct {
	// DiscoverPath adds unix:path and unix:sha256. The path is what the caller's
	// own mount namespace calls its executable; only the hash says what it is.
	DiscoverPath bool
	// SizeLimit is the largest executable that is hashed, in bytes; 0: no
	// limit, negative: unix:sha256 is never given. A larger one has no
	// unix:sha256.
	SizeLimit int64
	// PasswdFile and GroupFile name the users and groups; "" is /etc/passwd and
	// /etc/group. Changes are seen within two seconds.
	PasswdFile, GroupFile string
}

// Attestor binds callers. Safe for concurrent use.
type Attestor struct {
	mode          Mode
	proc          *procfs.FS
	source        PodSource
	requireLedger bool
	cgroups       *cgroups // nil when cgroups are not looked at
	unix          UnixConfig
	users, groups *names
	hashes        hashes
	log           *slog.Logger
	warned        atomic.Int64 // when, in nanoseconds since 1970

	mu   sync.Mutex
	pods map[string]*podState // pod UID -> pod with at least one binding
}

// New learns this process's place among the cgroups and returns an Attestor.
// It fails in the Kubernetes modes when that place cannot be learned; the
// error says what to configure.
func New(cfg Config) (*Attestor, error) {
	a := &Attestor{
		mode:          cfg.Mode,
		proc:          procfs.New(cfg.Proc),
		source:        cfg.Pods,
		requireLedger: cfg.RequireLedger,
		unix:          cfg.Unix,
		users:         newNames(cfg.Unix.PasswdFile, "/etc/passwd"),
		groups:        newNames(cfg.Unix.GroupFile, "/etc/group"),
		log:           cfg.Logger,
		pods:          make(map[string]*podState),
	}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	switch a.mode {
	case ModeAuto, ModeUnix, ModeKubernetes, ModeBoth:
	default:
		return nil, fmt.Errorf("attest: mode %q is none of %q, %q, %q", a.mode, ModeUnix, ModeKubernetes, ModeBoth)
	}
	if a.mode == ModeUnix {
		return a, nil
	}
	c, err := learnCgroups(a.proc, cfg)
	switch {
	case err != nil && a.mode == ModeAuto:
		return nil, fmt.Errorf("attest: cannot tell whether this process runs in a pod; if it does not, set the mode %q: %w", ModeUnix, err)
	case err != nil:
		return nil, fmt.Errorf("attest: %w", err)
	case a.mode == ModeAuto && !c.inPod && len(cfg.KubeletCgroups) == 0 && !cfg.RequireLedger:
		a.mode = ModeUnix
		a.log.Info("attesting by unix user only: this process does not run in a pod", slog.String("mode", string(a.mode)))
		return a, nil
	case a.mode == ModeAuto:
		a.mode = ModeBoth
	}
	if cfg.RequireLedger && cfg.Pods == nil {
		return nil, errors.New("attest: the ledger is required but there is none; configure its directory")
	}
	a.cgroups = c
	a.log.Info("attesting pods by cgroup",
		slog.String("mode", string(a.mode)), slog.Any("kubelet_cgroups", c.layout.roots),
		slog.String("cgroup_namespace", c.resolver.describe()))
	return a, nil
}

// Mode is the mode in use, never ModeAuto.
func (a *Attestor) Mode() Mode { return a.mode }

// KubeletCgroups are the cgroups below which pods are looked for; nil in
// ModeUnix.
func (a *Attestor) KubeletCgroups() []string {
	if a.cgroups == nil {
		return nil
	}
	return append([]string(nil), a.cgroups.layout.roots...)
}
