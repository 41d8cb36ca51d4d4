package svid

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"time"

	"github.com/spiffe-node/spiffe-node/internal/memstate"
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
	*memstate.File
	urgent chan struct{} // something must be erased: no delay
}

// openState checks that keys may be put into dir.
func openState(dir, of string, anyFilesystem bool) (*stateFile, error) {
	file, err := memstate.Open(memstate.Config{
		Dir: dir, Name: stateName, Header: stateHeader, Limit: stateLimit, Of: of, AnyFilesystem: anyFilesystem,
	})
	if err != nil {
		return nil, fmt.Errorf("restart state: %w", err)
	}
	return &stateFile{File: file, urgent: make(chan struct{}, 1)}, nil
}

// ErrOnDisk refuses a Config.StateDir that is not in memory.
var ErrOnDisk = memstate.ErrOnDisk

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
	body, err := m.encodeState()
	if err == nil {
		err = m.state.Write(body)
	}
	if err != nil {
		m.log.Error("restart state was not written; an agent restarted now waits for the authority", slog.Any("error", err))
	}
}

// restore loads what the process before left. Whatever is wrong with it, the
// agent starts; a file that cannot be trusted is set aside.
func (m *Manager) restore() {
	body, err := m.state.Read()
	if errors.Is(err, fs.ErrNotExist) {
		return
	}
	if errors.Is(err, memstate.ErrOthers) {
		m.log.Warn("the restart state was that of another authority and is erased", slog.Any("error", err))
		return
	}
	var bundles *authority.BundleSet
	var records []*record
	if err == nil {
		bundles, records, err = decodeState(body, m.now())
		clear(body)
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
		m.takeTrustLocked()
		if bundles != nil {
			m.jwts.taint(bundles.TaintedJWT)
		}
		for _, r := range records {
			if r.renewAt.IsZero() || r.renewAt.After(r.svid.NotAfter) {
				r.renewAt = m.renewalTime(r.svid, now)
			} else if at, ok := m.availableAt(r.svid); ok && at.Before(r.renewAt) {
				r.renewAt = at // the target is newer than the state
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
	bad, err := m.state.SetAside()
	m.log.Error("restart state is not usable and was set aside; identities come from the authority",
		slog.String("kept_as", bad), slog.Any("error", errors.Join(why, err)))
}
