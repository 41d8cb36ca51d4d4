package cluster

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
)

// takeLock takes the machine's only place for a cluster: cgroups are not
// namespaced here, and removing those of a running kubelet would break it. The
// lock lasts until every copy of the file is closed; init holds one.
func takeLock() (*os.File, error) {
	path := filepath.Join(os.TempDir(), "spiffe-node-e2e.lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the lock for clusters: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		if errors.Is(err, syscall.EWOULDBLOCK) {
			return nil, fmt.Errorf("another cluster runs on this machine (it holds %s); end it with its own `cluster down`", path)
		}
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
	return f, nil
}
