package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Reboot does to the node what a power cut does to a worker: every process but
// the control plane's dies, mounts, cgroups and /run are gone, disks and the
// API's objects stay. It returns when the kubelet answers again.
func (c *Cluster) Reboot(ctx context.Context) error {
	return c.control(ctx, http.MethodPost, "/reboot", nil)
}

func (s *supervisor) reboot(ctx context.Context) error {
	for _, name := range []string{"kubelet", "kube-proxy", "containerd"} {
		if err := s.parts[name].stop(ctx, syscall.SIGKILL); err != nil {
			return err
		}
	}
	killCtx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	if err := Poll(killCtx, 20*time.Millisecond, func(context.Context) error { return s.killPods() }); err != nil {
		return fmt.Errorf("ending the pods' processes: %w", err)
	}
	if err := s.unmountPods(); err != nil {
		return err
	}
	left, err := os.ReadDir("/run")
	if err != nil {
		return fmt.Errorf("emptying the node's /run: %w", err)
	}
	for _, e := range left {
		if err := os.RemoveAll(filepath.Join("/run", e.Name())); err != nil {
			return fmt.Errorf("emptying the node's /run: %w", err)
		}
	}
	if err := Poll(killCtx, 50*time.Millisecond, func(context.Context) error { return s.cfg.removeCgroups() }); err != nil {
		return fmt.Errorf("removing the pods' cgroups: %w", err)
	}
	if err := s.cfg.newBootID(); err != nil {
		return err
	}
	if err := s.startReady(ctx, "containerd", criReady); err != nil {
		return err
	}
	if s.cfg.KubeProxy {
		if err := s.startReady(ctx, "kube-proxy", nil); err != nil {
			return err
		}
	}
	return s.startReady(ctx, "kubelet", dialable("tcp", "127.0.0.1:10248"))
}

// killPods kills every process that is neither init, supervisor nor a
// component, and says so as long as there is one.
func (s *supervisor) killPods() error {
	keep := []int{1, os.Getpid()}
	for _, part := range s.parts {
		keep = append(keep, part.pid())
	}
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return Fatal(err)
	}
	left := 0
	for _, p := range procs {
		pid, err := strconv.Atoi(p.Name())
		if err != nil || slices.Contains(keep, pid) || !alive(pid) {
			continue
		}
		left++
		_ = syscall.Kill(pid, syscall.SIGKILL) // gone is fine, and the next round sees the rest
	}
	if left > 0 {
		return fmt.Errorf("%d processes are left", left)
	}
	return nil
}

// unmountPods takes away every mount the kubelet and the runtime have made.
func (s *supervisor) unmountPods() error {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("reading the mount table: %w", err)
	}
	mounts, err := parseMounts(table)
	if err != nil {
		return err
	}
	for _, m := range slices.Backward(mounts) {
		if strings.HasPrefix(m.Point, "/var/lib/kubelet/") || strings.HasPrefix(m.Point, "/run/") {
			// The host's own below /run are hidden by the node's, and not to be found.
			if err := syscall.Unmount(m.Point, syscall.MNT_DETACH); err != nil && !errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("unmounting %s: %w", m.Point, err)
			}
		}
	}
	return nil
}
