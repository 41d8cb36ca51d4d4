package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"time"
)

// takeLock takes the machine's only place for a cluster: cgroups are not
// namespaced here, and removing those of a running kubelet would break it. The
// lock lasts until every copy of the file is closed; init holds one.
func takeLock(ctx context.Context) (*os.File, error) {
	path := filepath.Join(os.TempDir(), "spiffe-node-e2e.lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("opening the lock for clusters: %w", err)
	}
	// A cluster that has just been ended may take a moment to let go: its
	// init's main thread is gone before the others.
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	err = Poll(ctx, 20*time.Millisecond, func(context.Context) error {
		err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		switch {
		case errors.Is(err, syscall.EWOULDBLOCK):
			return fmt.Errorf("another cluster runs on this machine (it holds %s); end it with its own `cluster down`", path)
		case err != nil:
			return Fatal(fmt.Errorf("locking %s: %w", path, err))
		}
		return nil
	})
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}
