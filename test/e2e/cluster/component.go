package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"
)

// component is one program of the cluster. Its methods may be called from any
// goroutine.
type component struct {
	name, path, log string
	args            []string

	mu   sync.Mutex
	cmd  *exec.Cmd     // nil when it does not run
	done chan struct{} // closed when cmd has ended
}

// start runs the program, its output appended to its log file.
func (c *component) start() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cmd != nil {
		return fmt.Errorf("%s is running already", c.name)
	}
	if err := os.MkdirAll(filepath.Dir(c.log), 0o755); err != nil {
		return fmt.Errorf("making the log directory: %w", err)
	}
	out, err := os.OpenFile(c.log, os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return fmt.Errorf("opening the log of %s: %w", c.name, err)
	}
	defer out.Close()
	cmd := exec.Command(c.path, c.args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Env = []string{"PATH=" + os.Getenv("PATH"), "HOME=/root"}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("starting %s: %w", c.name, err)
	}
	done := make(chan struct{})
	c.cmd, c.done = cmd, done
	go func() {
		_ = cmd.Wait() // its log says why it ended
		c.mu.Lock()
		c.cmd = nil
		c.mu.Unlock()
		close(done)
	}()
	return nil
}

// stop signals the program and waits until it is gone; after ten seconds it
// is killed. Stopping what does not run is fine.
func (c *component) stop(ctx context.Context, sig syscall.Signal) error {
	c.mu.Lock()
	cmd, done := c.cmd, c.done
	c.mu.Unlock()
	if cmd == nil {
		return nil
	}
	if err := cmd.Process.Signal(sig); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("stopping %s: %w", c.name, err)
	}
	for _, wait := range []time.Duration{10 * time.Second, 5 * time.Second} {
		select {
		case <-done:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("stopping %s: %w", c.name, ctx.Err())
		case <-time.After(wait):
			_ = cmd.Process.Kill()
		}
	}
	return fmt.Errorf("%s does not end even when killed", c.name)
}

func (c *component) pid() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cmd == nil {
		return 0
	}
	return c.cmd.Process.Pid
}

// await polls ready until it answers nil, the program ends or ctx does.
func (c *component) await(ctx context.Context, ready func(context.Context) error) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := ready(ctx)
		if err == nil {
			return nil
		}
		if c.pid() == 0 {
			text, _ := os.ReadFile(c.log)
			return fmt.Errorf("%s ended; the end of %s:\n%s", c.name, c.log, tail(text, 15))
		}
		select {
		case <-ctx.Done():
			text, _ := os.ReadFile(c.log)
			return fmt.Errorf("%s does not get ready: %w; the end of %s:\n%s", c.name, err, c.log, tail(text, 15))
		case <-tick.C:
		}
	}
}
