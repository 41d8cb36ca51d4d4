package svid

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/internal/durable"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// The restart state is one file, identities.state, replaced whole:
//
//	spiffe-node identities 1 <sha256 of the rest, hex>\n
//	{"bundles": ..., "identities": [{"entry": ..., "chain": [...], "key": ...}]}
//
// A file that is of another version, does not match its checksum or says
// anything that cannot be true is not used at all and renamed to
// identities.state.bad.
const (
	stateName   = "identities.state"
	stateHeader = "spiffe-node identities 1 "
	stateLimit  = 256 << 20 // bytes; more cannot be ours

	// saveDelay gathers changes into one write.
	saveDelay = 250 * time.Millisecond
)

// stateFile is where the restart state lives.
type stateFile struct {
	path   string
	urgent chan struct{} // something must be erased: no delay
}

// openState checks that keys may be put into dir.
func openState(dir string, anyFilesystem bool) (*stateFile, error) {
	if err := durable.OwnerDir(dir); err != nil {
		return nil, fmt.Errorf("restart state: %w", err)
	}
	if !anyFilesystem {
		if err := checkMemory(dir); err != nil {
			return nil, err
		}
	}
	f := &stateFile{path: filepath.Join(dir, stateName), urgent: make(chan struct{}, 1)}
	if err := durable.RemoveTemp(f.path); err != nil {
		return nil, fmt.Errorf("restart state: %w", err)
	}
	return f, nil
}

// ErrOnDisk refuses a Config.StateDir that is not in memory.
var ErrOnDisk = errors.New("restart state: private keys must not reach a disk")

// checkMemory refuses a directory that would put keys on a disk.
func checkMemory(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err != nil {
		return fmt.Errorf("restart state: statfs %s: %w", dir, err)
	}
	switch uint32(st.Type) {
	case unix.TMPFS_MAGIC, unix.RAMFS_MAGIC:
		return nil
	}
	return fmt.Errorf("%w: %s is on a filesystem of type %#x, not tmpfs; "+
		"set --state-dir (identity.stateDirectory) to a directory on tmpfs such as /run/spiffe-node/state, or to nothing to keep no restart state",
		ErrOnDisk, dir, uint32(st.Type))
}

// hurry has the state written without delay. A nil stateFile does nothing.
func (f *stateFile) hurry() {
	if f != nil {
		signal(f.urgent)
	}
}

// keepState writes the state a moment after it changed, and once more at the
// end if it must.
func (m *Manager) keepState(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			select {
			case <-m.save:
				m.saveState()
			default:
			}
			return
		case <-m.save:
		}
		t := time.NewTimer(saveDelay)
		select {
		case <-ctx.Done():
		case <-m.state.urgent:
		case <-t.C:
		}
		t.Stop()
		start := time.Now()
		m.saveState()
		// However much there is to write, it takes a tenth of the time.
		sleep(ctx, 9*time.Since(start))
	}
}

func (m *Manager) saveState() {
	data, err := m.encodeState()
	if err == nil {
		err = durable.WriteFile(m.state.path, data, 0o600)
	}
	clear(data) // it holds keys
	if err != nil {
		m.log.Error("restart state was not written; an agent restarted now waits for the authority", slog.Any("error", err))
	}
}

// restore loads what the process before left. Whatever is wrong with it, the
// agent starts; a file that cannot be trusted is set aside.
func (m *Manager) restore() {
	info, err := os.Lstat(m.state.path)
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	var data []byte
	if err == nil {
		err = durable.CheckOwnerFile(m.state.path)
	}
	if err == nil && info.Size() > stateLimit {
		err = fmt.Errorf("the file has %d bytes, more than %d", info.Size(), stateLimit)
	}
	if err == nil {
		data, err = os.ReadFile(m.state.path)
	}
	var bundles *authority.BundleSet
	var records []*record
	if err == nil {
		bundles, records, err = decodeState(data, m.now())
		clear(data)
	}
	if err != nil {
		m.setAside(err)
		return
	}
	entries := make([]*entry.Entry, len(records))
	for i, r := range records {
		entries[i] = r.entry
	}
	m.do(func(now time.Time) {
		m.set, m.bundles = entry.NewSet(entries...), bundles
		if bundles != nil {
			m.jwts.taint(bundles.TaintedJWT)
		}
		for _, r := range records {
			if r.renewAt.IsZero() || r.renewAt.After(r.svid.NotAfter) {
				r.renewAt = renewalTime(r.svid, now)
			}
			m.records[r.entry.ID] = r
			m.showLocked(r)
			// Nobody has called yet, so nobody needs it yet; it must not be
			// let go before its pod has had the time to come back.
			m.setTimerLocked(&r.alarm, r, r.svid.NotAfter)
		}
	})
	m.log.Info("restart state loaded", slog.Int("identities", len(records)))
}

func (m *Manager) setAside(why error) {
	bad := m.state.path + ".bad"
	err := os.Rename(m.state.path, bad)
	m.log.Error("restart state is not usable and was set aside; identities come from the authority",
		slog.String("kept_as", bad), slog.Any("error", errors.Join(why, err)))
}
