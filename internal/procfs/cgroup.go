package procfs

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
	"strings"
)

// ErrMalformed is returned for bytes the kernel would not have written.
var ErrMalformed = errors.New("malformed")

// Cgroup is one line of /proc/PID/cgroup, see cgroups(7): the process's group
// in one hierarchy.
type Cgroup struct {
	// Hierarchy is 0 for the unified (v2) hierarchy.
	Hierarchy int
	// Controllers is the list of v1 controllers as written, such as
	// "cpu,cpuacct" or "name=systemd"; empty for the unified hierarchy.
	Controllers string
	// Path begins with a slash and is relative to the root of the reader's
	// cgroup namespace: "/.." leads above it.
	Path string
}

// Cgroups reads the groups of a process.
func (f *FS) Cgroups(pid int) ([]Cgroup, error) {
	var out []Cgroup
	err := f.read(pid, "cgroup", func(b []byte) (err error) {
		out, err = ParseCgroups(b)
		return err
	})
	return out, err
}

// ParseCgroups reads the contents of /proc/PID/cgroup. The kernel lets nobody
// create a group with a line break in its name; colons and spaces are allowed.
func ParseCgroups(data []byte) ([]Cgroup, error) {
	out := make([]Cgroup, 0, bytes.Count(data, []byte{'\n'}))
	all := string(data) // one copy that all paths share
	for len(all) > 0 {
		line, rest, ok := strings.Cut(all, "\n")
		if !ok {
			return nil, fmt.Errorf("%w: last cgroup line is not complete", ErrMalformed)
		}
		all = rest
		id, tail, ok := strings.Cut(line, ":")
		if !ok {
			return nil, fmt.Errorf("%w: cgroup line without controllers", ErrMalformed)
		}
		controllers, path, ok := strings.Cut(tail, ":")
		if !ok || !strings.HasPrefix(path, "/") {
			return nil, fmt.Errorf("%w: cgroup line without a path", ErrMalformed)
		}
		n, err := strconv.ParseUint(id, 10, 31)
		if err != nil {
			return nil, fmt.Errorf("%w: cgroup hierarchy is not a number", ErrMalformed)
		}
		out = append(out, Cgroup{Hierarchy: int(n), Controllers: controllers, Path: path})
	}
	return out, nil
}
