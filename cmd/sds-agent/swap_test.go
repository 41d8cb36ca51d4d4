package main

import (
	"strings"
	"testing"
)

func TestSwapWarning(t *testing.T) {
	const head = "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"
	const disk = head + "/dev/vdb2                               partition\t8388604\t\t0\t\t-2\n"
	const zram = head + "/dev/zram0                              partition\t8388604\t\t0\t\t100\n"
	const root = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/vda rw\n24 22 0:22 / /run rw,nosuid shared:5 - tmpfs tmpfs rw,size=100k,mode=755\n"
	const own = root + "90 24 0:40 / /run/spiffe-node/state rw shared:9 - tmpfs tmpfs rw,size=64k,mode=700,noswap\n"
	for name, tc := range map[string]struct {
		dir, swaps, mounts string
		warns              bool
	}{
		"no swap":             {"/run/spiffe-node/state", head, root, false},
		"swap in memory":      {"/run/spiffe-node/state", zram, root, false},
		"swap on a disk":      {"/run/spiffe-node/state", disk, root, true},
		"both":                {"/run/spiffe-node/state", zram + strings.TrimPrefix(disk, head), root, true},
		"noswap":              {"/run/spiffe-node/state", disk, own, false},
		"noswap beside":       {"/run/spiffe-node/statement", disk, own, true},
		"mounted over":        {"/run/spiffe-node/state", disk, own + "91 90 0:41 / /run/spiffe-node/state rw - tmpfs tmpfs rw\n", true},
		"ramfs":               {"/r/state", disk, root + "91 22 0:41 / /r rw - ramfs ramfs rw\n", false},
		"no state":            {"", disk, root, false},
		"nothing to go by":    {"/run/spiffe-node/state", "", "", false},
		"mounts out of joint": {"/run/spiffe-node/state", disk, "a b\n - \n1 2 3 4 /run - \n", true},
	} {
		t.Run(name, func(t *testing.T) {
			if got := swapWarning(tc.dir, tc.swaps, tc.mounts); (got != "") != tc.warns {
				t.Errorf("warning %q", got)
			}
		})
	}
}
