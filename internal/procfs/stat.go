package procfs

import (
	"bytes"
	"fmt"
	"strconv"
)

// StartTime is when a process started, in clock ticks since boot: field 22 of
// /proc/PID/stat, see proc_pid_stat(5).
func (f *FS) StartTime(pid int) (uint64, error) {
	var out uint64
	err := f.read(pid, "stat", func(b []byte) (err error) {
		out, err = ParseStartTime(b)
		return err
	})
	return out, err
}

// ParseStartTime reads the start time from the contents of /proc/PID/stat. The
// second field is a name the process chooses; it may hold spaces and brackets,
// so fields are counted from the last closing bracket.
func ParseStartTime(data []byte) (uint64, error) {
	end := bytes.LastIndexByte(data, ')')
	if end < 0 {
		return 0, fmt.Errorf("%w: stat without a name", ErrMalformed)
	}
	field := 2
	for value := range bytes.FieldsSeq(data[end+1:]) {
		if field++; field == 22 {
			n, err := strconv.ParseUint(string(value), 10, 64)
			if err != nil {
				return 0, fmt.Errorf("%w: start time is not a number", ErrMalformed)
			}
			return n, nil
		}
	}
	return 0, fmt.Errorf("%w: stat ends before the start time", ErrMalformed)
}
