package peersock

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/spiffe-node/spiffe-node/internal/procfs"
)

// HostPIDNamespace says whether this process sees the PIDs of all pods on its
// node: it is in the initial PID namespace, or in that of a node that is
// itself a container (kind). In a pod's own namespace every caller would have
// PID 0. proc is the mount point of proc; "" is /proc.
func HostPIDNamespace(proc string) (bool, error) {
	fs := procfs.New(proc)
	ns, err := fs.Namespace(procfs.Self, "pid")
	if err != nil {
		return false, fmt.Errorf("find out own PID namespace: %w", err)
	}
	if ns == procfs.InitialPIDNamespace {
		return true, nil
	}
	status, err := fs.Status(procfs.Self)
	if err != nil {
		return false, fmt.Errorf("find out own PID namespace: %w", err)
	}
	if len(status.NSpid) > 0 && status.NSpid[len(status.NSpid)-1] == 1 {
		return false, nil // we are its first process
	}
	// The first process of a pod's namespace is the pod's: the sandbox, or one
	// of its containers. A node's first process is in no pod, so it is neither
	// in our group nor next to it.
	init, err := fs.Cgroups(1)
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("find out own PID namespace: %w", err)
	}
	self, err := fs.Cgroups(procfs.Self)
	if err != nil {
		return false, fmt.Errorf("find out own PID namespace: %w", err)
	}
	for _, mine := range self {
		i := slices.IndexFunc(init, func(g procfs.Cgroup) bool { return g.Controllers == mine.Controllers })
		if i < 0 || mine.Path == "/" && init[i].Path == "/" {
			continue // a hierarchy nobody is placed in, or no difference
		}
		if related(mine.Path, init[i].Path) {
			return false, nil
		}
		return true, nil
	}
	return false, nil
}

// related says whether init's group is ours, inside ours, or next to it in a
// parent that is not the top. A node's init may well be above us.
func related(ours, init string) bool {
	ours, init = strings.TrimSuffix(ours, "/"), strings.TrimSuffix(init, "/")
	if ours == "" { // a cgroup namespace of our own: next to it is /../X
		return strings.Count(init, "..") <= 1
	}
	if strings.HasPrefix(init+"/", ours+"/") {
		return true
	}
	parent := func(p string) string { return p[:max(strings.LastIndexByte(p, '/'), 0)] }
	return parent(ours) != "" && parent(ours) == parent(init)
}
