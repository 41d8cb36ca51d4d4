package main

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"time"
)

// runFanout is how soon all open streams have a secret that an administrator's
// command has changed.
func runFanout(ctx context.Context, o *options, r *Report) error {
	if err := raiseFiles(o.n + 100); err != nil {
		return err
	}
	c := newChange(o.n)
	f := &fleet{o: o, r: r, names: o.names[:1]}
	f.response = func(conn, _ int, resp answer, at time.Time) {
		c.got(conn, resp.content, at)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer f.close()
	defer cancel()
	if err := f.open(ctx); err != nil {
		return err
	}
	if err := sleep(ctx, o.settle); err != nil {
		return err
	}
	acc, err := startAccount(ctx, o)
	if err != nil {
		return err
	}
	var total rounds
	for round := range o.rounds {
		if err := sleep(ctx, rand.N(o.pause+1)); err != nil {
			return err
		}
		if err := total.run(ctx, c, strings.ReplaceAll(o.cmd, "{round}", strconv.Itoa(round))); err != nil {
			return fmt.Errorf("round %d of %d: %w", round+1, o.rounds, err)
		}
	}
	if err := acc.markCPU(); err != nil {
		return err
	}
	r.addTimes("last stream after the command's start", total.last)
	r.addTimes("stream after the command's start", total.fromStart)
	r.addTimes("stream after the command's return", total.fromReturn)
	r.addTimes("first to last stream", total.spread)
	r.addTimes("command itself", total.command)
	updates := float64(o.n * o.rounds)
	r.add("client CPU per update and stream", us(acc.own)/updates, "us")
	if len(o.pids) > 0 {
		r.add("server CPU per update and stream", us(acc.serverCPU())/updates, "us")
	}
	return nil
}

// rounds collects what several updates took.
type rounds struct {
	command, last, spread, fromStart, fromReturn []time.Duration
}

// run makes one update and waits until every stream has it.
func (t *rounds) run(ctx context.Context, c *change, command string) error {
	done := c.arm()
	start := time.Now()
	out, err := shell(ctx, command)
	returned := time.Now()
	if err != nil {
		return fmt.Errorf("-cmd: %w: %s", err, out)
	}
	select {
	case <-done:
	case <-ctx.Done():
		return fmt.Errorf("%d of %d streams have a new secret: %w", c.count(), len(c.at), stopped(ctx))
	}
	first, last := c.at[0], c.at[0]
	for _, at := range c.at {
		if at.Before(first) {
			first = at
		}
		if at.After(last) {
			last = at
		}
		t.fromStart = append(t.fromStart, at.Sub(start))
		t.fromReturn = append(t.fromReturn, max(at.Sub(returned), 0))
	}
	t.command = append(t.command, returned.Sub(start))
	t.last = append(t.last, last.Sub(start))
	t.spread = append(t.spread, last.Sub(first))
	return nil
}

// change notes when each stream gets another secret than it had.
type change struct {
	mu   sync.Mutex
	last []uint64
	at   []time.Time   // written until done is closed
	left int           // streams without a new secret
	done chan struct{} // closed when there are none left; nil until armed
}

func newChange(n int) *change {
	return &change{last: make([]uint64, n), at: make([]time.Time, n)}
}

// arm starts a round: changes count from now on; the channel closes when every
// stream had one.
func (c *change) arm() <-chan struct{} {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.at)
	c.left, c.done = len(c.at), make(chan struct{})
	return c.done
}

func (c *change) got(i int, secret uint64, at time.Time) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.last[i] == secret {
		return
	}
	c.last[i] = secret
	if c.left == 0 || !c.at[i].IsZero() {
		return
	}
	c.at[i] = at
	if c.left--; c.left == 0 {
		close(c.done)
	}
}

func (c *change) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.at) - c.left
}

// shell runs a command the user gave, as the user.
func shell(ctx context.Context, command string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, "sh", "-c", command)
	cmd.WaitDelay = time.Second
	return cmd.CombinedOutput()
}
