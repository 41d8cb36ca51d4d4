package attest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/spiffe-node/spiffe-node/internal/procfs"
)

// maxHashes bounds the memory of the cache: some 200 bytes each.
const maxHashes = 2048

var errSizeLimit = errors.New("executable exceeds the size limit")

// hashes remembers the SHA-256 of executables by device, inode, size and both
// times, so that many callers of one program cost one reading. A file system
// that lies about these could as well lie about the contents. Safe for
// concurrent use; the zero value is empty.
type hashes struct {
	mu sync.Mutex
	m  map[procfs.ExeID]*hashing
}

// hashing is one file being read, or its result; the other fields may be read
// once done is closed.
type hashing struct {
	done chan struct{}
	sum  string
	err  error
}

// sum is the lower-case hexadecimal SHA-256 of the held file. One caller reads
// it, others with the same file wait for that one. limit is in bytes, 0 for
// none; a larger file is errSizeLimit.
func (h *hashes) sum(ctx context.Context, exe *procfs.Exe, limit int64) (string, error) {
	id := exe.ID()
	if limit > 0 && id.Size > uint64(limit) {
		return "", fmt.Errorf("%w: %d > %d bytes", errSizeLimit, id.Size, limit)
	}
	for {
		h.mu.Lock()
		e, ok := h.m[id]
		if !ok {
			e = &hashing{done: make(chan struct{})}
			if h.m == nil {
				h.m = make(map[procfs.ExeID]*hashing)
			}
			for old := range h.m { // any one: what is in use comes back soon
				if len(h.m) < maxHashes {
					break
				}
				delete(h.m, old)
			}
			h.m[id] = e
		}
		h.mu.Unlock()
		if ok {
			select {
			case <-e.done:
			case <-ctx.Done():
				return "", ctx.Err()
			}
			if e.err != nil && ctx.Err() == nil && errors.Is(e.err, errAbandoned) {
				continue // its reader gave up, we have not
			}
			return e.sum, e.err
		}
		e.sum, e.err = read(ctx, exe, limit)
		if e.err != nil {
			h.mu.Lock()
			if h.m[id] == e {
				delete(h.m, id)
			}
			h.mu.Unlock()
		}
		close(e.done)
		return e.sum, e.err
	}
}

var errAbandoned = errors.New("hashing was given up")

func read(ctx context.Context, exe *procfs.Exe, limit int64) (string, error) {
	f, err := exe.Open()
	if err != nil {
		return "", err
	}
	defer f.Close()
	sum := sha256.New()
	buf := make([]byte, 128<<10)
	var total int64
	for {
		if err := ctx.Err(); err != nil {
			return "", fmt.Errorf("%w: %w", errAbandoned, err)
		}
		n, err := f.Read(buf)
		sum.Write(buf[:n])
		if total += int64(n); limit > 0 && total > limit {
			return "", fmt.Errorf("%w: more than %d bytes", errSizeLimit, limit)
		}
		if errors.Is(err, io.EOF) {
			return hex.EncodeToString(sum.Sum(nil)), nil
		}
		if err != nil {
			return "", err
		}
	}
}
