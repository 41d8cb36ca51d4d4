package daemon

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"strings"
	"sync"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// Check answers nil when one part of the daemon is as it should be. It must
// not block and must not ask anybody outside the process.
type Check func() error

// Remark is what a check answers when all is as it should be, but there is
// something that whoever looks should know.
type Remark string

// Error is the remark.
func (r Remark) Error() string { return string(r) }

// Health serves /livez, /readyz, /metrics and what Handle adds. It is built and run before everything else, so that a daemon that waits for
// something can say what it waits for. Safe for concurrent use.
type Health struct {
	mu    sync.Mutex
	live  map[string]Check
	ready map[string]Check
	mux   *http.ServeMux
}

// NewHealth builds the endpoint; gatherer may be nil for no /metrics.
func NewHealth(gatherer prometheus.Gatherer) *Health {
	h := &Health{live: map[string]Check{}, ready: map[string]Check{}, mux: http.NewServeMux()}
	h.mux.HandleFunc("GET /livez", h.serve(func() map[string]Check { return h.live }))
	h.mux.HandleFunc("GET /readyz", h.serve(func() map[string]Check { return h.ready }))
	if gatherer != nil {
		h.mux.Handle("GET /metrics", promhttp.HandlerFor(gatherer, promhttp.HandlerOpts{}))
	}
	return h
}

// Handle adds an endpoint, with the pattern of http.ServeMux. Call it before
// the endpoint is served.
func (h *Health) Handle(pattern string, handler http.Handler) { h.mux.Handle(pattern, handler) }

// AddLive adds a check to /livez: failing means that only a restart helps.
func (h *Health) AddLive(name string, c Check) { h.add(h.live, name, c) }

// AddReady adds a check to /readyz: failing means "cannot do its job now".
func (h *Health) AddReady(name string, c Check) { h.add(h.ready, name, c) }

func (h *Health) add(to map[string]Check, name string, c Check) {
	h.mu.Lock()
	defer h.mu.Unlock()
	to[name] = c
}

// Ready is nil if every readiness check passes; otherwise the error names the
// ones that do not.
func (h *Health) Ready() error {
	var errs []error
	for name, text := range h.run(h.ready) {
		if !isOK(text) {
			errs = append(errs, fmt.Errorf("%s: %s", name, text))
		}
	}
	return errors.Join(errs...)
}

const okBut = "ok, but: "

func isRemark(err error) bool {
	_, ok := errors.AsType[Remark](err)
	return ok
}

// isOK says whether the text of a check's outcome is no failure.
func isOK(text string) bool { return text == "ok" || strings.HasPrefix(text, okBut) }

func (h *Health) run(set map[string]Check) map[string]string {
	h.mu.Lock()
	defer h.mu.Unlock()
	out := make(map[string]string, len(set))
	for name, c := range set {
		out[name] = "ok"
		switch err := c(); {
		case err == nil:
		case isRemark(err):
			out[name] = okBut + err.Error()
		default:
			out[name] = err.Error()
		}
	}
	return out
}

func (h *Health) serve(set func() map[string]Check) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		results := h.run(set())
		code := http.StatusOK
		for _, text := range results {
			if !isOK(text) {
				code = http.StatusServiceUnavailable
			}
		}
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(code)
		// The client went away if this fails; nobody is left to tell.
		_ = json.NewEncoder(w).Encode(results)
	}
}

// Handler is the HTTP handler with all endpoints.
func (h *Health) Handler() http.Handler { return h.mux }

// Task listens on address (host:port) when called and serves when run. An empty
// address gives a task that only waits.
func (h *Health) Task(address string) (Task, net.Addr, error) {
	if address == "" {
		return Task{Name: "health", Run: func(ctx context.Context) error {
			<-ctx.Done()
			return nil
		}}, nil, nil
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return Task{}, nil, fmt.Errorf("listen for health and metrics on %q: %w", address, err)
	}
	srv := &http.Server{Handler: h.mux, ReadHeaderTimeout: 5 * time.Second, MaxHeaderBytes: 16 << 10}
	return Task{Name: "health", Run: func(ctx context.Context) error {
		// The watcher must end when Serve fails, not only when ctx does, or the
		// failure would never be returned.
		stop := context.AfterFunc(ctx, func() { _ = srv.Close() })
		defer stop()
		if err := srv.Serve(l); err != nil && !errors.Is(err, http.ErrServerClosed) {
			return fmt.Errorf("serve health and metrics on %s: %w", l.Addr(), err)
		}
		return nil
	}}, l.Addr(), nil
}
