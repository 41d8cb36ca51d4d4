package procfs

import (
	"bytes"
	"fmt"
	"strconv"
)

// Status is what this project needs of /proc/PID/status, see
// proc_pid_status(5). Numbers are those of the reader's user namespace.
type Status struct {
	UID     uint32 // effective
	GID     uint32 // effective
	RealUID uint32
	RealGID uint32
	Groups  []uint32 // supplementary, as the kernel orders them
	NSpid   []int32  // from the reader's PID namespace inwards
	State   byte     // R, S, D, T, t, Z, X, I
}

// Status reads the credentials of a process.
func (f *FS) Status(pid int) (Status, error) {
	var out Status
	err := f.read(pid, "status", func(b []byte) (err error) {
		out, err = ParseStatus(b)
		return err
	})
	return out, err
}

// ParseStatus reads the contents of /proc/PID/status.
func ParseStatus(data []byte) (Status, error) {
	var s Status
	var uid, gid, groups, state bool
	for len(data) > 0 {
		line, rest, _ := bytes.Cut(data, []byte{'\n'})
		data = rest
		key, value, ok := bytes.Cut(line, []byte{':'})
		if !ok {
			continue
		}
		var err error
		// A process chooses its Name. The kernel escapes line breaks in it and
		// writes it first, so that no later line can be its doing; still the
		// first line with a key is the one that counts.
		switch string(key) {
		case "State":
			if v := bytes.TrimSpace(value); !state && len(v) > 0 {
				s.State, state = v[0], true
			}
		case "Uid":
			if !uid {
				s.RealUID, s.UID, err = credentials(value)
				uid = true
			}
		case "Gid":
			if !gid {
				s.RealGID, s.GID, err = credentials(value)
				gid = true
			}
		case "Groups":
			if !groups {
				s.Groups, err = numbers[uint32](value, 32)
				groups = true
			}
		case "NSpid":
			if s.NSpid == nil {
				s.NSpid, err = numbers[int32](value, 31)
			}
		}
		if err != nil {
			return Status{}, fmt.Errorf("status line %s: %w", key, err)
		}
	}
	if !uid || !gid || !groups {
		return Status{}, fmt.Errorf("%w: status lacks Uid, Gid or Groups", ErrMalformed)
	}
	return s, nil
}

// credentials reads the real and the effective one of the four numbers.
func credentials(value []byte) (realID, effectiveID uint32, err error) {
	ids, err := numbers[uint32](value, 32)
	if err != nil {
		return 0, 0, err
	}
	if len(ids) != 4 {
		return 0, 0, fmt.Errorf("%w: %d numbers instead of 4", ErrMalformed, len(ids))
	}
	return ids[0], ids[1], nil
}

func numbers[T int32 | uint32](value []byte, bits int) ([]T, error) {
	out := []T{}
	for field := range bytes.FieldsSeq(value) {
		n, err := strconv.ParseUint(string(field), 10, bits)
		if err != nil {
			return nil, fmt.Errorf("%w: not a number", ErrMalformed)
		}
		out = append(out, T(n))
	}
	return out, nil
}
