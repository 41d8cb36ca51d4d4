package main

import (
	"fmt"
	"os"
	"strings"
)

// swapWarning says that restart state in dir, with the keys in it, may reach a
// disk: tmpfs gives way to swap unless it is mounted with noswap (Linux 6.4),
// which takes the right to mount that an agent does not have. Empty: it may not,
// or it cannot be told.
func swapWarning(dir, swaps, mountinfo string) string {
	device := swapDisk(swaps)
	if dir == "" || device == "" || noswap(dir, mountinfo) {
		return ""
	}
	return fmt.Sprintf("restart state in %s holds private keys and may be swapped out to %s: mount a tmpfs with noswap there (Linux 6.4), switch swap off, or keep no restart state (identity.stateDirectory)", dir, device)
}

// swapDisk is a swap area that is not memory itself, out of /proc/swaps.
func swapDisk(swaps string) string {
	for line := range strings.Lines(swaps) {
		name, _, _ := strings.Cut(strings.TrimSpace(line), " ")
		name, _, _ = strings.Cut(name, "\t")
		if strings.HasPrefix(name, "/") && !strings.HasPrefix(name, "/dev/zram") {
			return name
		}
	}
	return ""
}

// noswap says whether the mount that dir is on is never swapped, out of
// /proc/self/mountinfo: the longest mount point above dir, the last of several.
func noswap(dir, mountinfo string) bool {
	best, never := "", false
	for line := range strings.Lines(mountinfo) {
		before, after, ok := strings.Cut(line, " - ")
		fields, tail := strings.Fields(before), strings.Fields(after)
		if !ok || len(fields) < 5 || len(tail) < 1 {
			continue
		}
		point := fields[4]
		if point != "/" && dir != point && !strings.HasPrefix(dir, point+"/") || len(point) < len(best) {
			continue
		}
		best, never = point, tail[0] == "ramfs" || tail[0] == "tmpfs" && strings.Contains(","+tail[len(tail)-1]+",", ",noswap,")
	}
	return never
}

// swapWarning is that of this machine now.
func (n *node) swapWarning() string {
	swaps, err := os.ReadFile("/proc/swaps")
	if err != nil {
		return ""
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return ""
	}
	return swapWarning(n.stateDir, string(swaps), string(mounts))
}
