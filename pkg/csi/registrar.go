package csi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"
	"google.golang.org/grpc"
	registration "k8s.io/kubelet/pkg/apis/pluginregistration/v1"
)

// RegistrarConfig is what a Registrar needs.
type RegistrarConfig struct {
	// Dir is the kubelet's plugins_registry as this process sees it.
	Dir string
	// Endpoint is the CSI socket as the kubelet sees it.
	Endpoint string
	// Name is the driver's name; empty is DefaultName.
	Name string
	// Check is how often the socket is looked after when the kernel announces
	// nothing; 0 is 10 s.
	Check time.Duration
	// Logger may be nil.
	Logger *slog.Logger
	// Metrics may be nil.
	Metrics *Metrics
}

// Registrar makes the driver known to the kubelet over the plugin registration
// API, in place of node-driver-registrar. It keeps its socket in the registry
// for as long as it runs: a kubelet that starts finds it there; if the
// directory or the socket is removed it is made again, which the kubelet takes
// as a new registration. While the socket of another live instance is there
// that instance has the say, and this one waits. Safe for concurrent use.
type Registrar struct {
	registration.UnimplementedRegistrationServer

	cfg     RegistrarConfig
	log     *slog.Logger
	metrics *Metrics
	path    string
	started bool // owned by Run

	mu     sync.Mutex
	status error // what the kubelet said last
}

// errNotYet is the status before the kubelet has said anything.
var errNotYet = errors.New("the kubelet has not registered the driver yet")

// NewRegistrar checks the configuration and builds a registrar.
func NewRegistrar(cfg RegistrarConfig) (*Registrar, error) {
	if cfg.Name == "" {
		cfg.Name = DefaultName
	}
	if cfg.Check <= 0 {
		cfg.Check = 10 * time.Second
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = NewMetrics(nil)
	}
	if !filepath.IsAbs(cfg.Dir) {
		return nil, fmt.Errorf("plugin registry %q is not an absolute path", cfg.Dir)
	}
	if !filepath.IsAbs(cfg.Endpoint) {
		return nil, fmt.Errorf("the CSI socket's path %q, as the kubelet is told it, is not absolute", cfg.Endpoint)
	}
	return &Registrar{
		cfg: cfg, log: cfg.Logger, metrics: cfg.Metrics, status: errNotYet,
		path: filepath.Join(filepath.Clean(cfg.Dir), cfg.Name+"-reg.sock"),
	}, nil
}

// Path is the registration socket.
func (r *Registrar) Path() string { return r.path }

// GetInfo tells the kubelet what is here and where it answers.
func (r *Registrar) GetInfo(context.Context, *registration.InfoRequest) (*registration.PluginInfo, error) {
	return &registration.PluginInfo{
		Type:              registration.CSIPlugin,
		Name:              r.cfg.Name,
		Endpoint:          r.cfg.Endpoint,
		SupportedVersions: []string{"1.0.0"},
	}, nil
}

// NotifyRegistrationStatus takes the kubelet's verdict. After a refusal the
// kubelet tries again by itself.
func (r *Registrar) NotifyRegistrationStatus(ctx context.Context, s *registration.RegistrationStatus) (*registration.RegistrationStatusResponse, error) {
	if s.GetPluginRegistered() {
		r.setStatus(nil)
		r.log.InfoContext(ctx, "registered with the kubelet", slog.String("driver", r.cfg.Name), slog.String("endpoint", r.cfg.Endpoint))
		return &registration.RegistrationStatusResponse{}, nil
	}
	r.setStatus(fmt.Errorf("the kubelet refused the driver: %s", clip(s.GetError())))
	r.log.ErrorContext(ctx, "the kubelet refused the driver", slog.String("driver", r.cfg.Name), slog.String("endpoint", r.cfg.Endpoint), slog.String("error", clip(s.GetError())))
	return &registration.RegistrationStatusResponse{}, nil
}

func (r *Registrar) setStatus(err error) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.status = err
	v := 0.0
	if err == nil {
		v = 1
	}
	r.metrics.registered.Set(v)
}

// Registered is nil once the kubelet has accepted the driver.
func (r *Registrar) Registered() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.status
}

// retry is how soon what failed is tried again.
const retry = time.Second

// Run keeps the registration socket until ctx ends, and then removes it. What
// fails on the way is logged and tried again; Run fails only if the kernel
// gives no watch.
func (r *Registrar) Run(ctx context.Context) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("watch the plugin registry %s: %w", r.cfg.Dir, err)
	}
	defer w.Close()
	var serving *registrationServer
	defer func() { serving.stop() }()
	var lastErr string
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-serving.failed():
		case <-timer.C:
		case ev, ok := <-w.Events:
			if !ok {
				return nil
			}
			if ev.Name != r.path && ev.Name != filepath.Clean(r.cfg.Dir) {
				continue
			}
		case _, ok := <-w.Errors:
			if !ok {
				return nil
			}
		}
		next := r.cfg.Check
		serving, err = r.ensure(w, serving)
		if err != nil {
			next = retry
			if err.Error() != lastErr { // said once, not every second
				r.log.Warn("registration with the kubelet waits", slog.Any("error", err))
			}
			lastErr = err.Error()
		} else {
			lastErr = ""
		}
		timer.Reset(next)
	}
}

// ensure makes sure that the directory is watched and that the socket in it is
// served by a live process: this one, unless another was there first.
func (r *Registrar) ensure(w *fsnotify.Watcher, serving *registrationServer) (*registrationServer, error) {
	if err := w.Add(r.cfg.Dir); err != nil {
		r.drop(serving)
		return nil, fmt.Errorf("watch the plugin registry %s: %w; is the kubelet's plugins_registry mounted there?", r.cfg.Dir, err)
	}
	if serving.alive() {
		return serving, nil
	}
	if r.started {
		// A successor takes the name over in one step; taking it back would
		// start a fight. At the start of a process it is the other way round.
		live, err := answersAt(r.path)
		if err != nil {
			r.drop(serving)
			return nil, err
		}
		if live {
			r.drop(serving)
			return nil, fmt.Errorf("another instance has taken over %s", r.path)
		}
	}
	r.drop(serving)
	l, live, err := ListenSocket(r.path)
	if err != nil {
		return nil, err
	}
	r.started = true
	if live {
		r.log.Warn("took the registration over from another instance, which should be about to end", slog.String("socket", r.path))
	}
	r.log.Info("waiting for the kubelet to register the driver", slog.String("socket", r.path))
	return r.serve(l), nil
}

// drop stops serving.
func (r *Registrar) drop(s *registrationServer) {
	if s != nil {
		s.stop()
		r.setStatus(errNotYet)
	}
}

// registrationServer serves one registration socket. A nil one serves nothing.
type registrationServer struct {
	server *grpc.Server
	socket *Socket
	done   chan struct{}
}

func (r *Registrar) serve(l *Socket) *registrationServer {
	s := &registrationServer{server: NewServer(r.log, r.metrics), socket: l, done: make(chan struct{})}
	registration.RegisterRegistrationServer(s.server, r)
	go func() {
		defer close(s.done)
		if err := s.server.Serve(l); err != nil {
			r.log.Error("registration socket failed", slog.String("socket", l.path), slog.Any("error", err))
		}
	}()
	return s
}

// alive says whether the name still leads to this server.
func (s *registrationServer) alive() bool {
	return s != nil && !isClosed(s.done) && s.socket.Current()
}

// failed is closed when the server has ended.
func (s *registrationServer) failed() <-chan struct{} {
	if s == nil {
		return nil
	}
	return s.done
}

func (s *registrationServer) stop() {
	if s == nil {
		return
	}
	s.server.Stop() // closes the socket, which removes it if it is still ours
	<-s.done
}

func isClosed(c <-chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}
