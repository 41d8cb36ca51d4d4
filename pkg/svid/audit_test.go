package svid_test

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// journal is a log that can be read.
type journal struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (j *journal) Write(p []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.buf.Write(p)
}

func (j *journal) take() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	s := j.buf.String()
	j.buf.Reset()
	return s
}

func TestAudit(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		var log, audit journal
		w := run(t, newAuthority(), newEntries(workload("web"), workload("db")), func(c *svid.Config) {
			c.Logger = slog.New(slog.NewJSONHandler(&log, &slog.HandlerOptions{Level: slog.LevelDebug}))
			c.Audit = slog.New(slog.NewJSONHandler(&audit, nil))
		})
		c := newCaller("web", "unix:user:web")
		s, second := w.subscribe(c), w.subscribe(c)
		synctest.Wait()
		if got := audit.take(); got != "" {
			t.Fatalf("nothing was handed out yet: %s", got)
		}
		u := s.Update()
		var rec struct {
			Caller    map[string]string
			EntryID   string `json:"entry_id"`
			SPIFFEID  string `json:"spiffe_id"`
			Serial    string
			Expires   time.Time
			Outcome   string
			Msg       string
			Time      time.Time
			LevelName string `json:"level"`
		}
		if err := json.Unmarshal([]byte(audit.take()), &rec); err != nil {
			t.Fatal(err)
		}
		if rec.Caller["pod"] != "web" || rec.EntryID != "entry-web" || rec.SPIFFEID != "spiffe://example.org/web" ||
			rec.Serial != serial(u) || !rec.Expires.Equal(u.Identities[0].SVID.NotAfter) || rec.Outcome != "granted" {
			t.Errorf("%+v", rec)
		}
		s.Update()
		second.Update()
		_, _ = w.m.Snapshot(c)
		if got := audit.take(); got != "" {
			t.Errorf("recorded again: %s", got)
		}
		// Another caller of the same identity is another decision.
		other := w.subscribe(newCaller("replica", "unix:user:web"))
		other.Update()
		if got := audit.take(); strings.Count(got, "granted") != 1 || !strings.Contains(got, "replica") {
			t.Errorf("got %s", got)
		}
		// A change of the bundle hands out nothing new.
		w.ca.change(func() { w.ca.own = w.ca.own.Clone() })
		synctest.Wait()
		s.Update()
		if got := audit.take(); got != "" {
			t.Errorf("recorded for a bundle: %s", got)
		}
		advance(40 * time.Minute)
		s.Update()
		if got := audit.take(); strings.Count(got, "granted") != 1 {
			t.Errorf("renewal: %s", got)
		}
		key := base64.StdEncoding.EncodeToString(s.Update().Identities[0].SVID.KeyDER)
		w.entries.with(nil, "entry-web")
		synctest.Wait()
		s.Update()
		got := audit.take()
		if strings.Count(got, "withdrawn") != 1 {
			t.Errorf("withdrawal: %s", got)
		}
		if strings.Contains(log.take()+got, key[20:60]) {
			t.Error("a key was logged")
		}
	})
}
