package svid

import (
	"time"

	"github.com/spiffe-node/spiffe-node/internal/memstate"
)

// AnyFilesystem lets a test keep restart state outside tmpfs.
func (c Config) AnyFilesystem() Config {
	c.anyFilesystem = true
	return c
}

// SetWallClock gives m a wall clock of its own; call it before Run.
func (m *Manager) SetWallClock(now func() time.Time) { m.now = now }

// Backoff and RenewalTime are the two draws.
var (
	Backoff     = backoff
	RenewalTime = renewalTime
)

// StateName is the file name of the restart state.
const StateName = stateName

// Records is how many entries the manager holds something for, and Alarms how
// many alarms are set.
func (m *Manager) Records() (records, groups, alarms int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.records), len(m.groups), len(m.timers)
}

// SealState puts a right header before a body, and DecodeState reads a file.
func SealState(body string) string {
	return string(memstate.Seal(stateHeader, []byte(body)))
}

func DecodeState(data []byte) error {
	body, err := memstate.Unseal(stateHeader, data)
	if err != nil {
		return err
	}
	_, records, err := decodeState(body, time.Now())
	for _, r := range records {
		if r.svid == nil || r.entry.ID == "" || r.entry.Selectors.Len() == 0 {
			panic("half a record")
		}
	}
	return err
}
