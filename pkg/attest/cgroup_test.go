package attest_test

import (
	"errors"
	"strings"
	"testing"

	"github.com/spiffe-node/spiffe-node/internal/procfs"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

const (
	uidA  = "2c48913c-b29f-11e7-9350-020968147796"
	uidB  = "9bca8d63-90c6-4ef6-a4ba-a95a5f29f6a2"
	uidA_ = "2c48913c_b29f_11e7_9350_020968147796"
	hash  = "6c5b0d5fa0d8b84e6d4e5b5a1a0f3c77" // a static pod's config hash
	ctrA  = "9bca8d63d5fa610783847915bcff0ecac1273e5b4bed3f6fa1b07350e0135961"
	ctrB  = "a95a5f29f6a2c9bca8d63d5fa610783847915bcff0ecac1273e5b4bed3f6fa1b"
)

func v2(path string) procfs.Cgroup { return procfs.Cgroup{Path: path} }

func v1(controllers, path string) procfs.Cgroup {
	return procfs.Cgroup{Hierarchy: 1, Controllers: controllers, Path: path}
}

// Cgroup paths as runtimes and cgroup drivers make them.
func TestPlace(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		name, path string
		pod, ctr   string
	}{
		{"cgroupfs, besteffort", "/kubepods/besteffort/pod" + uidA + "/" + ctrA, uidA, ctrA},
		{"cgroupfs, burstable", "/kubepods/burstable/pod" + uidA + "/" + ctrA, uidA, ctrA},
		{"cgroupfs, guaranteed", "/kubepods/pod" + uidA + "/" + ctrA, uidA, ctrA},
		{"systemd, besteffort, containerd", "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + uidA_ + ".slice/cri-containerd-" + ctrA + ".scope", uidA, ctrA},
		{"systemd, guaranteed, containerd", "/kubepods.slice/kubepods-pod" + uidA_ + ".slice/cri-containerd-" + ctrA + ".scope", uidA, ctrA},
		{"systemd, CRI-O", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uidA_ + ".slice/crio-" + ctrA + ".scope", uidA, ctrA},
		{"systemd, CRI-O, inner group", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uidA_ + ".slice/crio-" + ctrA + ".scope/container", uidA, ctrA},
		{"cgroupfs, CRI-O", "/kubepods/burstable/pod" + uidA + "/crio-" + ctrA, uidA, ctrA},
		{"CRI-O's conmon is no container", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uidA_ + ".slice/crio-conmon-" + ctrA + ".scope", uidA, ""},
		{"cri-dockerd", "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + uidA_ + ".slice/docker-" + ctrA + ".scope", uidA, ctrA},
		{"static pod, cgroupfs", "/kubepods/burstable/pod" + hash + "/" + ctrA, hash, ctrA},
		{"static pod, systemd", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + hash + ".slice/cri-containerd-" + ctrA + ".scope", hash, ctrA},
		{"mixed drivers, at the top", "/kubepods-besteffort-pod" + uidA_ + ".slice:cri-containerd:" + ctrA, uidA, ctrA},
		{"mixed drivers, guaranteed", "/kubepods-pod" + uidA_ + ".slice:cri-containerd:" + ctrA, uidA, ctrA},
		{"mixed drivers, in the service", "/system.slice/containerd.service/kubepods-burstable-pod" + uidA_ + ".slice:cri-containerd:" + ctrA, uidA, ctrA},
		{"kind, systemd", "/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/kubelet-kubepods-besteffort-pod" + uidA_ + ".slice/cri-containerd-" + ctrA + ".scope", uidA, ctrA},
		{"kind, cgroupfs", "/kubelet/kubepods/besteffort/pod" + uidA + "/" + ctrA, uidA, ctrA},
		{"pod's own group", "/kubepods/burstable/pod" + uidA, uidA, ""},
		{"a child of the container", "/kubepods/burstable/pod" + uidA + "/" + ctrA + "/a/b/c", uidA, ctrA},
		{"a slash at the end", "/kubepods/burstable/pod" + uidA + "/" + ctrA + "/", uidA, ctrA},

		// Names a workload makes below its own group change nothing.
		{"forged pod inside", "/kubepods/burstable/pod" + uidA + "/" + ctrA + "/kubepods/burstable/pod" + uidB + "/" + ctrB, uidA, ctrA},
		{"forged slice inside", "/kubepods.slice/kubepods-pod" + uidA_ + ".slice/cri-containerd-" + ctrA + ".scope/kubepods-pod" + strings.ReplaceAll(uidB, "-", "_") + ".slice/cri-containerd-" + ctrB + ".scope", uidA, ctrA},
		{"forged mixed name inside", "/kubepods-pod" + uidA_ + ".slice:cri-containerd:" + ctrA + "/kubepods-pod" + strings.ReplaceAll(uidB, "-", "_") + ".slice:cri-containerd:" + ctrB, uidA, ctrA},

		// Names that somebody can make outside the kubelet's group are no pod.
		{"a user's delegated slice", "/user.slice/user-1000.slice/user@1000.service/kubepods.slice/kubepods-pod" + uidA_ + ".slice/cri-containerd-" + ctrA + ".scope", "", ""},
		{"a service's delegated group", "/system.slice/evil.service/kubepods-pod" + uidA_ + ".slice:cri-containerd:" + ctrA, "", ""},
		{"a container outside Kubernetes", "/docker/" + ctrB + "/kubepods/pod" + uidA + "/" + ctrA, "", ""},
		{"a prefix of the name", "/kubepodsX/pod" + uidA + "/" + ctrA, "", ""},
		{"systemd service", "/system.slice/sshd.service", "", ""},
		{"containerd itself", "/system.slice/containerd.service", "", ""},
		{"the kubelet's own group", "/kubepods", "", ""},
		{"the top", "/", "", ""},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			for _, line := range []procfs.Cgroup{v2(tc.path), v1("memory", tc.path)} {
				pod, ctr, err := attest.UsualCgroups("").Place(line)
				if err != nil || pod != tc.pod || ctr != tc.ctr {
					t.Errorf("%q: pod %q container %q, %v; want pod %q container %q", tc.path, pod, ctr, err, tc.pod, tc.ctr)
				}
			}
		})
	}
}

// Where the kubelet puts pods, anything that names none is refused: fewer
// selectors would be a wrong answer.
func TestPlaceDenied(t *testing.T) {
	t.Parallel()
	for _, path := range []string{
		"/kubepods/burstable",
		"/kubepods/burstable/" + ctrA,
		"/kubepods/pod/" + ctrA,
		"/kubepods/pod-" + uidA + "/" + ctrA,
		"/kubepods/pod" + uidA + "_/" + ctrA,
		"/kubepods/pod" + uidA + " (deleted)",
		"/kubepods.slice/kubepods-burstable.slice/kubepods-besteffort-pod" + uidA_ + ".slice/" + ctrA,
		"/kubepods.slice/kubepods-pod" + uidA + ".slice/" + ctrA, // dashes
		"/kubepods.slice/pod" + uidA + "/" + ctrA,
		"/kubepods//pod" + uidA,
		"/a/../kubepods/pod" + uidA,
		"/kubepods/pod" + uidA + "/..",
		"/..",
		"/../kubepods/pod" + uidA,
	} {
		pod, ctr, err := attest.UsualCgroups("").Place(v2(path))
		if !errors.Is(err, attest.ErrDenied) || pod != "" || ctr != "" {
			t.Errorf("%q: pod %q container %q, %v; want ErrDenied", path, pod, ctr, err)
		}
	}
}

func TestPlaceHierarchies(t *testing.T) {
	t.Parallel()
	pod := func(uid, ctr string) string { return "/kubepods/burstable/pod" + uid + "/" + ctr }
	for _, tc := range []struct {
		name     string
		lines    []procfs.Cgroup
		pod, ctr string
		denied   bool
	}{
		{name: "all agree", lines: []procfs.Cgroup{v1("memory", pod(uidA, ctrA)), v1("pids", pod(uidA, ctrA)), v2("/")}, pod: uidA, ctr: ctrA},
		{name: "some place nobody", lines: []procfs.Cgroup{v1("name=systemd", "/system.slice/containerd.service"), v1("memory", pod(uidA, ctrA)), v2("/")}, pod: uidA, ctr: ctrA},
		{name: "drivers differ, pods agree", lines: []procfs.Cgroup{v1("memory", pod(uidA, ctrA)), v1("name=systemd", "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod"+uidA_+".slice/cri-containerd-"+ctrA+".scope")}, pod: uidA, ctr: ctrA},
		{name: "one knows no container", lines: []procfs.Cgroup{v1("memory", "/kubepods/burstable/pod"+uidA), v1("pids", pod(uidA, ctrA))}, pod: uidA, ctr: ctrA},
		{name: "pods differ", lines: []procfs.Cgroup{v1("memory", pod(uidA, ctrA)), v1("pids", pod(uidB, ctrA))}, denied: true},
		{name: "containers differ", lines: []procfs.Cgroup{v1("memory", pod(uidA, ctrA)), v1("pids", pod(uidA, ctrB))}, denied: true},
		{name: "one cannot be resolved", lines: []procfs.Cgroup{v1("memory", pod(uidA, ctrA)), v1("pids", "/../x")}, denied: true},
		{name: "none", lines: []procfs.Cgroup{v1("memory", "/"), v2("/init.scope")}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			gotPod, gotCtr, err := attest.UsualCgroups("").Place(tc.lines...)
			if errors.Is(err, attest.ErrDenied) != tc.denied || (err != nil) != tc.denied || gotPod != tc.pod || gotCtr != tc.ctr {
				t.Errorf("pod %q container %q, %v; want pod %q container %q, denied %v", gotPod, gotCtr, err, tc.pod, tc.ctr, tc.denied)
			}
		})
	}
}

// Paths as they look from a cgroup namespace of our own.
func TestAbsolute(t *testing.T) {
	t.Parallel()
	own := "/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + uidA_ + ".slice/cri-containerd-" + ctrA + ".scope"
	c := attest.UsualCgroups(own)
	uidB_ := strings.ReplaceAll(uidB, "-", "_")
	for _, tc := range []struct {
		in, want string
		pod, ctr string
	}{
		{"/", own, uidA, ctrA},
		{"/child", own + "/child", uidA, ctrA},
		{"/../cri-containerd-" + ctrB + ".scope", own[:strings.LastIndex(own, "/")] + "/cri-containerd-" + ctrB + ".scope", uidA, ctrB},
		{
			"/../../kubepods-besteffort-pod" + uidB_ + ".slice/cri-containerd-" + ctrB + ".scope",
			"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + uidB_ + ".slice/cri-containerd-" + ctrB + ".scope", uidB, ctrB,
		},
		{
			"/../../../kubepods-pod" + uidB_ + ".slice/cri-containerd-" + ctrB + ".scope/inner",
			"/kubepods.slice/kubepods-pod" + uidB_ + ".slice/cri-containerd-" + ctrB + ".scope/inner", uidB, ctrB,
		},
		{"/../../../../system.slice/x.service", "/system.slice/x.service", "", ""},
		{"/../../../..", "", "", ""},
		// The workload next door has made groups with telling names.
		{
			"/../../kubepods-besteffort-pod" + uidB_ + ".slice/cri-containerd-" + ctrB + ".scope/kubepods.slice/kubepods-pod" + uidA_ + ".slice/x",
			"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod" + uidB_ + ".slice/cri-containerd-" + ctrB + ".scope/kubepods.slice/kubepods-pod" + uidA_ + ".slice/x", uidB, ctrB,
		},
	} {
		got, err := c.Absolute(v2(tc.in))
		if err != nil || got != tc.want {
			t.Errorf("Absolute(%q) = %q, %v; want %q", tc.in, got, err, tc.want)
		}
		pod, ctr, err := c.Place(v2(tc.in))
		if err != nil || pod != tc.pod || ctr != tc.ctr {
			t.Errorf("Place(%q) = %q, %q, %v; want %q, %q", tc.in, pod, ctr, err, tc.pod, tc.ctr)
		}
	}
	for _, in := range []string{"/../../../../..", "/../../../../../x", "/a/../b", "/../a/.."} {
		if got, err := c.Absolute(v2(in)); !errors.Is(err, attest.ErrDenied) {
			t.Errorf("Absolute(%q) = %q, %v; want ErrDenied", in, got, err)
		}
	}
	if _, err := c.Absolute(v1("unknown", "/")); !errors.Is(err, attest.ErrDenied) {
		t.Errorf("a hierarchy we do not know our place in: %v, want ErrDenied", err)
	}
	for _, in := range []string{"/..a/b", "/...", "/..."} {
		if got, err := attest.UsualCgroups("").Absolute(v2(in)); err != nil || got != in {
			t.Errorf("Absolute(%q) = %q, %v; a name may begin with dots", in, got, err)
		}
	}
}
