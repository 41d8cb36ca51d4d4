package attest

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

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
		return "", fmt.Errorf("%w: cgroup path %q cannot be resolved: this process's own cgroup is not known; set it or share the host's cgroup namespace", ErrDenied, g.Path)
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
	"configure its own cgroup, make the host's cgroup file system visible, or run it in the host's cgroup namespace")

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
		own, err := findOwn(cfg.HostCgroupFS, line.Controllers)
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

// findOwn searches a mounted hierarchy, level by level, for the group that is
// the root of our cgroup namespace. It is known by its inode.
func findOwn(host, controllers string) (string, error) {
	if host == "" {
		host = "/proc/1/root/sys/fs/cgroup"
	}
	own, theirs, err := mountPoints(host, controllers)
	if err != nil {
		return "", err
	}
	var want syscall.Stat_t
	if err := syscall.Stat(own, &want); err != nil {
		return "", &os.PathError{Op: "stat", Path: own, Err: err}
	}
	seen := 0
	level := []string{""}
	for range maxDepth {
		var next []string
		for _, dir := range level {
			children, err := os.ReadDir(theirs + dir)
			if err != nil {
				continue // gone meanwhile
			}
			for _, child := range children {
				if !child.IsDir() {
					continue
				}
				if seen++; seen > maxSearch {
					return "", fmt.Errorf("more than %d groups in %s", maxSearch, theirs)
				}
				path := dir + "/" + child.Name()
				var st syscall.Stat_t
				if syscall.Stat(theirs+path, &st) == nil && st.Ino == want.Ino && st.Dev == want.Dev {
					return path, nil
				}
				next = append(next, path)
			}
		}
		level = next
	}
	return "", fmt.Errorf("own group is not among the %d of %s", seen, theirs)
}

// mountPoints finds where one hierarchy is mounted in our own view and in the
// host's.
func mountPoints(host, controllers string) (own, theirs string, err error) {
	const cgroup2 = 0x63677270
	name := strings.TrimPrefix(controllers, "name=")
	candidates := []string{"/" + name}
	if controllers == "" {
		candidates = []string{"", "/unified"}
	}
	find := func(base string) (string, error) {
		for _, c := range candidates {
			var fs syscall.Statfs_t
			if err := syscall.Statfs(base+c, &fs); err != nil {
				if errors.Is(err, os.ErrPermission) {
					return "", &os.PathError{Op: "statfs", Path: base + c, Err: err}
				}
				continue
			}
			if (controllers == "") == (fs.Type == cgroup2) {
				return base + c, nil
			}
		}
		return "", fmt.Errorf("no cgroup file system for %q in %s: %w", controllers, base, os.ErrNotExist)
	}
	if own, err = find("/sys/fs/cgroup"); err != nil {
		return "", "", err
	}
	theirs, err = find(host)
	return own, theirs, err
}
