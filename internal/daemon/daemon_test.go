package daemon_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"go.uber.org/goleak"

	"github.com/spiffe-node/spiffe-node/internal/daemon"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

func logger(t *testing.T) *slog.Logger {
	t.Helper()
	return slog.New(slog.NewTextHandler(t.Output(), nil))
}

func wait(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }

func TestRunEndsTogether(t *testing.T) {
	boom := errors.New("boom")
	synctest.Test(t, func(t *testing.T) {
		err := daemon.Run(t.Context(), logger(t),
			daemon.Task{Name: "waits", Run: wait},
			daemon.Task{Name: "fails", Run: func(context.Context) error { time.Sleep(time.Hour); return boom }})
		if !errors.Is(err, boom) || !strings.HasPrefix(err.Error(), "fails: ") {
			t.Errorf("got %v, want fails: boom", err)
		}
	})
}

func TestRunEndsOnRequest(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Minute, cancel)
		late := errors.New("could not close")
		err := daemon.Run(ctx, logger(t),
			daemon.Task{Name: "waits", Run: wait},
			daemon.Task{Name: "closes", Run: func(ctx context.Context) error { <-ctx.Done(); return late }})
		if !errors.Is(err, late) || errors.Is(err, context.Canceled) {
			t.Errorf("got %v, want only the failure to close", err)
		}
	})
}

func TestRunEndsWhenATaskIsMissing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		err := daemon.Run(t.Context(), logger(t),
			daemon.Task{Name: "waits", Run: wait},
			daemon.Task{Name: "done", Run: func(context.Context) error { return nil }})
		if err != nil {
			t.Errorf("got %v, want nil", err)
		}
	})
}

func TestHealth(t *testing.T) {
	reg := prometheus.NewRegistry()
	reg.MustRegister(prometheus.NewGauge(prometheus.GaugeOpts{Name: "answer", Help: "."}))
	h := daemon.NewHealth(reg)
	var broken error
	h.AddLive("alive", func() error { return nil })
	h.AddReady("authority", func() error { return broken })
	srv := httptest.NewServer(h.Handler())
	defer srv.Close()
	defer http.DefaultClient.CloseIdleConnections()

	get := func(path string) (int, string) {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, srv.URL+path, nil)
		if err != nil {
			t.Fatal(err)
		}
		res, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Fatal(err)
		}
		defer res.Body.Close()
		body, err := io.ReadAll(res.Body)
		if err != nil {
			t.Fatal(err)
		}
		return res.StatusCode, string(body)
	}
	if code, _ := get("/livez"); code != http.StatusOK {
		t.Errorf("/livez: %d", code)
	}
	broken = fmt.Errorf("seen: %w", daemon.Remark("slow"))
	if code, body := get("/readyz"); code != http.StatusOK || h.Ready() != nil || !strings.Contains(body, `"authority":"ok, but: seen: slow"`) {
		t.Errorf("/readyz with a remark: %d %s, %v", code, body, h.Ready())
	}
	broken = nil
	if code, _ := get("/readyz"); code != http.StatusOK || h.Ready() != nil {
		t.Errorf("/readyz: %d, %v", code, h.Ready())
	}
	broken = errors.New("not yet")
	code, body := get("/readyz")
	var parsed map[string]string
	if err := json.Unmarshal([]byte(body), &parsed); err != nil || code != http.StatusServiceUnavailable || parsed["authority"] != "not yet" {
		t.Errorf("/readyz: %d %s", code, body)
	}
	if err := h.Ready(); err == nil || err.Error() != "authority: not yet" {
		t.Errorf("Ready: %v", err)
	}
	if code, _ := get("/livez"); code != http.StatusOK {
		t.Error("/livez must not depend on readiness")
	}
	if _, body := get("/metrics"); !strings.Contains(body, "answer 0") {
		t.Errorf("/metrics: %s", body)
	}
	if code, _ := get("/debug/pprof/"); code != http.StatusNotFound {
		t.Errorf("profiling is served unasked: %d", code)
	}
}

func TestHealthTask(t *testing.T) {
	h := daemon.NewHealth(nil)
	task, addr, err := h.Task("127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	if _, _, err := h.Task(addr.String()); err == nil {
		t.Error("a taken port is not reported")
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- task.Run(ctx) }()
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

func TestLogger(t *testing.T) {
	var b strings.Builder
	level := new(slog.LevelVar)
	log, err := daemon.NewLogger(&b, "json", level)
	if err != nil {
		t.Fatal(err)
	}
	log.Debug("hidden")
	level.Set(slog.LevelDebug)
	log.Debug("shown", slog.Int("n", 1), slog.Duration("took", 1500*time.Millisecond))
	if got := b.String(); strings.Contains(got, "hidden") || !strings.Contains(got, `"msg":"shown","n":1,"took":"1.5s"`) {
		t.Errorf("log: %s", got)
	}
	if _, err := daemon.NewLogger(&b, "xml", level); err == nil {
		t.Error("format xml accepted")
	}
	for text, want := range map[string]slog.Level{"DEBUG": slog.LevelDebug, "": slog.LevelInfo, "warning": slog.LevelWarn, "error": slog.LevelError} {
		if got, err := daemon.ParseLevel(text); err != nil || got != want {
			t.Errorf("ParseLevel(%q) = %v, %v", text, got, err)
		}
	}
	if _, err := daemon.ParseLevel("loud"); err == nil {
		t.Error("level loud accepted")
	}
}
