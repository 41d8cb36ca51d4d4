package attest_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// Where this process runs tells where the kubelet puts pods.
func TestLearn(t *testing.T) {
	t.Parallel()
	docker := "/docker/" + ctrB
	for _, tc := range []struct {
		name, self string
		cfg        attest.Config
		roots      []string // nil: the usual ones
		inPod, bad bool
	}{
		{name: "a service", self: "0::/system.slice/x.service\n"},
		{name: "cgroupfs", self: "0::/kubepods/burstable/pod" + uidA + "/" + ctrA + "\n", roots: []string{"/kubepods"}, inPod: true},
		{name: "guaranteed", self: "0::/kubepods/pod" + uidA + "/" + ctrA + "\n", roots: []string{"/kubepods"}, inPod: true},
		{name: "systemd", self: "0::/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod" + uidA_ + ".slice/crio-" + ctrA + ".scope\n", roots: []string{"/kubepods.slice"}, inPod: true},
		{name: "cgroup root", self: "0::/my.slice/my-kubepods.slice/my-kubepods-pod" + uidA_ + ".slice/crio-" + ctrA + ".scope\n", roots: []string{"/my.slice/my-kubepods.slice"}, inPod: true},
		{name: "kind, old", self: "4:memory:" + docker + "/kubepods/besteffort/pod" + uidA + "/" + ctrA + "\n", roots: []string{docker + "/kubepods"}, inPod: true},
		{name: "kind, v1", self: "4:memory:" + docker + "/kubelet/kubepods/besteffort/pod" + uidA + "/" + ctrA + "\n0::/\n", roots: []string{docker + "/kubelet/kubepods"}, inPod: true},
		{name: "mixed drivers", self: "0::/system.slice/containerd.service/kubepods-pod" + uidA_ + ".slice:cri-containerd:" + ctrA + "\n", inPod: true},
		{
			name: "two roots", inPod: true, roots: []string{"/kubepods", "/kubepods.slice"},
			self: "4:memory:/kubepods/pod" + uidA + "/" + ctrA + "\n1:name=systemd:/kubepods.slice/kubepods-pod" + uidA_ + ".slice/cri-containerd-" + ctrA + ".scope\n",
		},
		{name: "a node in a pod", self: "0::/kubepods/pod" + uidA + "/" + ctrA + "/kubelet/kubepods/pod" + uidB + "/" + ctrB + "\n", bad: true},
		{
			name: "a node in a pod, told", self: "0::/kubepods/pod" + uidA + "/" + ctrA + "/kubelet/kubepods/pod" + uidB + "/" + ctrB + "\n",
			cfg:   attest.Config{KubeletCgroups: []string{"/kubepods/pod" + uidA + "/" + ctrA + "/kubelet/kubepods"}},
			roots: []string{"/kubepods/pod" + uidA + "/" + ctrA + "/kubelet/kubepods"}, inPod: true,
		},
		{name: "pods that disagree", self: "4:memory:/kubepods/pod" + uidA + "\n3:pids:/kubepods/pod" + uidB + "\n", bad: true},
		{name: "configured", self: "0::/\n", cfg: attest.Config{KubeletCgroups: []string{"/x/y"}}, roots: []string{"/x/y"}},
		{name: "configured, not clean", self: "0::/\n", cfg: attest.Config{KubeletCgroups: []string{"/x/"}}, bad: true},
		{name: "configured, relative", self: "0::/\n", cfg: attest.Config{KubeletCgroups: []string{"x"}}, bad: true},
		{name: "configured, everything", self: "0::/\n", cfg: attest.Config{KubeletCgroups: []string{"/"}}, bad: true},
		{name: "own cgroup, relative", self: "0::/\n", cfg: attest.Config{OwnCgroup: "x"}, bad: true},
		{
			name: "own cgroup", self: "0::/\n", cfg: attest.Config{OwnCgroup: "/kubepods/pod" + uidA + "/" + ctrA},
			roots: []string{"/kubepods"}, inPod: true,
		},
		{name: "malformed", self: "x", bad: true},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			roots, _, inPod, err := attest.Learn(fakeProc(t, tc.self, nil), tc.cfg)
			if (err != nil) != tc.bad {
				t.Fatal(err)
			}
			if tc.roots == nil && !tc.bad {
				tc.roots = []string{"/kubepods", "/kubepods.slice", "/kubelet/kubepods", "/kubelet.slice/kubelet-kubepods.slice"}
			}
			if d := cmp.Diff(tc.roots, roots); d != "" || inPod != tc.inPod {
				t.Errorf("in pod %v, want %v; %s", inPod, tc.inPod, d)
			}
		})
	}
}

// Pods next to us on a node that is a container.
func TestNodeInContainer(t *testing.T) {
	t.Parallel()
	docker := "/docker/" + ctrB
	proc := fakeProc(t, "4:memory:"+docker+"/kubelet/kubepods/besteffort/pod"+uidA+"/"+ctrA+"\n", map[int]string{
		10: "4:memory:" + docker + "/kubelet/kubepods/besteffort/pod" + uidB + "/" + ctrB + "\n",
		11: "4:memory:" + docker + "/system.slice/containerd.service/kubepods-pod" + uidA_ + ".slice:cri-containerd:" + ctrA + "\n",
		12: "4:memory:/kubepods/besteffort/pod" + uidB + "/" + ctrB + "\n", // another cluster's, on the machine
	})
	a, err := attest.New(attest.Config{Mode: attest.ModeKubernetes, Proc: proc})
	if err != nil {
		t.Fatal(err)
	}
	for pid, want := range map[int32]string{10: uidB, 11: uidA, 12: ""} {
		if got := bindPID(t, a, pid).PodUID(); got != want {
			t.Errorf("caller %d is in pod %q, want %q", pid, got, want)
		}
	}
}

// unified is where the v2 hierarchy is mounted.
func unified(tb testing.TB) string {
	tb.Helper()
	needRoot(tb)
	for _, dir := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/unified"} {
		var fs syscall.Statfs_t
		if syscall.Statfs(dir, &fs) == nil && fs.Type == 0x63677270 {
			return dir
		}
	}
	tb.Skip("no cgroup v2 hierarchy is mounted")
	return ""
}

// realPod makes real groups like the kubelet and a runtime and returns the
// kubelet's root, absolute, and the container's directory.
func realPod(tb testing.TB) (mount, root, container string) {
	tb.Helper()
	mount = unified(tb)
	root = fmt.Sprintf("/spiffe-node-test-%d-%s.slice", os.Getpid(), strings.ToLower(filepath.Base(tb.Name())))
	base := strings.TrimSuffix(filepath.Base(root), ".slice")
	container = root + "/" + base + "-burstable.slice/" + base + "-burstable-pod" + uidA_ + ".slice/cri-containerd-" + ctrA + ".scope"
	if err := os.MkdirAll(mount+container, 0o755); err != nil {
		tb.Skip("cannot make groups:", err)
	}
	tb.Cleanup(func() { removeGroups(mount + root) })
	return mount, root, container
}

// removeGroups is os.RemoveAll for groups: their files cannot be removed.
func removeGroups(dir string) {
	children, _ := os.ReadDir(dir)
	for _, c := range children {
		if c.IsDir() {
			removeGroups(filepath.Join(dir, c.Name()))
		}
	}
	for range 100 {
		if err := os.Remove(dir); err == nil || os.IsNotExist(err) {
			return
		}
	}
}

func startIn(tb testing.TB, dir, what string, flags uintptr) *child {
	tb.Helper()
	fd, err := syscall.Open(dir, syscall.O_DIRECTORY|syscall.O_CLOEXEC, 0)
	if err != nil {
		tb.Fatal(err)
	}
	defer syscall.Close(fd)
	return startChild(tb, what, &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: fd, Unshareflags: flags})
}

// A real process in real groups, that makes groups of its own inside.
func TestRealCgroup(t *testing.T) {
	t.Parallel()
	mount, root, container := realPod(t)
	c := startIn(t, mount+container, "wait", 0)
	a, err := attest.New(attest.Config{Mode: attest.ModeKubernetes, KubeletCgroups: []string{root}})
	if err != nil {
		t.Fatal(err)
	}
	caller := c.caller()
	check := func() {
		t.Helper()
		b, err := a.Bind(context.Background(), caller)
		if err != nil {
			t.Fatal(err)
		}
		defer b.Close()
		if b.PodUID() != uidA || b.ContainerID() != ctrA {
			t.Errorf("pod %q container %q", b.PodUID(), b.ContainerID())
		}
	}
	check()
	base := strings.TrimSuffix(filepath.Base(root), ".slice")
	inner := mount + container + root + "/" + base + "-pod" + strings.ReplaceAll(uidB, "-", "_") + ".slice/cri-containerd-" + ctrB + ".scope"
	if err := os.MkdirAll(inner, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(inner+"/cgroup.procs", []byte(itoa(c.cmd.Process.Pid)), 0); err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("/proc/" + itoa(c.cmd.Process.Pid) + "/cgroup")
	if err != nil || !strings.Contains(string(text), ctrB) {
		t.Fatalf("the process is not in the forged group: %s, %v", text, err)
	}
	check()
	c.kill()
	if _, err := a.Bind(context.Background(), caller); err == nil {
		t.Error("a dead caller was bound")
	}
}

// inNamespace is a process in a container and a cgroup namespace of its own
// which attests the process with the number arg, and its parent.
func inNamespace(arg string) {
	var pid int32
	var root string
	_, _ = fmt.Sscan(arg, &pid, &root)
	fmt.Println("ready")
	a, err := attest.New(attest.Config{Mode: attest.ModeKubernetes, KubeletCgroups: []string{root}})
	if err != nil {
		fmt.Println("new:", err)
		return
	}
	for _, pid := range []int32{pid, int32(os.Getpid()), int32(os.Getppid())} {
		b, err := a.Bind(context.Background(), attest.Caller{PID: pid, Process: alive{}})
		if err != nil {
			fmt.Println("bind:", err)
			return
		}
		fmt.Printf("%q %q\n", b.PodUID(), b.ContainerID())
	}
}

// The agent in a cgroup namespace of its own finds out where it is and sees
// everybody's pod.
func TestCgroupNamespace(t *testing.T) {
	t.Parallel()
	mount, root, container := realPod(t)
	other := startIn(t, mount+container, "wait", 0)
	base := strings.TrimSuffix(filepath.Base(root), ".slice")
	own := mount + root + "/" + base + "-pod" + strings.ReplaceAll(uidB, "-", "_") + ".slice/cri-containerd-" + ctrB + ".scope"
	if err := os.MkdirAll(own, 0o755); err != nil {
		t.Fatal(err)
	}
	agent := startIn(t, own, fmt.Sprintf("namespaced %d %s", other.cmd.Process.Pid, root), syscall.CLONE_NEWCGROUP)
	for _, want := range []string{
		fmt.Sprintf("%q %q\n", uidA, ctrA),
		fmt.Sprintf("%q %q\n", uidB, ctrB),
		fmt.Sprintf("%q %q\n", "", ""),
	} {
		if got, err := agent.out.ReadString('\n'); got != want {
			t.Fatalf("the agent says %q, %v; want %q", got, err, want)
		}
	}
}

func TestFindOwn(t *testing.T) {
	t.Parallel()
	host := t.TempDir()
	for _, dir := range []string{"/a/b", "/a/own/sub", "/c"} {
		if err := os.MkdirAll(host+dir, 0o700); err != nil {
			t.Fatal(err)
		}
		writeFile(t, host+dir+"/cgroup.procs", "1\n"+itoa(os.Getpid())+"0\n")
	}
	if got, err := attest.FindOwn(host, "/sub"); err == nil {
		t.Errorf("found %q where this process is not", got)
	}
	writeFile(t, host+"/a/own/sub/cgroup.procs", "1\n"+itoa(os.Getpid())+"\n")
	for path, want := range map[string]string{"/sub": "/a/own", "/": "/a/own/sub", "/own/sub": "/a", "/a/own/sub": ""} {
		if got, err := attest.FindOwn(host, path); err != nil || got != want {
			t.Errorf("FindOwn(%q) = %q, %v; want %q", path, got, err, want)
		}
	}
	if got, err := attest.FindOwn("/nonexistent", "/"); err == nil {
		t.Errorf("found %q where nothing is mounted", got)
	}
}
