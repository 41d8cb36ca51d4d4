package cluster

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// kubeletTunables are the sysctls the kubelet insists on. They belong to the
// whole machine, so the node gets files that already say what it wants.
var kubeletTunables = map[string]string{
	"vm/overcommit_memory":      "1",
	"vm/panic_on_oom":           "0",
	"kernel/panic":              "10",
	"kernel/panic_on_oops":      "1",
	"kernel/keys/root_maxkeys":  "1000000",
	"kernel/keys/root_maxbytes": "25000000",
}

// prepareNamespaces turns fresh namespaces into a node: shared propagation, its own /proc and
// /run, kubelet and CNI directories in the scratch directory, a bridge.
func (c Config) prepareNamespaces() error {
	// Private first: events must not reach the host. Then shared, in peer
	// groups of our own, as the kubelet's Bidirectional volumes need.
	for _, flag := range []uintptr{syscall.MS_PRIVATE, syscall.MS_SHARED} {
		if err := syscall.Mount("", "/", "", syscall.MS_REC|flag, ""); err != nil {
			return fmt.Errorf("setting the propagation of the node's mounts: %w", err)
		}
	}
	if err := syscall.Mount("proc", "/proc", "proc", syscall.MS_NOSUID|syscall.MS_NODEV|syscall.MS_NOEXEC, ""); err != nil {
		return fmt.Errorf("mounting the node's /proc: %w", err)
	}
	if err := syscall.Mount("tmpfs", "/run", "tmpfs", syscall.MS_NOSUID|syscall.MS_NODEV, "mode=0755"); err != nil {
		return fmt.Errorf("mounting the node's /run: %w", err)
	}
	// The control plane's state dies with the cluster, but not in a reboot of the node.
	if err := syscall.Mount("tmpfs", c.path("etcd"), "tmpfs", 0, "mode=0700"); err != nil {
		return fmt.Errorf("mounting a place for etcd: %w", err)
	}
	if err := c.newBootID(); err != nil {
		return err
	}
	for name, value := range kubeletTunables {
		file := c.path("sysctl", strings.ReplaceAll(name, "/", "."))
		if err := writeFile(file, value+"\n"); err != nil {
			return err
		}
		target := filepath.Join("/proc/sys", name)
		if err := syscall.Mount(file, target, "", syscall.MS_BIND, ""); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("hiding sysctl %s: %w", name, err)
		}
	}
	if err := c.overlay("/var/lib"); err != nil {
		return err
	}
	for name, target := range map[string]string{
		"kubelet":        "/var/lib/kubelet",
		"cni-state":      "/var/lib/cni",
		"log-pods":       "/var/log/pods",
		"log-containers": "/var/log/containers",
	} {
		for _, dir := range []string{c.path(name), target} {
			if err := os.MkdirAll(dir, 0o755); err != nil {
				return fmt.Errorf("making a directory of the node: %w", err)
			}
		}
		if err := syscall.Mount(c.path(name), target, "", syscall.MS_BIND, ""); err != nil {
			return fmt.Errorf("mounting the node's %s: %w", target, err)
		}
		// Out of the peer group of the scratch directory, where every pod's mount
		// would appear a second time, into one of its own.
		for _, flag := range []uintptr{syscall.MS_PRIVATE, syscall.MS_SHARED} {
			if err := syscall.Mount("", target, "", flag, ""); err != nil {
				return fmt.Errorf("setting the propagation of the node's %s: %w", target, err)
			}
		}
	}
	if err := syscall.Sethostname([]byte(c.NodeName)); err != nil {
		return fmt.Errorf("naming the node: %w", err)
	}
	if err := c.makeCgroups(); err != nil {
		return err
	}
	return c.prepareNetwork()
}

// overlay lets the node see a directory of the host and keep what it writes
// there, hostPath volumes for one, in the scratch directory.
func (c Config) overlay(dir string) error {
	upper, work := c.path("overlay", dir, "upper"), c.path("overlay", dir, "work")
	for _, d := range []string{upper, work} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return fmt.Errorf("making the node's own %s: %w", dir, err)
		}
	}
	if err := syscall.Mount("overlay", dir, "overlay", 0, "lowerdir="+dir+",upperdir="+upper+",workdir="+work); err != nil {
		return fmt.Errorf("mounting the node's own %s: %w", dir, err)
	}
	return nil
}

// newBootID gives the node another boot ID, by which the kubelet knows a reboot.
func (c Config) newBootID() error {
	id := make([]byte, 16)
	_, _ = rand.Read(id) // never fails since Go 1.24
	file := c.path("sysctl", "boot_id")
	if err := writeFile(file, fmt.Sprintf("%x-%x-%x-%x-%x\n", id[:4], id[4:6], id[6:8], id[8:10], id[10:])); err != nil {
		return err
	}
	const target = "/proc/sys/kernel/random/boot_id"
	_ = syscall.Unmount(target, syscall.MNT_DETACH) // the last one, if any
	if err := syscall.Mount(file, target, "", syscall.MS_BIND, ""); err != nil {
		return fmt.Errorf("giving the node a boot ID: %w", err)
	}
	return nil
}

// prepareNetwork makes the node's bridge. A node that joins has its link to the
// first one from [Join], and reaches everything outside its own pods by it.
func (c Config) prepareNetwork() error {
	commands := []string{
		"link set lo up",
		// An address of its own: else it takes the lowest of its ports', which
		// changes when pods come and go, and pods go on sending to the old one.
		"link add " + bridge + " address " + bridgeMAC + " type bridge",
		"addr add " + c.nodeIP() + "/16 dev " + bridge,
		"link set " + bridge + " up",
		// Packets to nowhere should fail at once and not wait for a route.
		"route add blackhole default",
	}
	if c.Joins == "" {
		commands = append(commands,
			// The service address of the API server is local: no proxy is needed for it.
			"addr add "+apiIP+"/32 dev lo",
			"addr add "+clusterDNS+"/32 dev lo",
			// Service addresses need a route to be looked up before kube-proxy's rules turn them into endpoints.
			"route add "+serviceCIDR+" dev "+bridge,
		)
	}
	for _, args := range commands {
		if out, err := exec.Command("ip", strings.Fields(args)...).CombinedOutput(); err != nil {
			return fmt.Errorf("ip %s: %w: %s", args, err, strings.TrimSpace(string(out)))
		}
	}
	return writeFile("/proc/sys/net/ipv4/ip_forward", "1\n")
}

func writeFile(path, content string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return fmt.Errorf("making the directory of %s: %w", path, err)
	}
	if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
		return fmt.Errorf("writing %s: %w", path, err)
	}
	return nil
}
