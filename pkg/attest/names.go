package attest

import (
	"bytes"
	"io"
	"os"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	// namesTTL is how long a names file is believed without a look at it.
	namesTTL = 2 * time.Second
	// maxNames is the most that is read of a names file, in bytes.
	maxNames = 16 << 20
)

// names is a passwd(5) or group(5) file: both have the name in the first field
// and the number in the third. It is read again after it has changed. Safe for
// concurrent use.
type names struct {
	file string
	now  atomic.Pointer[namesTable]
	mu   sync.Mutex // one reader of the file at a time
}

type namesTable struct {
	byID    map[uint32]string
	stamp   [4]int64 // device, inode, size, modification time
	checked time.Time
}

func newNames(file, otherwise string) *names {
	if file == "" {
		file = otherwise
	}
	return &names{file: file}
}

// name is the first name the file gives to id; false if it gives none or
// cannot be read.
func (n *names) name(id uint32) (string, bool) {
	t := n.now.Load()
	if t == nil || time.Since(t.checked) >= namesTTL {
		t = n.reload()
	}
	name, ok := t.byID[id]
	return name, ok
}

func (n *names) reload() *namesTable {
	n.mu.Lock()
	defer n.mu.Unlock()
	old := n.now.Load()
	if old != nil && time.Since(old.checked) < namesTTL {
		return old
	}
	next := &namesTable{checked: time.Now()}
	defer func() { n.now.Store(next) }()
	f, err := os.Open(n.file)
	if err != nil {
		return next
	}
	defer f.Close()
	if info, err := f.Stat(); err == nil {
		if st, ok := info.Sys().(*syscall.Stat_t); ok {
			next.stamp = [4]int64{int64(st.Dev), int64(st.Ino), st.Size, info.ModTime().UnixNano()}
		}
	}
	if old != nil && next.stamp == old.stamp {
		next.byID = old.byID
		return next
	}
	data, err := io.ReadAll(io.LimitReader(f, maxNames))
	if err != nil {
		next.stamp = [4]int64{}
		return next
	}
	next.byID = parseNames(data)
	return next
}

func parseNames(data []byte) map[uint32]string {
	out := make(map[uint32]string)
	for line := range bytes.Lines(data) {
		line = bytes.TrimSpace(line)
		if len(line) == 0 || line[0] == '#' {
			continue
		}
		name, rest, ok := bytes.Cut(line, []byte{':'})
		if !ok || len(name) == 0 || name[0] == '+' || name[0] == '-' { // NIS
			continue
		}
		_, rest, ok = bytes.Cut(rest, []byte{':'})
		if !ok {
			continue
		}
		id, _, _ := bytes.Cut(rest, []byte{':'})
		n, err := strconv.ParseUint(string(id), 10, 32)
		if err != nil {
			continue
		}
		if _, ok := out[uint32(n)]; !ok {
			out[uint32(n)] = string(name)
		}
	}
	return out
}
