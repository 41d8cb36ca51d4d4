package attest

import (
	"fmt"
	"strings"
)

// place is where a caller lives: the zero value is outside pods.
type place struct {
	pod       string // UID
	container string // "" between pod and container (a runtime's helper)
}

// layout knows where the kubelet and the runtime put pods. All paths are
// absolute, clean and without a slash at the end ("" is the root itself).
type layout struct {
	// roots are the kubelet's pods cgroups; a pod is a child of one, or of one
	// of its two QoS groups.
	roots []string
	// scopes are the groups in which a runtime with the other cgroup driver
	// than the kubelet's makes SLICE:RUNTIME:ID groups.
	scopes []string
}

// The usual roots. Only host root can make groups in these places, hence a
// process found there has been put there by the kubelet.
var usualRoots = []string{"/kubepods", "/kubepods.slice", "/kubelet/kubepods", "/kubelet.slice/kubelet-kubepods.slice"}

// usualScopes are the services below which runtimes make SLICE:RUNTIME:ID
// groups; "" is the top of the hierarchy. The list is closed: a service of
// another name can belong to an unprivileged user.
var usualScopes = []string{
	"",
	"/system.slice/containerd.service",
	"/system.slice/k3s.service",
	"/system.slice/k3s-agent.service",
	"/system.slice/rke2-server.service",
	"/system.slice/rke2-agent.service",
}

// locate finds the pod an absolute cgroup path is in. What lies below the
// container is the workload's to name and is not looked at. A path below a
// root that names no pod where the kubelet would put one is an error.
func (l *layout) locate(path string) (place, error) {
	for _, root := range l.roots {
		rest, ok := below(path, root)
		if !ok || rest == "" {
			continue
		}
		// first names the pod or its QoS group
		first, inner, _ := strings.Cut(rest, "/")
		base := root[strings.LastIndexByte(root, '/')+1:]
		prefix, systemd := strings.CutSuffix(base, ".slice")
		if !systemd {
			prefix = ""
		}
		switch {
		case !systemd && (first == "burstable" || first == "besteffort"),
			systemd && (first == prefix+"-burstable.slice" || first == prefix+"-besteffort.slice"):
			if inner == "" {
				return place{}, fmt.Errorf("%w: cgroup %q is a QoS group, not a pod", ErrDenied, path)
			}
			prefix = strings.TrimSuffix(first, ".slice")
			first, inner, _ = strings.Cut(inner, "/")
		}
		var p place
		if systemd {
			p.pod = slicePod(first, prefix)
		} else {
			p.pod = plainPod(first)
		}
		if p.pod == "" {
			return place{}, fmt.Errorf("%w: cgroup %q is below the kubelet's %q but in no pod; set the kubelet's pods cgroup if it is another", ErrDenied, path, root)
		}
		container, _, _ := strings.Cut(inner, "/")
		p.container = containerID(container)
		return p, nil
	}
	for _, scope := range l.scopes {
		rest, ok := below(path, scope)
		if !ok {
			continue
		}
		first, _, _ := strings.Cut(rest, "/")
		if p := scopePlace(first); p.pod != "" {
			return p, nil
		}
	}
	return place{}, nil
}

// below cuts the directory dir off path.
func below(path, dir string) (rest string, ok bool) {
	rest, ok = strings.CutPrefix(path, dir)
	if !ok || rest == "" {
		return "", ok
	}
	return strings.CutPrefix(rest, "/")
}

// plainPod reads the cgroupfs driver's podUID.
func plainPod(name string) string {
	uid, ok := strings.CutPrefix(name, "pod")
	if !ok || !validUID(uid) {
		return ""
	}
	return uid
}

// slicePod reads the systemd driver's PREFIX-podUID.slice, in which the UID's
// dashes are underscores because a dash is systemd's path separator.
func slicePod(name, prefix string) string {
	name, ok := strings.CutSuffix(name, ".slice")
	if !ok {
		return ""
	}
	uid, ok := strings.CutPrefix(name, prefix+"-pod")
	if !ok || strings.Contains(uid, "-") {
		return ""
	}
	if uid = strings.ReplaceAll(uid, "_", "-"); !validUID(uid) {
		return ""
	}
	return uid
}

// scopePlace reads SLICE:RUNTIME:ID, such as
// kubepods-burstable-podUID.slice:cri-containerd:ID.
func scopePlace(name string) place {
	slice, rest, ok := strings.Cut(name, ":")
	if !ok {
		return place{}
	}
	runtime, id, ok := strings.Cut(rest, ":")
	if !ok || (runtime != "cri-containerd" && runtime != "crio") || !hex64(id) {
		return place{}
	}
	prefix, _, ok := cutLast(slice, "-pod")
	if !ok {
		return place{}
	}
	root := prefix
	for _, qos := range [...]string{"-burstable", "-besteffort"} {
		root = strings.TrimSuffix(root, qos)
	}
	if root != "kubepods" && !strings.HasSuffix(root, "-kubepods") {
		return place{}
	}
	uid := slicePod(slice, prefix)
	if uid == "" {
		return place{}
	}
	return place{pod: uid, container: id}
}

func cutLast(s, sep string) (before, after string, ok bool) {
	i := strings.LastIndex(s, sep)
	if i < 0 {
		return s, "", false
	}
	return s[:i], s[i+len(sep):], true
}

// validUID accepts what Kubernetes uses as a pod's UID: 36 characters with
// dashes, the 32 of a static pod's config hash, and what the author of a
// static pod's manifest may have chosen.
func validUID(uid string) bool {
	if len(uid) == 0 || len(uid) > 128 {
		return false
	}
	for i := range len(uid) {
		switch c := uid[i]; {
		case c >= '0' && c <= '9', c >= 'a' && c <= 'z', c >= 'A' && c <= 'Z':
		case i > 0 && (c == '-' || c == '.'):
		default:
			return false
		}
	}
	return true
}

// containerPrefixes are what runtimes put before a container's ID; conmon's
// prefix (crio-conmon-) leaves no 64 digits and is no container.
var containerPrefixes = [...]string{"cri-containerd-", "crio-", "docker-", "libpod-", ""}

func containerID(name string) string {
	name = strings.TrimSuffix(name, ".scope")
	for _, prefix := range containerPrefixes {
		if id, ok := strings.CutPrefix(name, prefix); ok && hex64(id) {
			return id
		}
	}
	return ""
}

func hex64(s string) bool {
	if len(s) != 64 {
		return false
	}
	for i := range len(s) {
		if c := s[i]; (c < '0' || c > '9') && (c < 'a' || c > 'f') {
			return false
		}
	}
	return true
}
