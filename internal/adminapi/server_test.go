package adminapi_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/types/known/emptypb"

	"github.com/spiffe-node/spiffe-node/internal/adminapi"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/bundlepb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/entrypb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/loggerpb"
	"github.com/spiffe-node/spiffe-node/internal/spirewire/typespb"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

func newServer(t *testing.T, path string, edit ...func(*adminapi.Config)) (*adminapi.Server, error) {
	t.Helper()
	cfg := adminapi.Config{SocketPath: path, TrustDomain: td}
	for _, f := range edit {
		f(&cfg)
	}
	return adminapi.New(t.Context(), cfg)
}

func mode(t *testing.T, path string) fs.FileMode {
	t.Helper()
	info, err := os.Lstat(path)
	if err != nil {
		t.Fatal(err)
	}
	return info.Mode().Perm()
}

func TestSocketIsClosedToOthers(t *testing.T) {
	old := syscall.Umask(0) // the modes must not depend on it
	defer syscall.Umask(old)
	path := filepath.Join(shortDir(t), "admin", "api.sock")
	s, err := newServer(t, path)
	if err != nil {
		t.Fatal(err)
	}
	if d, f := mode(t, filepath.Dir(path)), mode(t, path); d != 0o700 || f != 0o600 {
		t.Errorf("directory %04o, socket %04o", d, f)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("socket is still there: %v", err)
	}

	t.Run("group", func(t *testing.T) {
		path := filepath.Join(shortDir(t), "admin", "api.sock")
		gid := os.Getegid()
		if os.Geteuid() == 0 {
			gid = 4242
		}
		s, err := newServer(t, path, func(c *adminapi.Config) { c.Group = strconv.Itoa(gid) })
		if err != nil {
			t.Fatal(err)
		}
		defer s.Close()
		info, _ := os.Lstat(path)
		if d, f := mode(t, filepath.Dir(path)), mode(t, path); d != 0o750 || f != 0o660 || int(info.Sys().(*syscall.Stat_t).Gid) != gid {
			t.Errorf("directory %04o, socket %04o, group %d", d, f, info.Sys().(*syscall.Stat_t).Gid)
		}
		if _, err := newServer(t, filepath.Join(shortDir(t), "a", "s"), func(c *adminapi.Config) { c.Group = "no such group" }); err == nil {
			t.Error("unknown group was accepted")
		}
	})
}

func TestSocketRefusals(t *testing.T) {
	for name, tc := range map[string]struct {
		prepare func(t *testing.T, dir string) string
		want    string
	}{
		"open directory": {func(t *testing.T, dir string) string {
			t.Helper()
			mkdir(t, dir, 0o755)
			return filepath.Join(dir, "api.sock")
		}, "has mode 0755, at most 0700 is allowed"},
		"directory is a file": {func(t *testing.T, dir string) string {
			t.Helper()
			write(t, dir)
			return filepath.Join(dir, "api.sock")
		}, "is not a directory"},
		"directory is a link": {func(t *testing.T, dir string) string {
			t.Helper()
			if err := os.Symlink(t.TempDir(), dir); err != nil {
				t.Fatal(err)
			}
			return filepath.Join(dir, "api.sock")
		}, "is not a directory"},
		"directory of another user": {func(t *testing.T, dir string) string {
			t.Helper()
			if os.Geteuid() != 0 {
				t.Skip("only root can give a directory away")
			}
			mkdir(t, dir, 0o700)
			if err := os.Chown(dir, 4242, -1); err != nil {
				t.Fatal(err)
			}
			return filepath.Join(dir, "api.sock")
		}, "belongs to uid 4242"},
		"file in the way": {func(t *testing.T, dir string) string {
			t.Helper()
			mkdir(t, dir, 0o700)
			write(t, filepath.Join(dir, "api.sock"))
			return filepath.Join(dir, "api.sock")
		}, "something that is not a socket is in the way"},
		"served by somebody": {func(t *testing.T, dir string) string {
			t.Helper()
			s, err := newServer(t, filepath.Join(dir, "api.sock"))
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = s.Close() })
			return filepath.Join(dir, "api.sock")
		}, "is served by another process"},
	} {
		t.Run(name, func(t *testing.T) {
			path := tc.prepare(t, filepath.Join(shortDir(t), "admin"))
			before, _ := os.Lstat(path)
			s, err := newServer(t, path)
			if err == nil {
				_ = s.Close()
				t.Fatal("accepted")
			}
			if !strings.Contains(err.Error(), tc.want) {
				t.Errorf("got %q, want %q", err, tc.want)
			}
			if after, _ := os.Lstat(path); before != nil && !os.SameFile(before, after) {
				t.Error("what was in the way is gone")
			}
		})
	}
}

func mkdir(t *testing.T, dir string, mode fs.FileMode) {
	t.Helper()
	if err := errors.Join(os.Mkdir(dir, 0o700), os.Chmod(dir, mode)); err != nil {
		t.Fatal(err)
	}
}

func write(t *testing.T, path string) {
	t.Helper()
	if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestStaleSocketIsReplaced(t *testing.T) {
	dir := filepath.Join(shortDir(t), "admin")
	mkdir(t, dir, 0o700)
	path := filepath.Join(dir, "api.sock")
	l, err := net.Listen("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = l.Close()
	start(t, adminapi.Config{SocketPath: path})
}

func TestForeignSocketIsNotRemoved(t *testing.T) {
	path := filepath.Join(shortDir(t), "admin", "api.sock")
	first, err := newServer(t, path)
	if err != nil {
		t.Fatal(err)
	}
	// A second agent took the path over while the first was still there.
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	second, err := newServer(t, path)
	if err != nil {
		t.Fatal(err)
	}
	defer second.Close()
	if err := first.Close(); err != nil {
		t.Error(err)
	}
	if _, err := os.Lstat(path); err != nil {
		t.Errorf("the second server's socket is gone: %v", err)
	}
}

// brokenAuthority panics where a bug would.
type brokenAuthority struct{ *embedded.Authority }

func (brokenAuthority) OwnBundle() *embedded.Bundle { panic("secret text") }

func TestPanicStaysInItsCall(t *testing.T) {
	var log buffer
	socket := start(t, adminapi.Config{Authority: brokenAuthority{openAuthority(t)}, Logger: slog.New(slog.NewTextHandler(&log, nil))})
	conn := dial(t, socket)
	_, err := bundlepb.NewBundleClient(conn).GetBundle(t.Context(), &bundlepb.GetBundleRequest{})
	want{13, "internal error; the agent's log has the details"}.checkError(t, err)
	if _, err := entrypb.NewEntryClient(conn).CountEntries(t.Context(), &entrypb.CountEntriesRequest{}); err != nil {
		t.Errorf("the next call: %v", err)
	}
	if !strings.Contains(log.String(), "panic in admin call") || !strings.Contains(log.String(), "server_test.go") {
		t.Errorf("log: %s", log.String())
	}
}

// buffer is a log that several goroutines may write.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

func TestEveryChangeIsRecorded(t *testing.T) {
	var log buffer
	socket := start(t, adminapi.Config{Authority: openAuthority(t), Logger: slog.New(slog.NewTextHandler(&log, nil))})
	conn := dial(t, socket)
	c := entrypb.NewEntryClient(conn)
	for range 2 {
		if _, err := c.BatchCreateEntry(t.Context(), &entrypb.BatchCreateEntryRequest{Entries: []*typespb.Entry{newEntry("/audit")}}); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := bundlepb.NewBundleClient(conn).BatchDeleteFederatedBundle(t.Context(), &bundlepb.BatchDeleteFederatedBundleRequest{TrustDomains: []string{"none"}}); err != nil {
		t.Fatal(err)
	}
	var records []string
	for line := range strings.Lines(log.String()) {
		if strings.Contains(line, "audit=true") {
			records = append(records, line)
		}
	}
	if len(records) != 3 {
		t.Fatalf("%d records: %s", len(records), log.String())
	}
	for i, parts := range [][]string{
		{"create entry", "outcome=done", "spiffe_id=spiffe://td/audit", "entry_id="},
		{"create entry", "outcome=refused", "similar entry already exists"},
		{"delete federated bundle", "outcome=refused", "trust_domain=none"},
	} {
		parts = append(parts, "request_id=", "caller_pid="+strconv.Itoa(os.Getpid()), "caller_uid="+strconv.Itoa(os.Getuid()))
		for _, part := range parts {
			if !strings.Contains(records[i], part) {
				t.Errorf("record %d lacks %q: %s", i, part, records[i])
			}
		}
	}
}

// Who may set the log level cannot silence the record.
func TestRecordSurvivesTheLogLevel(t *testing.T) {
	var record buffer
	var level slog.LevelVar
	conn := dial(t, start(t, adminapi.Config{
		Authority: openAuthority(t), LogLevel: &level,
		Logger: slog.New(slog.NewTextHandler(t.Output(), &slog.HandlerOptions{Level: &level})),
		Audit:  slog.New(slog.NewTextHandler(&record, nil)),
	}))
	if _, err := loggerpb.NewLoggerClient(conn).SetLogLevel(t.Context(), &loggerpb.SetLogLevelRequest{NewLevel: typespb.LogLevel_PANIC}); err != nil {
		t.Fatal(err)
	}
	create(t, entrypb.NewEntryClient(conn), newEntry("/quiet"))
	if got := record.String(); !strings.Contains(got, "set log level") || !strings.Contains(got, "spiffe://td/quiet") {
		t.Errorf("record: %s", got)
	}
}

// Every method survives bytes that are no message, and messages that are not
// meant for it.
func TestHostileRequests(t *testing.T) {
	conn := dial(t, start(t, adminapi.Config{Authority: openAuthority(t), LogLevel: new(slog.LevelVar), Source: someSource(), Logger: slog.New(slog.DiscardHandler)}))
	r := rand.New(rand.NewPCG(1, 2))
	payloads := [][]byte{nil, {0xff}, bytes.Repeat([]byte{0x0a, 0x00}, 1000), bytes.Repeat([]byte{0x0a, 0x02, 0x0a, 0x00}, 500)}
	for range 40 {
		b := make([]byte, r.IntN(64))
		for i := range b {
			b[i] = byte(r.UintN(256))
		}
		payloads = append(payloads, b)
	}
	for _, method := range allMethods() {
		for _, p := range payloads {
			ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
			err := conn.Invoke(ctx, method, p, &emptypb.Empty{}, grpc.ForceCodec(rawCodec{}))
			cancel()
			if err != nil && strings.Contains(err.Error(), "internal error; the agent's log") {
				t.Fatalf("%s panicked on %x", method, p)
			}
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				t.Fatalf("%s hung on %x", method, p)
			}
		}
	}
}

// rawCodec sends bytes as they are and drops answers.
type rawCodec struct{}

func (rawCodec) Marshal(v any) ([]byte, error) { return v.([]byte), nil }
func (rawCodec) Unmarshal([]byte, any) error   { return nil }
func (rawCodec) Name() string                  { return "proto" }

func TestServeAfterManyEntries(t *testing.T) {
	conn := ours(t)
	c := entrypb.NewEntryClient(conn)
	var in []*typespb.Entry
	for i := range 1200 {
		in = append(in, newEntry("/many", func(e *typespb.Entry) { e.Selectors = selectors("n:" + strconv.Itoa(i)) }))
	}
	for _, r := range create(t, c, in...) {
		ok.checkStatus(t, r.GetStatus())
	}
	n := 0
	for token, first := "", true; first || token != ""; first = false {
		resp, err := c.ListEntries(t.Context(), &entrypb.ListEntriesRequest{PageSize: 500, PageToken: token})
		if err != nil {
			t.Fatal(err)
		}
		n += len(resp.GetEntries())
		token = resp.GetNextPageToken()
	}
	if n != 1200 {
		t.Errorf("paged through %d entries", n)
	}
}

func TestNewNeedsTrustDomain(t *testing.T) {
	if _, err := adminapi.New(t.Context(), adminapi.Config{SocketPath: filepath.Join(shortDir(t), "a", "s")}); err == nil {
		t.Error("accepted")
	}
}
