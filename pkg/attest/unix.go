package attest

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"time"

	"github.com/spiffe-node/spiffe-node/internal/procfs"
)

// maxGroups bounds the memory of one binding: root in a container can give
// itself 65,536 groups.
const maxGroups = 512

// noisy lets one warning a second through, whatever callers do.
func (a *Attestor) noisy() bool {
	now, last := time.Now().UnixNano(), a.warned.Load()
	return now-last >= int64(time.Second) && a.warned.CompareAndSwap(last, now)
}

// readUnix takes the facts that unix selectors are made of. User and group are
// those the kernel recorded at connect(2).
func (b *Binding) readUnix() error {
	pid := int(b.caller.PID)
	known := false
	if c, ok := b.caller.Process.(Credentialed); ok {
		groups, err := c.Groups()
		if err != nil && !errors.Is(err, errors.ErrUnsupported) {
			return err
		}
		b.groups, known = groups, err == nil
	}
	if !known {
		status, err := b.a.proc.Status(pid)
		if err != nil {
			return final(err)
		}
		b.groups = status.Groups
	}
	if len(b.groups) > maxGroups {
		if b.a.noisy() {
			b.a.log.Warn("caller has too many groups, its supplementary groups are left out",
				slog.Int("pid", pid), slog.Uint64("uid", uint64(b.caller.UID)), slog.Int("groups", len(b.groups)), slog.Int("limit", maxGroups))
		}
		b.groups = nil
	}
	if !b.a.unix.DiscoverPath {
		return nil
	}
	exe, err := b.a.proc.OpenExe(pid)
	if err != nil {
		// No right to look, or no executable (a kernel thread, an exiting
		// process): the selectors are left out.
		if b.a.noisy() {
			b.a.log.Warn("caller's executable cannot be seen, unix:path and unix:sha256 are left out",
				slog.Int("pid", pid), slog.Any("error", err))
		}
		return nil
	}
	b.exe, b.path = exe, exe.Path()
	return nil
}

// Settle finishes what Bind leaves out because it can take long: the hash of
// the executable. The file is the one held since Bind. If the process executes
// another by then, the caller is denied, now and for good. An error that does
// not wrap ErrDenied is ctx's. Selectors settles a Binding that is not; callers
// that want a deadline settle it first.
func (b *Binding) Settle(ctx context.Context) error {
	b.settling.Lock()
	defer b.settling.Unlock()
	b.mu.Lock()
	exe, done, err := b.exe, b.settled, b.denied
	b.exe = nil // ours now; drop must not close it under us
	b.mu.Unlock()
	if done || err != nil || exe == nil {
		return err
	}
	sum, err := b.hash(ctx, exe)
	if err != nil && !errors.Is(err, ErrDenied) {
		b.mu.Lock()
		defer b.mu.Unlock()
		if b.closed {
			exe.Close()
		} else {
			b.exe = exe
		}
		return fmt.Errorf("hash executable of caller %d: %w", b.caller.PID, err)
	}
	exe.Close()
	if err != nil {
		err = fmt.Errorf("caller %d: %w", b.caller.PID, err)
		b.deny(err)
		return err
	}
	b.mu.Lock()
	b.sum, b.settled = sum, true
	b.mu.Unlock()
	return nil
}

// hash is the hash of the held file, "" if there is none to give, and makes
// sure that the caller still executes that file.
func (b *Binding) hash(ctx context.Context, exe *procfs.Exe) (string, error) {
	sum := ""
	if limit := b.a.unix.SizeLimit; limit >= 0 {
		var err error
		if sum, err = b.a.hashes.sum(ctx, exe, limit); err != nil {
			if ctx.Err() != nil {
				return "", err
			}
			sum = ""
			if b.a.noisy() {
				b.a.log.Warn("caller's executable is not hashed, unix:sha256 is left out",
					slog.Int("pid", int(b.caller.PID)), slog.Uint64("bytes", exe.ID().Size), slog.Any("error", err))
			}
		}
	}
	now, err := b.a.proc.OpenExe(int(b.caller.PID))
	if err != nil {
		return "", final(err)
	}
	defer now.Close()
	if !now.Same(exe) {
		return "", fmt.Errorf("%w: it has executed another program since it connected", ErrDenied)
	}
	return sum, b.caller.Process.Alive()
}

// Selectors are the caller's selectors now. When nothing has changed since the
// last call, this is two loads and a comparison.
func (b *Binding) Selectors() Selectors {
	if s := b.cur.Load(); s != nil && (s.fixed || s.version == b.pod.version.Load()) {
		return s.set
	}
	return b.refresh()
}

func (b *Binding) refresh() Selectors {
	_ = b.Settle(context.Background()) // a denial is in Err
	b.computing.Lock()
	defer b.computing.Unlock()
	next := b.compute()
	if old := b.cur.Load(); old != nil && old.set.Equal(next.set) {
		next.set = old.set // those who hold it can tell by its address
	}
	b.cur.Store(next)
	if b.Err() != nil { // denied meanwhile
		next = &selectors{fixed: true}
		b.cur.Store(next)
	}
	return next.set
}

func (b *Binding) compute() *selectors {
	if b.Err() != nil {
		return &selectors{fixed: true}
	}
	if b.pod == nil {
		return &selectors{set: NewSelectors(b.unixSelectors()...), fixed: true}
	}
	f := b.pod.current()
	if f.err != nil {
		b.mu.Lock()
		b.denied = f.err
		b.mu.Unlock()
		return &selectors{fixed: true}
	}
	if len(f.selectors) == 0 {
		return &selectors{version: f.version}
	}
	all := append(b.unixSelectors(), f.selectors...)
	if source, ok := b.a.source.(ContainerSource); ok && f.known && b.place.container != "" {
		if c, ok := source.Container(b.place.pod, b.place.container); ok {
			if c.Name != "" {
				all = append(all, known("k8s", "container-name:"+c.Name))
			}
			all = append(all, c.Selectors...)
		}
	}
	return &selectors{set: NewSelectors(all...), version: f.version}
}

// known is a selector both of whose parts are there.
func known(kind, value string) Selector {
	s, _ := NewSelector(kind, value) // could only say that a part is missing
	return s
}

// unixSelectors are SPIRE's, with its spelling. A number without a name has no
// name selector.
func (b *Binding) unixSelectors() []Selector {
	if b.a.mode == ModeKubernetes {
		return nil
	}
	out := make([]Selector, 0, 6+2*len(b.groups))
	add := func(name, value string) {
		if value != "" {
			out = append(out, known("unix", name+value))
		}
	}
	id := func(n uint32) string { return strconv.FormatUint(uint64(n), 10) }
	add("uid:", id(b.caller.UID))
	if name, ok := b.a.users.name(b.caller.UID); ok {
		add("user:", name)
	}
	add("gid:", id(b.caller.GID))
	if name, ok := b.a.groups.name(b.caller.GID); ok {
		add("group:", name)
	}
	for _, g := range b.groups {
		add("supplementary_gid:", id(g))
		if name, ok := b.a.groups.name(g); ok {
			add("supplementary_group:", name)
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	add("path:", b.path)
	add("sha256:", b.sum)
	return out
}

// LogAttrs are the facts about the caller that are safe to log.
func (b *Binding) LogAttrs() []slog.Attr {
	out := []slog.Attr{
		slog.Int("pid", int(b.caller.PID)),
		slog.Uint64("uid", uint64(b.caller.UID)),
	}
	if b.pod == nil {
		return out
	}
	out = append(out, slog.String("pod_uid", b.place.pod))
	if b.place.container != "" {
		out = append(out, slog.String("container", b.place.container))
	}
	if pod, ok := b.Pod(); ok {
		out = append(out, slog.String("namespace", pod.Namespace), slog.String("pod", pod.Name),
			slog.String("service_account", pod.ServiceAccount))
	}
	return out
}

// Settled says whether Settle has nothing left to do.
func (b *Binding) Settled() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.settled
}
