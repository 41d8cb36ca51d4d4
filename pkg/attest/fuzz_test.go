package attest_test

import (
	"strings"
	"testing"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// cleanName says whether the kernel could have made a group of this name.
func cleanNames(path string) bool {
	for name := range strings.SplitSeq(path, "/") {
		if name == "" || name == "." || name == ".." || len(name) > 255 || strings.ContainsRune(name, '\n') {
			return false
		}
	}
	return true
}

var outers = []string{
	"/kubepods/burstable/pod" + uidA + "/" + ctrA,
	"/kubepods/pod" + uidA + "/" + ctrA,
	"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uidA_ + ".slice/cri-containerd-" + ctrA + ".scope",
	"/kubepods.slice/kubepods-pod" + uidA_ + ".slice/crio-" + ctrA + ".scope",
	"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-pod" + uidA_ + ".slice/cri-containerd-" + ctrA + ".scope",
	"/system.slice/containerd.service/kubepods-burstable-pod" + uidA_ + ".slice:cri-containerd:" + ctrA,
	"/kubepods-pod" + uidA_ + ".slice:cri-containerd:" + ctrA,
}

// Whatever a workload names the groups below its own, it stays in its pod and
// container, seen from anywhere.
func FuzzForgedInside(f *testing.F) {
	f.Add("x")
	f.Add("kubepods/burstable/pod" + uidB + "/" + ctrB)
	f.Add("kubepods.slice/kubepods-pod" + uidB + ".slice:cri-containerd:" + ctrB)
	f.Add("..a/.b")
	f.Fuzz(func(t *testing.T, inner string) {
		if !cleanNames(inner) {
			return
		}
		for _, outer := range outers {
			path := outer + "/" + inner
			pod, ctr, err := attest.UsualCgroups("").Place(v2(path))
			if err != nil || pod != uidA || ctr != ctrA {
				t.Errorf("%q: pod %q container %q, %v", path, pod, ctr, err)
			}
			own := "/kubepods.slice/kubepods-pod" + strings.ReplaceAll(uidB, "-", "_") + ".slice/cri-containerd-" + ctrB + ".scope"
			up := strings.Repeat("/..", strings.Count(own, "/"))
			pod, ctr, err = attest.UsualCgroups(own).Place(v2(up + path))
			if err != nil || pod != uidA || ctr != ctrA {
				t.Errorf("from another namespace, %q: pod %q container %q, %v", path, pod, ctr, err)
			}
		}
	})
}

// Whatever somebody names groups in a place delegated to them, they are in no
// pod.
func FuzzForgedOutside(f *testing.F) {
	f.Add("kubepods/pod" + uidB)
	f.Add("kubepods.slice/kubepods-pod" + uidB + ".slice/cri-containerd-" + ctrB + ".scope")
	f.Add("kubepods-pod" + uidB + ".slice:cri-containerd:" + ctrB)
	f.Add("containerd.service/kubepods-pod" + uidA_ + ".slice:cri-containerd:" + ctrB)
	f.Fuzz(func(t *testing.T, inner string) {
		if !cleanNames(inner) {
			return
		}
		for _, outer := range []string{
			"/user.slice/user-1000.slice/user@1000.service", "/system.slice/app.service", "/docker/" + ctrA, "/machine.slice",
		} {
			pod, ctr, err := attest.UsualCgroups("").Place(v2(outer + "/" + inner))
			if err != nil || pod != "" || ctr != "" {
				t.Errorf("%q: pod %q container %q, %v", outer+"/"+inner, pod, ctr, err)
			}
		}
	})
}

// No path panics or resolves to one that still leads upwards, and a pod is
// found only below one of the kubelet's places.
func FuzzPlace(f *testing.F) {
	for _, outer := range outers {
		f.Add("/a/b/c", outer)
		f.Add(outer, "/../../../x")
	}
	f.Add("", "/..")
	f.Fuzz(func(t *testing.T, own, path string) {
		if own != "" && (own[0] != '/' || !cleanNames(own[1:])) || path == "" || path[0] != '/' {
			return
		}
		c := attest.UsualCgroups(own)
		abs, err := c.Absolute(v2(path))
		if err == nil && strings.Contains(abs+"/", "/../") {
			t.Errorf("Absolute(%q) below %q = %q", path, own, abs)
		}
		pod, _, err := c.Place(v2(path))
		if err != nil || pod == "" {
			return
		}
		if !strings.Contains(abs, "pod") || strings.ContainsAny(pod, "/:_ \n") {
			t.Errorf("Place(%q) below %q, that is %q: pod %q", path, own, abs, pod)
		}
	})
}

func FuzzParseNames(f *testing.F) {
	f.Add([]byte("root:x:0:0:root:/root:/bin/sh\n#c\n+::::::\nnobody:x:65534:65534::/:\n"))
	f.Add([]byte("adm:x:4:a,b\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		for id, name := range attest.ParseNames(data) {
			if name == "" || strings.ContainsAny(name, ":\n") {
				t.Errorf("%d is %q", id, name)
			}
		}
	})
}
