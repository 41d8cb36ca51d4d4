// Package mounttest runs tests that mount in a mount namespace of their own, so
// that the host never sees what they do.
package mounttest

import (
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// marker says, in a re-executed test binary, that the namespace is private.
const marker = "SPIFFE_NODE_TEST_MOUNTS"

// Enter runs the test binary again in a private mount namespace, as root or, in
// a user namespace, as somebody who looks like root there. Call it first in
// TestMain: if done, end with code. Where neither is possible it returns at
// once, and Require skips.
func Enter() (code int, done bool) {
	if os.Getenv(marker) != "" {
		// Nothing that is mounted here may reach the host's namespace.
		if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
			fmt.Fprintln(os.Stderr, "make the mounts private:", err)
			return 1, true
		}
		return 0, false
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...) //nolint:gosec // this very program with its own arguments
	cmd.Args[0] = os.Args[0]
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = append(os.Environ(), marker+"=1")
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWNS, Pdeathsig: unix.SIGKILL}
	if uid := os.Getuid(); uid != 0 {
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getgid(), Size: 1}}
	}
	// Pdeathsig is about the thread that starts the child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	if err := cmd.Start(); err != nil {
		fmt.Fprintf(os.Stderr, "no private mount namespace (%v): tests that mount will be skipped\n", err)
		return 0, false
	}
	if err := cmd.Wait(); err != nil {
		if code := cmd.ProcessState.ExitCode(); code > 0 {
			return code, true
		}
		fmt.Fprintln(os.Stderr, "the tests in the private mount namespace ended:", err)
		return 1, true
	}
	return 0, true
}

// Require skips the test where nothing can be mounted.
func Require(tb testing.TB) {
	tb.Helper()
	if os.Getenv(marker) == "" {
		tb.Skip("needs root or user namespaces: the test makes real mounts in a mount namespace of its own")
	}
}

// Tmpfs mounts a tmpfs on a new directory for the time of the test. size is a
// tmpfs size such as "64k"; empty for no limit of its own.
func Tmpfs(tb testing.TB, size string) string {
	tb.Helper()
	Require(tb)
	dir := tb.TempDir()
	data := "mode=0755"
	if size != "" {
		data += ",size=" + size
	}
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, data); err != nil {
		tb.Fatalf("mount a tmpfs: %v", err)
	}
	tb.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			tb.Errorf("unmount the tmpfs: %v", err)
		}
	})
	return dir
}
