package attest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"

	"github.com/spiffe-node/spiffe-node/internal/procfs"
)

// cgroups finds a process's place from its cgroup file.
type cgroups struct {
	resolver resolver
	layout   layout
	inPod    bool // this process itself
}

// resolver turns the paths the kernel shows into absolute ones.
type resolver struct {
	// own is the absolute path of the root of our cgroup namespace in each
	// hierarchy, by the controllers' list; "" is the top. A hierarchy that is
	// missing cannot be resolved where a path leads above the namespace.
	own map[string]string
	// top is set if the namespace's root is the top of every hierarchy.
	top bool
}

func (r *resolver) describe() string {
	if r.top {
		return "/"
	}
	var out []string
	for controllers, path := range r.own {
		if controllers == "" {
			controllers = "unified"
		}
		out = append(out, controllers+"="+path)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

// absolute resolves the path of one line of a cgroup file. Only the kernel
// writes "..", and only at the front: it leads above our namespace's root.
func (r *resolver) absolute(g procfs.Cgroup) (string, error) {
	path := strings.TrimSuffix(g.Path, "/")
	up := 0
	for path == "/.." || strings.HasPrefix(path, "/../") {
		up++
		path = path[len("/.."):]
	}
	if strings.HasSuffix(path, "/..") || strings.Contains(path, "/../") {
		return "", fmt.Errorf("%w: cgroup path %q cannot be resolved", ErrDenied, g.Path)
	}
	if r.top {
		if up > 0 {
			return "", fmt.Errorf("%w: cgroup path %q leads above the top", ErrDenied, g.Path)
		}
		return path, nil
	}
	own, ok := r.own[g.Controllers]
	if !ok {
		return "", fmt.Errorf("%w: cgroup path %q cannot be resolved: this process's own cgroup in that hierarchy is not known", ErrDenied, g.Path)
	}
	for range up {
		i := strings.LastIndexByte(own, '/')
		if i < 0 {
			return "", fmt.Errorf("%w: cgroup path %q leads above the top", ErrDenied, g.Path)
		}
		own = own[:i]
	}
	return own + path, nil
}

// place finds a process's pod. All hierarchies in which the process is in a
// pod must agree; a hierarchy in which it is in none has no say, because
// runtimes do not place containers in every one.
func (c *cgroups) place(lines []procfs.Cgroup) (place, error) {
	var found place
	for _, line := range lines {
		path, err := c.resolver.absolute(line)
		if err != nil {
			return place{}, err
		}
		p, err := c.layout.locate(path)
		switch {
		case err != nil:
			return place{}, err
		case p.pod == "":
		case found.pod == "":
			found = p
		case p.pod != found.pod:
			return place{}, fmt.Errorf("%w: cgroup hierarchies disagree: pod %s and pod %s", ErrDenied, found.pod, p.pod)
		case p.container == "":
		case found.container == "":
			found.container = p.container
		case p.container != found.container:
			return place{}, fmt.Errorf("%w: cgroup hierarchies disagree: container %s and container %s of pod %s",
				ErrDenied, found.container, p.container, p.pod)
		}
	}
	return found, nil
}

// learnCgroups decides, once, what absolute means and where pods are.
func learnCgroups(proc *procfs.FS, cfg Config) (*cgroups, error) {
	self, err := proc.Cgroups(procfs.Self)
	if err != nil {
		return nil, fmt.Errorf("learn own cgroup: %w", err)
	}
	r, err := learnResolver(proc, cfg, self)
	if err != nil {
		return nil, err
	}
	c := &cgroups{resolver: r}
	for _, root := range cfg.KubeletCgroups {
		if !strings.HasPrefix(root, "/") || filepath.Clean(root) != root || root == "/" {
			return nil, fmt.Errorf("kubelet cgroup %q is not a clean absolute path below /", root)
		}
		c.layout.roots = append(c.layout.roots, root)
	}
	base := ""
	if len(c.layout.roots) == 0 {
		for _, line := range self {
			path, err := r.absolute(line)
			if err != nil {
				return nil, err
			}
			root, prefix, err := ownRoot(path)
			if err != nil {
				return nil, err
			}
			if root != "" && !slices.Contains(c.layout.roots, root) {
				c.layout.roots = append(c.layout.roots, root)
				base = prefix
			}
		}
	}
	if len(c.layout.roots) == 0 {
		c.layout.roots = slices.Clone(usualRoots)
	}
	for _, scope := range usualScopes {
		c.layout.scopes = append(c.layout.scopes, base+scope)
	}
	own, err := c.place(self)
	if err != nil {
		return nil, fmt.Errorf("own cgroup: %w", err)
	}
	c.inPod = own.pod != ""
	return c, nil
}

// ownRoot reads the kubelet's pods cgroup off this process's own path, which
// nobody but the kubelet and the runtime have made; "" outside pods. base is
// what lies above the node: empty, or a node container such as kind's.
func ownRoot(path string) (root, base string, err error) {
	for i := 1; i <= len(path); i++ {
		if i < len(path) && path[i] != '/' {
			continue
		}
		name := path[strings.LastIndexByte(path[:i], '/')+1 : i]
		if name != "kubepods" && name != "kubepods.slice" && !strings.HasSuffix(name, "-kubepods.slice") {
			continue
		}
		l := layout{roots: []string{path[:i]}}
		if p, err := l.locate(path); err != nil || p.pod == "" {
			continue
		}
		if root != "" {
			return "", "", fmt.Errorf("own cgroup %q is in a pod inside a pod: set the kubelet's pods cgroup", path)
		}
		root = path[:i]
		base = root[:strings.LastIndexByte(root, '/')]
		base = strings.TrimSuffix(strings.TrimSuffix(base, "/kubelet"), "/kubelet.slice")
	}
	return root, base, nil
}

var errOwnCgroup = errors.New("this process is in a cgroup namespace of its own and cannot see where that is among the host's cgroups: " +
	"mount the host's /sys/fs/cgroup into its container, read-only and at any place, or run it in the host's cgroup namespace")

// learnResolver finds the root of our cgroup namespace.
func learnResolver(proc *procfs.FS, cfg Config, self []procfs.Cgroup) (resolver, error) {
	if cfg.OwnCgroup != "" {
		if !strings.HasPrefix(cfg.OwnCgroup, "/") || filepath.Clean(cfg.OwnCgroup) != cfg.OwnCgroup {
			return resolver{}, fmt.Errorf("own cgroup %q is not a clean absolute path", cfg.OwnCgroup)
		}
		own := strings.TrimSuffix(cfg.OwnCgroup, "/")
		r := resolver{own: make(map[string]string)}
		for _, line := range self {
			r.own[line.Controllers] = own
		}
		return r, nil
	}
	if ns, err := proc.Namespace(procfs.Self, "cgroup"); err != nil || ns == procfs.InitialCgroupNamespace {
		// An error means a kernel before 4.6, without cgroup namespaces.
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return resolver{}, err
		}
		return resolver{top: true}, nil
	}
	// Process 1 runs at or near the top of what is a node to us. Where its path
	// does not lead above our namespace, all of the node lies inside it.
	init, err := proc.Cgroups(1)
	if err != nil {
		return resolver{}, fmt.Errorf("learn own cgroup: %w", err)
	}
	r := resolver{own: make(map[string]string), top: true}
	for _, line := range init {
		if line.Path != "/.." && !strings.HasPrefix(line.Path, "/../") {
			r.own[line.Controllers] = ""
			continue
		}
		r.top = false
		i := slices.IndexFunc(self, func(g procfs.Cgroup) bool { return g.Controllers == line.Controllers })
		if i < 0 {
			continue
		}
		host, err := hostMount(cfg.HostCgroupFS, line.Controllers)
		own := ""
		if err == nil {
			own, err = findOwn(host, self[i].Path)
		}
		if err != nil {
			return resolver{}, fmt.Errorf("%w (%w)", errOwnCgroup, err)
		}
		r.own[line.Controllers] = own
	}
	return r, nil
}

// The search for our own group is bounded; a busy node has some hundred groups,
// pods are four levels down, ten where the node is itself a container.
const (
	maxSearch = 50_000
	maxDepth  = 24
)

// findOwn searches a mounted hierarchy, level by level, for the group that has
// this process in it. path is that group as we see it; what is left of the
// group's path without it is the root of our cgroup namespace.
func findOwn(host, path string) (string, error) {
	me := strconv.Itoa(os.Getpid())
	seen := 0
	level := []string{""}
	for range maxDepth {
		var next []string
		for _, dir := range level {
			children, err := os.ReadDir(host + dir)
			if err != nil {
				if dir == "" {
					return "", err
				}
				continue // gone meanwhile
			}
			for _, child := range children {
				if !child.IsDir() {
					continue
				}
				if seen++; seen > maxSearch {
					return "", fmt.Errorf("more than %d groups in %s", maxSearch, host)
				}
				group := dir + "/" + child.Name()
				if own, ok := strings.CutSuffix(group, strings.TrimSuffix(path, "/")); ok && hasProcess(host+group, me) {
					return own, nil
				}
				next = append(next, group)
			}
		}
		level = next
	}
	return "", fmt.Errorf("own group is not among the %d of %s", seen, host)
}

func hasProcess(group, pid string) bool {
	data, err := os.ReadFile(group + "/cgroup.procs")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(data)) {
		if strings.TrimSuffix(line, "\n") == pid {
			return true
		}
	}
	return false
}

// hostMount finds where one hierarchy can be seen from above our cgroup
// namespace: in the configured directory, in our own mount namespace (a mount
// whose root leads upwards), or in that of process 1.
func hostMount(configured, controllers string) (string, error) {
	bases := []string{"/proc/1/root/sys/fs/cgroup"}
	if configured != "" {
		bases = []string{configured}
	} else if dir, err := mountAbove(controllers); err == nil && dir != "" {
		return dir, nil
	}
	names := []string{"/" + strings.TrimPrefix(controllers, "name=")}
	if controllers == "" {
		names = []string{"", "/unified"}
	}
	var last error
	for _, base := range bases {
		for _, name := range names {
			var fs syscall.Statfs_t
			if err := syscall.Statfs(base+name, &fs); err != nil {
				last = &os.PathError{Op: "statfs", Path: base + name, Err: err}
				continue
			}
			if (controllers == "") == (fs.Type == cgroup2Magic) {
				return base + name, nil
			}
			last = fmt.Errorf("no cgroup file system for %q at %s", controllers, base+name)
		}
	}
	return "", last
}

const cgroup2Magic = 0x63677270

// mountAbove is the mount point, in our own mount namespace, of a hierarchy
// whose root lies above our cgroup namespace's; "" if there is none.
func mountAbove(controllers string) (string, error) {
	best, ups := "", 0
	_, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		switch {
		case controllers == "" && m.FSType != "cgroup2", controllers != "" && m.FSType != "cgroup":
			return true, false
		}
		if controllers != "" && !hasOptions(m.VFSOptions, controllers) {
			return true, false
		}
		if n := strings.Count(m.Root, ".."); n > ups && strings.HasPrefix(m.Root, "/..") {
			best, ups = m.Mountpoint, n
		}
		return true, false
	})
	return best, err
}

func hasOptions(options, want string) bool {
	have := strings.Split(options, ",")
	for o := range strings.SplitSeq(want, ",") {
		if !slices.Contains(have, o) {
			return false
		}
	}
	return true
}
