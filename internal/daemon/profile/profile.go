// Package profile adds Go's profiles to a health endpoint. It is apart from
// package daemon because the profiler brings a template engine along, which a
// program without profiles need not carry.
package profile

import (
	"net/http"
	"net/http/pprof"

	"github.com/spiffe-node/spiffe-node/internal/daemon"
)

// Serve adds /debug/pprof to h.
func Serve(h *daemon.Health) {
	h.Handle("GET /debug/pprof/", http.HandlerFunc(pprof.Index))
	h.Handle("GET /debug/pprof/profile", http.HandlerFunc(pprof.Profile))
	h.Handle("GET /debug/pprof/trace", http.HandlerFunc(pprof.Trace))
}
