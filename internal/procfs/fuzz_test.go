package procfs_test

import (
	"strings"
	"testing"

	"github.com/spiffe-node/spiffe-node/internal/procfs"
)

// What is parsed can be written down again and is the input.
func FuzzParseCgroups(f *testing.F) {
	f.Add([]byte("0::/\n"))
	f.Add([]byte("12:cpu,cpuacct:/kubepods/besteffort/pod1/2\n1:name=systemd:/a:b:c\n0::/../..\n"))
	f.Add([]byte("0::/a (deleted)\n"))
	f.Add([]byte("::\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		groups, err := procfs.ParseCgroups(data)
		if err != nil {
			return
		}
		if len(groups) != strings.Count(string(data), "\n") {
			t.Errorf("%q: %d groups", data, len(groups))
		}
		rest := string(data)
		for _, g := range groups {
			line, after, _ := strings.Cut(rest, "\n")
			if !strings.HasSuffix(line, ":"+g.Controllers+":"+g.Path) || g.Path[0] != '/' || strings.Contains(g.Controllers, ":") {
				t.Errorf("%q: %+v is not line %q", data, g, line)
			}
			rest = after
		}
	})
}

func FuzzParseStatus(f *testing.F) {
	f.Add([]byte(statusText))
	f.Add([]byte("Uid:\t0\t0\t0\t0\nGid:\t0\t0\t0\t0\nGroups:\t\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		s, err := procfs.ParseStatus(data)
		if err == nil && len(s.Groups)*2 > len(data) {
			t.Errorf("%d groups out of %d bytes", len(s.Groups), len(data))
		}
	})
}

// A process's name cannot change what follows it.
func FuzzParseStartTime(f *testing.F) {
	f.Add("cat", uint64(1))
	f.Add(") S 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 7 (", uint64(5))
	f.Fuzz(func(t *testing.T, name string, start uint64) {
		fields := strings.Repeat(" 1", 18)
		data := "1 (" + name + ") S" + fields + " " + uitoa(start) + " 3 4\n"
		got, err := procfs.ParseStartTime([]byte(data))
		if err != nil || got != start {
			t.Errorf("%q: %d, %v", data, got, err)
		}
		_, _ = procfs.ParseStartTime([]byte(name))
	})
}

func uitoa(n uint64) string {
	digits := "0123456789"
	if n < 10 {
		return digits[n : n+1]
	}
	return uitoa(n/10) + digits[n%10:n%10+1]
}
