package cluster

import (
	"bufio"
	"bytes"
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

const capSysResource = 24

// hasCapability reports whether this process has the capability in its
// effective set; an unreadable set counts as no.
func hasCapability(n uint) bool {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(status)) {
		if value, ok := strings.CutPrefix(line, "CapEff:"); ok {
			set, err := strconv.ParseUint(strings.TrimSpace(value), 16, 64)
			return err == nil && set&(1<<n) != 0
		}
	}
	return false
}

// startTime is a process's start in clock ticks since boot: with its id it
// names the process for good.
func startTime(pid int) (uint64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	end := bytes.LastIndexByte(stat, ')')
	fields := strings.Fields(string(stat[end+1:]))
	if end < 0 || len(fields) < 20 {
		return 0, fmt.Errorf("/proc/%d/stat has an unknown form", pid)
	}
	return strconv.ParseUint(fields[19], 10, 64)
}

// nodeCgroup begins the name of the tree that a further node's kubelet has.
const nodeCgroup = "spiffe-node-e2e-"

// makeCgroups makes the tree that the kubelet insists on finding.
func (c Config) makeCgroups() error {
	if c.Number == 0 {
		return nil
	}
	hierarchies, err := filepath.Glob("/sys/fs/cgroup/*/cgroup.procs")
	if err != nil {
		return fmt.Errorf("looking for cgroups: %w", err)
	}
	if _, err := os.Stat("/sys/fs/cgroup/cgroup.procs"); err == nil {
		hierarchies = []string{"/sys/fs/cgroup/cgroup.procs"} // version 2
	}
	for _, h := range hierarchies {
		if err := os.MkdirAll(filepath.Join(filepath.Dir(h), c.cgroupRoot()), 0o755); err != nil {
			return fmt.Errorf("making the node's cgroups: %w", err)
		}
	}
	return nil
}

// removeCgroups removes what the kubelets leave: the kubepods trees and the
// runtime's, all empty once the cluster's processes are gone. A tree with a process in it stays.
func (c Config) removeCgroups() error {
	var errs []error
	tree := cmp.Or(strings.TrimPrefix(c.cgroupRoot(), "/"), "kubepods")
	for _, pattern := range []string{"/sys/fs/cgroup/" + tree, "/sys/fs/cgroup/*/" + tree} {
		roots, err := filepath.Glob(pattern)
		if err != nil {
			return fmt.Errorf("looking for cgroups: %w", err)
		}
		for _, root := range roots {
			var dirs []string
			err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
				if err == nil && d.IsDir() {
					dirs = append(dirs, path)
				}
				return nil
			})
			if err != nil {
				errs = append(errs, err)
			}
			for _, dir := range slices.Backward(dirs) {
				if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
					errs = append(errs, err)
				}
			}
		}
	}
	return errors.Join(errs...)
}

// Mount is one line of the node's mount table.
type Mount struct {
	// Root is what of the filesystem is mounted; Point is where, both unescaped.
	Root, Point string
	// Type is the filesystem's.
	Type string
	// ReadOnly is the mount's own flag, not the filesystem's.
	ReadOnly bool
}

func parseMounts(table []byte) ([]Mount, error) {
	var mounts []Mount
	lines := bufio.NewScanner(bytes.NewReader(table))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		before, after, ok := strings.Cut(lines.Text(), " - ")
		f, g := strings.Fields(before), strings.Fields(after)
		if !ok || len(f) < 6 || len(g) < 1 {
			return nil, fmt.Errorf("mount table line has an unknown form: %q", lines.Text())
		}
		mounts = append(mounts, Mount{
			Root: unescape(f[3]), Point: unescape(f[4]), Type: g[0],
			ReadOnly: f[5] == "ro" || strings.HasPrefix(f[5], "ro,"),
		})
	}
	return mounts, lines.Err()
}

var octal = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

func unescape(field string) string { return octal.Replace(field) }

// alive reports whether there is such a process and it is more than a
// zombie that awaits being reaped.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	end := bytes.LastIndexByte(stat, ')')
	return end > 0 && !bytes.HasPrefix(stat[end+1:], []byte(" Z"))
}
