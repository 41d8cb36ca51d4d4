package attest

import "github.com/spiffe-node/spiffe-node/internal/procfs"

// Cgroups is what New learns about cgroups, built by hand.
type Cgroups struct{ c cgroups }

// UsualCgroups are the kubelet's usual places, seen from the host's cgroup
// namespace; own is the absolute root of our own namespace, if not "".
func UsualCgroups(own string, roots ...string) *Cgroups {
	c := &Cgroups{cgroups{layout: layout{roots: usualRoots, scopes: usualScopes}, resolver: resolver{top: true}}}
	if len(roots) > 0 {
		c.c.layout.roots = roots
	}
	if own != "" {
		c.c.resolver = resolver{own: map[string]string{"": own, "memory": own, "name=systemd": own}}
	}
	return c
}

// Place is the pod and the container that the lines of a cgroup file lead to.
func (c *Cgroups) Place(lines ...procfs.Cgroup) (pod, container string, err error) {
	p, err := c.c.place(lines)
	return p.pod, p.container, err
}

// Absolute resolves one line.
func (c *Cgroups) Absolute(g procfs.Cgroup) (string, error) { return c.c.resolver.absolute(g) }

// Learn is what New does in the Kubernetes modes.
func Learn(proc string, cfg Config) (roots []string, namespace string, inPod bool, err error) {
	c, err := learnCgroups(procfs.New(proc), cfg)
	if err != nil {
		return nil, "", false, err
	}
	return c.layout.roots, c.resolver.describe(), c.inPod, nil
}

// FindOwn is the search for our own group in a mounted hierarchy.
var FindOwn = findOwn

// ParseNames reads a passwd or group file.
var ParseNames = parseNames

// Names is a passwd or group file.
type Names struct{ n *names }

// OpenNames reads file when asked for a name.
func OpenNames(file string) Names { return Names{newNames(file, "")} }

// Name is the name of id.
func (n Names) Name(id uint32) string {
	name, _ := n.n.name(id)
	return name
}

// Pods is the number of pods with a binding.
func (a *Attestor) Pods() int {
	a.mu.Lock()
	defer a.mu.Unlock()
	return len(a.pods)
}
