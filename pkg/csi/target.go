package csi

import (
	"crypto/sha256"
	"fmt"
	"path"
	"regexp"
	"strings"
)

// volumeTarget is a target path the kubelet makes for an inline volume, taken
// apart.
type volumeTarget struct {
	root string // the kubelet root, as configured
	rel  string // the rest, clean: the key of locks
	uid  string // of the pod
	name string // of the volume in the pod
}

func (t volumeTarget) path() string { return path.Join(t.root, t.rel) }

var (
	uidRule        = regexp.MustCompile(`^[0-9A-Za-z][0-9A-Za-z-]{0,63}$`)
	volumeNameRule = regexp.MustCompile(`^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?$`)
)

// maxPath is the kernel's PATH_MAX.
const maxPath = 4096

// parseTarget reads <root>/pods/<uid>/volumes/kubernetes.io~csi/<volume>/mount.
// Doubled and trailing slashes are forgiven; ".." is not, because what it means
// depends on symbolic links. roots[0] is the spelling the result has.
func parseTarget(roots []string, target string) (volumeTarget, error) {
	switch {
	case len(target) >= maxPath:
		return volumeTarget{}, fmt.Errorf("has %d bytes, more than a path can have", len(target))
	case strings.ContainsRune(target, 0):
		return volumeTarget{}, fmt.Errorf("%q has a zero byte", target)
	case !path.IsAbs(target):
		return volumeTarget{}, fmt.Errorf("%q is not an absolute path", target)
	}
	for elem := range strings.SplitSeq(target, "/") {
		if elem == ".." {
			return volumeTarget{}, fmt.Errorf("%q has a '..' in it", target)
		}
	}
	clean := path.Clean(target)
	for _, root := range roots {
		rel, ok := strings.CutPrefix(clean, strings.TrimSuffix(root, "/")+"/")
		if !ok {
			continue
		}
		p := strings.Split(rel, "/")
		if len(p) != 6 || p[0] != "pods" || p[2] != "volumes" || p[3] != "kubernetes.io~csi" || p[5] != "mount" {
			return volumeTarget{}, fmt.Errorf("%q is not %s/pods/<uid>/volumes/kubernetes.io~csi/<volume>/mount", target, root)
		}
		if !uidRule.MatchString(p[1]) {
			return volumeTarget{}, fmt.Errorf("%q names a pod UID that is none", target)
		}
		if !volumeNameRule.MatchString(p[4]) {
			return volumeTarget{}, fmt.Errorf("%q names a volume that no pod can have", target)
		}
		return volumeTarget{root: roots[0], rel: rel, uid: p[1], name: p[4]}, nil
	}
	return volumeTarget{}, fmt.Errorf("%q is not below the kubelet root %s: is --kubelet-root the kubelet's --root-dir?", target, strings.Join(roots, " or "))
}

// VolumeID is the kubelet's handle for the inline volume with this name of the
// pod with this UID (makeVolumeHandle in k8s.io/kubernetes/pkg/volume/csi).
func VolumeID(podUID, volumeName string) string {
	return fmt.Sprintf("csi-%x", sha256.Sum256([]byte(podUID+volumeName)))
}
