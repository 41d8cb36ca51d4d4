package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"syscall"
	"time"
)

// Down ends the cluster in cfg.Dir, if there is one, and removes what it
// left: the directory and the kubelet's cgroups.
func Down(ctx context.Context, cfg Config) error {
	cfg, err := cfg.withDefaults()
	if err != nil {
		return err
	}
	st, running, err := cfg.running()
	if err != nil {
		return err
	}
	if running {
		if err := kill(ctx, st.Init); err != nil {
			return err
		}
	}
	lock, err := takeLock(ctx)
	if err != nil {
		return err
	}
	defer lock.Close()
	return cfg.clean(ctx)
}

// Close ends a cluster and removes its directory.
func (c *Cluster) Close(ctx context.Context) error {
	if err := c.end(ctx); err != nil {
		return err
	}
	if c.cfg.Joins == "" {
		lock, err := takeLock(ctx)
		if err != nil {
			return err
		}
		defer lock.Close()
	}
	return c.cfg.clean(ctx)
}

// end ends every process of the cluster and keeps its directory.
func (c *Cluster) end(ctx context.Context) error {
	if c.lifeline != nil {
		defer c.lifeline.Close()
	}
	return kill(ctx, c.state.Init)
}

// kill ends the cluster's init; the kernel then ends all other processes of
// its PID namespace before init itself is gone.
func kill(ctx context.Context, pid int) error {
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("ending the cluster's init, process %d: %w", pid, err)
	}
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	return Poll(ctx, 20*time.Millisecond, func(context.Context) error {
		if alive(pid) {
			return fmt.Errorf("process %d is still there", pid)
		}
		return nil
	})
}

// clean removes directory and cgroups; a cgroup goes a moment after its last process.
func (c Config) clean(ctx context.Context) error {
	if _, err := os.Stat(c.path("cluster.json")); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("looking at the cluster's directory: %w", err)
	} else if err == nil {
		// Only a directory that Up made is removed.
		if err := os.RemoveAll(c.Dir); err != nil {
			return fmt.Errorf("removing the cluster's directory: %w", err)
		}
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := Poll(ctx, 100*time.Millisecond, func(context.Context) error { return c.removeCgroups() }); err != nil {
		return fmt.Errorf("removing the kubelet's cgroups: %w", err)
	}
	return nil
}
