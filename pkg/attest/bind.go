package attest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/spiffe-node/spiffe-node/internal/procfs"
)

// Binding is a caller bound to its pod and container, once and for all; its
// selectors follow what is known of the pod. Safe for concurrent use.
type Binding struct {
	a      *Attestor
	caller Caller
	place  place
	pod    *podState // nil outside pods
	groups []uint32

	cur       atomic.Pointer[selectors]
	computing sync.Mutex // one computes selectors at a time
	settling  sync.Mutex // one hashes at a time

	// mu is taken by notifications and is never held while anything outside is
	// called.
	mu       sync.Mutex
	settled  bool
	closed   bool
	exe      *procfs.Exe // held until settled; nil without path discovery
	path     string
	sum      string // SHA-256, hexadecimal; "" not known
	denied   error
	watchers []*watcher
}

type watcher struct{ notify func() }

// selectors is a set and the version of the pod's facts it was made of.
type selectors struct {
	set     Selectors
	version uint64
	fixed   bool // nothing changes them any more
}

var _ Subject = (*Binding)(nil)

// Bind decides who the caller is. It reads some small files of /proc and waits
// for nothing. An error wraps ErrDenied when it is final for this caller;
// others (no permission, out of descriptors) may pass. The Binding must be
// closed.
func (a *Attestor) Bind(ctx context.Context, c Caller) (*Binding, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	if c.PID <= 0 {
		return nil, fmt.Errorf("%w: caller has no process in this PID namespace", ErrDenied)
	}
	if c.Process == nil {
		return nil, fmt.Errorf("%w: caller %d is not held", ErrDenied, c.PID)
	}
	b := &Binding{a: a, caller: c}
	if a.mode != ModeKubernetes {
		if err := b.readUnix(); err != nil {
			b.drop()
			return nil, fmt.Errorf("bind caller %d: %w", c.PID, err)
		}
	}
	b.settled = b.exe == nil
	if a.cgroups != nil {
		lines, err := a.proc.Cgroups(int(c.PID))
		if err == nil {
			b.place, err = a.cgroups.place(lines)
		}
		if err != nil {
			b.drop()
			return nil, fmt.Errorf("bind caller %d: %w", c.PID, final(err))
		}
	}
	// Everything above went by number. It was this caller's if the caller is
	// alive now, because its number is not given away before it has ended.
	if err := c.Process.Alive(); err != nil {
		b.drop()
		return nil, fmt.Errorf("bind caller %d: %w", c.PID, err)
	}
	if b.place.pod != "" {
		b.pod = a.attach(b)
	}
	return b, nil
}

// final makes errors that say the caller has ended or lies a denial.
func final(err error) error {
	if errors.Is(err, ErrDenied) {
		return err
	}
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, procfs.ErrMalformed) || errors.Is(err, procfs.ErrTooLong) {
		return fmt.Errorf("%w: %w", ErrDenied, err)
	}
	return err
}

// Caller is who was bound.
func (b *Binding) Caller() Caller { return b.caller }

// PodUID is the UID in the caller's cgroup; "" outside pods.
func (b *Binding) PodUID() string { return b.place.pod }

// ContainerID is the runtime's ID of the caller's container; "" if the caller
// is outside pods or in a pod but in none of its containers.
func (b *Binding) ContainerID() string { return b.place.container }

// InPod says whether LimitKey is a pod's.
func (b *Binding) InPod() bool { return b.pod != nil }

// LimitKey is the pod's UID, or the user outside pods.
func (b *Binding) LimitKey() string {
	if b.pod != nil {
		return b.place.pod
	}
	return "uid:" + strconv.FormatUint(uint64(b.caller.UID), 10)
}

// Pod is what the witness knows of the caller's pod now; false outside pods and
// while nothing is known.
func (b *Binding) Pod() (Pod, bool) {
	if b.pod == nil || b.Err() != nil {
		return Pod{}, false
	}
	facts := b.pod.current()
	return facts.pod, facts.known && facts.err == nil
}

// Witnesses are the sources that agree on this caller now, in order: "kernel"
// (the socket), "cgroup", and those that know the pod.
func (b *Binding) Witnesses() []string {
	out := []string{"kernel"}
	if b.pod == nil {
		return out
	}
	out = append(out, "cgroup")
	if pod, ok := b.Pod(); ok && pod.Witness != "" {
		out = append(out, pod.Witness)
	}
	return out
}

// Err is nil, or wraps ErrDenied from the moment on at which the caller was
// found not to be who it was bound as. Selectors are then empty.
func (b *Binding) Err() error {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.denied
}

// deny is final; it wakes the watchers, who find no selectors.
func (b *Binding) deny(err error) {
	b.mu.Lock()
	if b.denied == nil {
		b.denied = err
	}
	b.mu.Unlock()
	b.cur.Store(&selectors{fixed: true})
	b.changed()
}

// Watch calls notify after Selectors may have changed, until stop is called or
// the Binding closed. notify must not block.
func (b *Binding) Watch(notify func()) (stop func()) {
	w := &watcher{notify: notify}
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.closed {
		return func() {}
	}
	// The list is replaced, never written to: changed reads it unlocked.
	b.watchers = append(slices.Clip(b.watchers), w)
	return func() {
		b.mu.Lock()
		defer b.mu.Unlock()
		if i := slices.Index(b.watchers, w); i >= 0 {
			b.watchers = slices.Concat(b.watchers[:i], b.watchers[i+1:])
		}
	}
}

func (b *Binding) changed() {
	b.mu.Lock()
	list := b.watchers
	b.mu.Unlock()
	for _, w := range list {
		w.notify()
	}
}

// Close ends the binding: nobody is notified any more. It may be called more
// than once.
func (b *Binding) Close() {
	b.mu.Lock()
	was := b.closed
	b.closed = true
	b.watchers = nil
	b.mu.Unlock()
	if was {
		return
	}
	b.drop()
	if b.pod != nil {
		b.a.detach(b)
	}
}

// drop lets go of the executable.
func (b *Binding) drop() {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.exe != nil {
		b.exe.Close()
		b.exe = nil
	}
}
