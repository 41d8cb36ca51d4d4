package csi

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// maxRequest bounds a request, in bytes: the volume context of a pod with
// tokens for several audiences fits many times.
const maxRequest = 1 << 20

// NewServer is a gRPC server whose calls are counted, logged once if they fail,
// and cannot end the process.
func NewServer(logger *slog.Logger, m *Metrics) *grpc.Server {
	e := &edge{log: logger, metrics: m, run: rand.Text()[:8]}
	return grpc.NewServer(
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxConcurrentStreams(64),
		grpc.UnaryInterceptor(e.call),
	)
}

// edge is where calls come in.
type edge struct {
	log     *slog.Logger
	metrics *Metrics
	run     string
	next    atomic.Uint64
}

func (e *edge) call(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (resp any, err error) {
	start := time.Now()
	id := e.run + "-" + strconv.FormatUint(e.next.Add(1), 10)
	method := info.FullMethod[strings.LastIndexByte(info.FullMethod, '/')+1:]
	defer func() {
		attrs := []slog.Attr{slog.String("request", id), slog.String("method", method)}
		if p := recover(); p != nil {
			resp, err = nil, status.Errorf(codes.Internal, "the driver met an error of its own (request %s in its log): this is a bug", id)
			attrs = append(attrs, slog.Any("panic", p), slog.String("stack", string(debug.Stack())))
		}
		took := time.Since(start)
		code := status.Code(err)
		e.metrics.calls.WithLabelValues(method, code.String()).Inc()
		e.metrics.seconds.WithLabelValues(method).Observe(took.Seconds())
		if err == nil {
			return
		}
		attrs = append(attrs, slog.String("code", code.String()), slog.String("error", status.Convert(err).Message()), slog.Duration("took", took))
		// Never the volume context: it may hold tokens.
		if r, ok := req.(interface{ GetVolumeId() string }); ok {
			attrs = append(attrs, slog.String("volume_id", clip(r.GetVolumeId())))
		}
		if r, ok := req.(interface{ GetTargetPath() string }); ok {
			attrs = append(attrs, slog.String("target", clip(r.GetTargetPath())))
		}
		e.log.LogAttrs(ctx, levelOf(code), "call failed", attrs...)
	}()
	return handler(ctx, req)
}

func levelOf(c codes.Code) slog.Level {
	switch c {
	case codes.Internal, codes.Unknown, codes.DataLoss:
		return slog.LevelError
	case codes.Canceled, codes.NotFound:
		return slog.LevelInfo
	}
	return slog.LevelWarn
}

// clip keeps a hostile request from filling the log.
func clip(s string) string {
	if len(s) > 512 {
		return s[:512] + "…"
	}
	return s
}

// Socket is a listening unix socket that only its owner can connect to. It
// takes the name over from whatever had it in one step, and gives it up only
// while it is still its own.
type Socket struct {
	*net.UnixListener
	path string
	id   fileID
}

type fileID struct{ dev, ino uint64 }

// ErrNotSocket says that the name of a socket is taken by something else.
var ErrNotSocket = errors.New("is not a socket")

// ListenSocket listens on path, whose directory must exist. live says that a
// process still answered on the socket that was there: another instance that
// is about to go, or one too many.
func ListenSocket(path string) (s *Socket, live bool, err error) {
	live, err = answersAt(path)
	if err != nil {
		return nil, false, err
	}
	// Bound under a name the kubelet ignores and renamed: nobody finds a
	// socket that does not listen, and a predecessor's is never missing.
	tmp := filepath.Join(filepath.Dir(path), "."+filepath.Base(path)+"."+rand.Text()[:8])
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: tmp, Net: "unix"})
	if err != nil {
		return nil, live, fmt.Errorf("listen on %s: %w", path, err)
	}
	l.SetUnlinkOnClose(false)
	s = &Socket{UnixListener: l, path: path}
	if err = os.Chmod(tmp, 0o600); err == nil {
		if s.id, err = identify(tmp); err == nil {
			err = os.Rename(tmp, path)
		}
	}
	if err != nil {
		_ = l.Close()
		_ = os.Remove(tmp)
		return nil, live, fmt.Errorf("listen on %s: %w", path, err)
	}
	return s, live, nil
}

// Current says whether the name still leads to this socket.
func (s *Socket) Current() bool {
	id, err := identify(s.path)
	return err == nil && id == s.id
}

// Close stops listening and removes the socket if it is still its own.
func (s *Socket) Close() error {
	var err error
	if s.Current() {
		err = os.Remove(s.path)
	}
	return errors.Join(err, s.UnixListener.Close())
}

// answersAt says whether a process takes connections at path.
func answersAt(path string) (bool, error) {
	info, err := os.Lstat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("look at %s: %w", path, err)
	case info.Mode().Type() != fs.ModeSocket:
		return false, fmt.Errorf("%s %w: move it away", path, ErrNotSocket)
	}
	return connects(path) == nil, nil
}

func identify(path string) (fileID, error) {
	var st unix.Stat_t
	if err := unix.Lstat(path, &st); err != nil {
		return fileID{}, fmt.Errorf("look at %s: %w", path, err)
	}
	return fileID{dev: st.Dev, ino: st.Ino}, nil
}

// keepEvery is how often Serve looks whether its socket still has its name.
const keepEvery = 5 * time.Second

// Serve serves until ctx ends, then lets calls that run finish for at most
// grace. A socket whose name was removed is made again; one that another
// instance has taken over is not taken back.
func Serve(ctx context.Context, s *grpc.Server, l *Socket, grace time.Duration) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	failed := make(chan error, 1)
	serve := func(l *Socket) {
		if err := s.Serve(l); err != nil && !errors.Is(err, grpc.ErrServerStopped) {
			select {
			case failed <- fmt.Errorf("serve %s: %w", l.path, err):
			default:
			}
		}
	}
	var serving sync.WaitGroup
	defer serving.Wait()
	first := l
	serving.Go(func() { serve(first) })
	defer func() {
		timer := time.AfterFunc(grace, s.Stop)
		defer timer.Stop()
		s.GracefulStop()
	}()
	tick := time.NewTicker(keepEvery)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			return err
		case <-tick.C:
		}
		if l.Current() {
			continue
		}
		if live, err := answersAt(l.path); err != nil || live {
			continue
		}
		again, _, err := ListenSocket(l.path)
		if err != nil {
			return fmt.Errorf("the socket %s was removed and cannot be made again: %w", l.path, err)
		}
		l = again
		serving.Go(func() { serve(again) })
	}
}
