package bundleendpoint

import (
	"cmp"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log"
	"log/slog"
	"net"
	"net/http"
	"strconv"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"golang.org/x/net/netutil"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

const (
	// DefaultRefreshHint is SPIRE Server's.
	DefaultRefreshHint = 5 * time.Minute
	// maxConnections bounds those at a time; more wait to be accepted. Each is
	// over in seconds.
	maxConnections = 512
	requestTimeout = 10 * time.Second
	idleTimeout    = 30 * time.Second
	maxHeader      = 8 << 10
	stopTimeout    = 5 * time.Second
)

// Config says what to serve, where and as whom.
type Config struct {
	// Address is host:port; required.
	Address string
	// Bundle is the bundle of the moment; required. An unchanged bundle keeps
	// its pointer.
	Bundle func() *embedded.Bundle
	// Certificate says who the endpoint is; required.
	Certificate Certificate
	// RefreshHint tells others how often to look; 0 = 5 min.
	RefreshHint time.Duration
	// Logger gets what goes wrong; nil = nothing is logged.
	Logger *slog.Logger
	// Metrics counts; nil = unregistered ones.
	Metrics *Metrics
}

// Certificate says who the endpoint is, at each handshake.
type Certificate struct {
	Get func(*tls.ClientHelloInfo) (*tls.Certificate, error)
	// Protocols are offered beside HTTP's.
	Protocols []string

	again func() // for tests
}

// Server is a bundle endpoint.
type Server struct {
	cfg  Config
	docs documents
	lis  net.Listener
	http *http.Server
}

// New listens; nothing is served before Run.
func New(ctx context.Context, cfg Config) (*Server, error) {
	if cfg.Bundle == nil || cfg.Certificate.Get == nil {
		return nil, errors.New("bundle endpoint: bundle or certificate is missing")
	}
	cfg.RefreshHint = cmp.Or(cfg.RefreshHint, DefaultRefreshHint)
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = NewMetrics(nil)
	}
	lc := net.ListenConfig{}
	lis, err := lc.Listen(ctx, "tcp", cfg.Address)
	if err != nil {
		return nil, fmt.Errorf("bundle endpoint: %w", err)
	}
	s := &Server{cfg: cfg, docs: documents{hint: cfg.RefreshHint}, lis: lis}
	s.http = &http.Server{
		Handler: http.HandlerFunc(s.serve),
		TLSConfig: &tls.Config{
			MinVersion:     tls.VersionTLS12,
			NextProtos:     append([]string{"h2", "http/1.1"}, cfg.Certificate.Protocols...),
			GetCertificate: cfg.Certificate.Get,
		},
		ReadHeaderTimeout: requestTimeout,
		ReadTimeout:       requestTimeout,
		WriteTimeout:      requestTimeout,
		IdleTimeout:       idleTimeout,
		MaxHeaderBytes:    maxHeader,
		// Failed handshakes of the whole world are no news.
		ErrorLog: log.New(io.Discard, "", 0),
	}
	return s, nil
}

// Addr is where it listens.
func (s *Server) Addr() net.Addr { return s.lis.Addr() }

// Run serves until ctx ends. It must be called once.
func (s *Server) Run(ctx context.Context) error {
	ended := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(ended)
		// The context has ended, the calls under way have not.
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), stopTimeout)
		defer cancel()
		if s.http.Shutdown(grace) != nil {
			_ = s.http.Close()
		}
	})
	err := s.http.ServeTLS(netutil.LimitListener(s.lis, maxConnections), "", "")
	if !stop() {
		<-ended
	}
	if err != nil && !errors.Is(err, http.ErrServerClosed) {
		return fmt.Errorf("bundle endpoint: %w", err)
	}
	return nil
}

// Close gives up a server that was never run.
func (s *Server) Close() error { return s.lis.Close() }

func (s *Server) serve(w http.ResponseWriter, r *http.Request) {
	code, text := http.StatusOK, []byte(nil)
	switch {
	case r.URL.Path != "/":
		code = http.StatusNotFound
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		w.Header().Set("Allow", "GET, HEAD")
		code = http.StatusMethodNotAllowed
	default:
		b := s.cfg.Bundle()
		if len(b.X509)+len(b.JWT) == 0 {
			// Others would take an empty document for the end of all our keys. It
			// is rather that there is no key yet.
			code = http.StatusServiceUnavailable
			break
		}
		var err error
		if text, err = s.docs.get(b); err != nil {
			s.cfg.Logger.ErrorContext(r.Context(), "the own bundle cannot be served", slog.Any("error", err))
			code = http.StatusInternalServerError
		}
	}
	s.cfg.Metrics.requests.WithLabelValues(strconv.Itoa(code)).Inc()
	if code != http.StatusOK {
		http.Error(w, http.StatusText(code), code)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("Content-Length", strconv.Itoa(len(text)))
	// The client went away if this fails; nobody is left to tell.
	_, _ = w.Write(text)
}

// Metrics counts requests.
type Metrics struct{ requests *prometheus.CounterVec }

// NewMetrics builds the metrics and registers them, unless reg is nil. It
// panics, as MustRegister does, when reg has them already.
func NewMetrics(reg prometheus.Registerer) *Metrics {
	m := &Metrics{requests: prometheus.NewCounterVec(prometheus.CounterOpts{
		Namespace: "spiffe_node", Subsystem: "bundle_endpoint", Name: "requests_total",
		Help: "Requests for the own trust bundle, by HTTP status.",
	}, []string{"code"})}
	if reg != nil {
		reg.MustRegister(m.requests)
	}
	return m
}
