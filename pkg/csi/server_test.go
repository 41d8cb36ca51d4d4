package csi_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/spiffe-node/spiffe-node/pkg/csi"
)

func TestListenSocket(t *testing.T) {
	path := filepath.Join(shortDir(t), "csi.sock")
	a, live, err := csi.ListenSocket(path)
	if err != nil || live {
		t.Fatalf("%v, live %v", err, live)
	}
	if fi, err := os.Lstat(path); err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi, err)
	}
	b, live, err := csi.ListenSocket(path)
	if err != nil || !live {
		t.Fatalf("%v, live %v", err, live)
	}
	if a.Current() || !b.Current() {
		t.Error("the name leads to the old socket")
	}
	if err := a.Close(); err != nil {
		t.Error(err)
	}
	if !answers(path) {
		t.Fatal("the old instance removed the new one's socket")
	}
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket stays behind: %v", err)
	}
	if names, _ := os.ReadDir(filepath.Dir(path)); len(names) != 0 {
		t.Errorf("left behind: %v", names)
	}
}

func TestListenSocketRemovesNoFile(t *testing.T) {
	path := filepath.Join(shortDir(t), "csi.sock")
	if err := os.WriteFile(path, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, _, err := csi.ListenSocket(path); !errors.Is(err, csi.ErrNotSocket) {
		t.Fatalf("error %v", err)
	}
	if got, err := os.ReadFile(path); err != nil || string(got) != "mine" {
		t.Errorf("%q, %v", got, err)
	}
	if _, _, err := csi.ListenSocket(filepath.Join(path, "x")); errors.Is(err, csi.ErrNotSocket) || err == nil {
		t.Errorf("error %v", err)
	}
}

// slow answers when it is told to.
type slow struct {
	csipb.UnimplementedIdentityServer
	in, out chan struct{}
}

func (s *slow) GetPluginInfo(context.Context, *csipb.GetPluginInfoRequest) (*csipb.GetPluginInfoResponse, error) {
	close(s.in)
	<-s.out
	return &csipb.GetPluginInfoResponse{Name: "slow"}, nil
}

func TestServeStopsGracefully(t *testing.T) {
	path := filepath.Join(shortDir(t), "csi.sock")
	l, _, err := csi.ListenSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	s := csi.NewServer(testLog(t), csi.NewMetrics(nil))
	h := &slow{in: make(chan struct{}), out: make(chan struct{})}
	csipb.RegisterIdentityServer(s, h)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- csi.Serve(ctx, s, l, 10*time.Second) }()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	answered := make(chan error, 1)
	go func() {
		_, err := csipb.NewIdentityClient(conn).GetPluginInfo(context.Background(), &csipb.GetPluginInfoRequest{})
		answered <- err
	}()
	<-h.in
	cancel()
	eventually(t, "nobody new is let in", func() bool { return !answers(path) })
	close(h.out)
	if err := <-answered; err != nil {
		t.Errorf("the call that ran was cut: %v", err)
	}
	if err := <-served; err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !os.IsNotExist(err) {
		t.Errorf("the socket stays behind: %v", err)
	}
}

func TestServeDoesNotWaitForEver(t *testing.T) {
	path := filepath.Join(shortDir(t), "csi.sock")
	l, _, err := csi.ListenSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	s := csi.NewServer(testLog(t), csi.NewMetrics(nil))
	h := &slow{in: make(chan struct{}), out: make(chan struct{})}
	csipb.RegisterIdentityServer(s, h)
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- csi.Serve(ctx, s, l, 50*time.Millisecond) }()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	var wg sync.WaitGroup
	wg.Go(func() {
		_, err := csipb.NewIdentityClient(conn).GetPluginInfo(context.Background(), &csipb.GetPluginInfoRequest{})
		wantCode(t, err, codes.Unavailable)
	})
	<-h.in
	cancel()
	wg.Wait()
	close(h.out)
	if err := <-served; err != nil {
		t.Error(err)
	}
}

func TestServeReportsAFailure(t *testing.T) {
	l, _, err := csi.ListenSocket(filepath.Join(shortDir(t), "csi.sock"))
	if err != nil {
		t.Fatal(err)
	}
	s := csi.NewServer(testLog(t), csi.NewMetrics(nil))
	served := make(chan error, 1)
	go func() { served <- csi.Serve(t.Context(), s, l, time.Second) }()
	eventually(t, "it serves", func() bool { return answers(l.Addr().String()) || answers(csi.PathOf(l)) })
	_ = l.UnixListener.Close()
	select {
	case err := <-served:
		if err == nil {
			t.Error("no error")
		}
	case <-time.After(10 * time.Second):
		t.Fatal("goes on without a listener")
	}
	_ = os.Remove(csi.PathOf(l))
}

// lockedBuffer is a log that two goroutines write.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// A failed call is one line, and the volume context is not in it.
func TestFailuresAreLoggedOnceWithoutTheContext(t *testing.T) {
	n := newNode(t)
	var log lockedBuffer
	path := filepath.Join(shortDir(t), "csi.sock")
	l, _, err := csi.ListenSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	logger := slog.New(slog.NewJSONHandler(&log, nil))
	s := csi.NewServer(logger, csi.NewMetrics(nil))
	n.start(func(c *csi.Config) { c.Logger = logger })
	n.driver.Register(s)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	defer func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	r := n.request(testUID, testVolume)
	r.VolumeContext["csi.storage.k8s.io/serviceAccount.tokens"] = "SECRET-TOKEN"
	r.Secrets = map[string]string{"k": "SECRET-VALUE"}
	r.VolumeContext["csi.storage.k8s.io/pod.uid"] = otherUID
	if _, err := csipb.NewNodeClient(conn).NodePublishVolume(context.Background(), r); err == nil {
		t.Fatal("published")
	}
	text := log.String()
	if got := strings.Count(text, "call failed"); got != 1 || strings.Count(text, "\n") != 1 {
		t.Errorf("log:\n%s", text)
	}
	if strings.Contains(text, "SECRET") {
		t.Errorf("a secret in the log:\n%s", text)
	}
	for _, want := range []string{`"request":"`, `"code":"InvalidArgument"`, `"volume_id":"` + r.GetVolumeId(), testUID} {
		if !strings.Contains(text, want) {
			t.Errorf("the log does not say %s:\n%s", want, text)
		}
	}
	r.VolumeContext["csi.storage.k8s.io/pod.uid"] = testUID
	if _, err := csipb.NewNodeClient(conn).NodePublishVolume(context.Background(), r); err != nil {
		t.Fatal(err)
	}
	if text := log.String(); strings.Contains(text, "SECRET") || !strings.Contains(text, "volume published") {
		t.Errorf("log:\n%s", text)
	}
}

func TestGarbageOnTheSocketEndsNothing(t *testing.T) {
	n := newNode(t)
	path := filepath.Join(shortDir(t), "csi.sock")
	l, _, err := csi.ListenSocket(path)
	if err != nil {
		t.Fatal(err)
	}
	s := csi.NewServer(testLog(t), csi.NewMetrics(nil))
	n.driver.Register(s)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	defer func() {
		s.Stop()
		if err := <-done; err != nil {
			t.Error(err)
		}
	}()
	for _, junk := range []string{"", "GET / HTTP/1.1\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff", strings.Repeat("\x00", 1<<16)} {
		c, err := net.Dial("unix", path)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = c.Write([]byte(junk))
		_ = c.Close()
	}
	conn, err := grpc.NewClient("unix:"+path, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	big := &csipb.GetPluginInfoRequest{}
	big.ProtoReflect().SetUnknown(append([]byte{0x7a, 0x80, 0x80, 0x80, 0x01}, make([]byte, 2<<20)...))
	_, err = csipb.NewIdentityClient(conn).GetPluginInfo(context.Background(), big)
	wantCode(t, err, codes.ResourceExhausted)
	if _, err := csipb.NewIdentityClient(conn).GetPluginInfo(context.Background(), &csipb.GetPluginInfoRequest{}); err != nil {
		t.Error(err)
	}
}
