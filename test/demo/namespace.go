package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

const inNamespace = "SPIFFE_NODE_DEMO_SCRATCH"

// enter runs this program again in a mount namespace of its own, and in a user
// namespace if it is not root, so that every mount of the demo goes with it.
func enter(scratch string) error {
	self, err := os.Executable()
	if err != nil {
		return err
	}
	cmd := exec.Command(self, os.Args[1:]...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), inNamespace+"="+scratch)
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if os.Geteuid() != 0 {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{HostID: os.Getuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{HostID: os.Getgid(), Size: 1}}
	}
	err = cmd.Run()
	if errors.Is(err, syscall.EPERM) || errors.Is(err, syscall.ENOSPC) {
		return fmt.Errorf("make a namespace for the demo's mounts: %w; this system lets only root do that, run: sudo make demo", err)
	}
	return err
}

// prepare makes the scratch directory a tmpfs with a shared kubelet directory,
// as a node has them.
func prepare(scratch string) error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("keep mounts private: %w", err)
	}
	if err := unix.Mount("tmpfs", scratch, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755,size=64m"); err != nil {
		return fmt.Errorf("mount scratch tmpfs: %w", err)
	}
	return nil
}

// podCgroups makes cgroups as the kubelet would for one container of a pod, in
// every hierarchy of the machine. It fails where only the kubelet's own rights
// would do, as in a user namespace.
func podCgroups(podUID, containerID string) (dirs []string, err error) {
	lines, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		return nil, err
	}
	for line := range strings.Lines(string(lines)) {
		_, rest, _ := strings.Cut(strings.TrimSpace(line), ":")
		controllers, _, _ := strings.Cut(rest, ":")
		root := filepath.Join("/sys/fs/cgroup", strings.TrimPrefix(controllers, "name="))
		if controllers == "" {
			if root = "/sys/fs/cgroup"; !isCgroup(root) {
				root = "/sys/fs/cgroup/unified"
			}
		}
		if !isCgroup(root) {
			continue
		}
		dir := filepath.Join(root, "kubepods", "besteffort", "pod"+podUID, containerID)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		if strings.Contains(controllers, "cpuset") {
			seedCpuset(root, dir)
		}
		dirs = append(dirs, dir)
	}
	if len(dirs) == 0 {
		return nil, errors.New("no cgroup hierarchy can be written")
	}
	return dirs, nil
}

func isCgroup(dir string) bool {
	_, err := os.Stat(filepath.Join(dir, "cgroup.procs"))
	return err == nil
}

// seedCpuset gives each new cpuset on the way its parent's CPUs and memory
// nodes: a v1 cpuset without them takes no process.
func seedCpuset(root, dir string) {
	rel, err := filepath.Rel(root, dir)
	if err != nil {
		return
	}
	parent := root
	for part := range strings.SplitSeq(rel, "/") {
		child := filepath.Join(parent, part)
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			if v, err := os.ReadFile(filepath.Join(parent, f)); err == nil {
				// Best effort: joining the cgroup will tell if it did not take.
				_ = os.WriteFile(filepath.Join(child, f), v, 0o600)
			}
		}
		parent = child
	}
}

// joinAndExec is the last step of a container runtime: join the cgroups, drop to
// the user, become the program.
func joinAndExec(cgroups []string, uid int, argv []string) error {
	for _, dir := range cgroups {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte("0"), 0); err != nil {
			return fmt.Errorf("join %s: %w", dir, err)
		}
	}
	if uid > 0 {
		if err := errors.Join(syscall.Setgroups(nil), syscall.Setgid(uid), syscall.Setuid(uid)); err != nil {
			return fmt.Errorf("become user %d: %w", uid, err)
		}
	}
	return syscall.Exec(argv[0], argv, os.Environ())
}

func removeCgroups(dirs []string) {
	for _, dir := range dirs {
		// Only empty cgroups can be removed; the outer ones may be the node's own.
		for d := dir; strings.Contains(d, "kubepods"); d = filepath.Dir(d) {
			if os.Remove(d) != nil {
				break
			}
		}
	}
}
