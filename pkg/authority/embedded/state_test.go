package embedded_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bolt "go.etcd.io/bbolt"

	"github.com/spiffe-node/spiffe-node/internal/durable"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
)

// picture is everything a restart must bring back.
type picture struct {
	Entries   map[int64]entry.Entry
	Own       *spiffebundle.Bundle
	Federated map[spiffeid.TrustDomain]*spiffebundle.Bundle
	Agents    []embedded.Agent
	X509, JWT embedded.LocalAuthorities
}

func takePicture(t *testing.T, a *embedded.Authority) picture {
	t.Helper()
	p := picture{Entries: make(map[int64]entry.Entry)}
	for row, e := range a.Set().Rows() {
		p.Entries[row] = *e
	}
	set, err := a.Bundles(t.Context(), 0)
	if err != nil {
		t.Fatal(err)
	}
	p.Own, p.Federated = set.Own, set.Federated
	for agent := range a.Agents() {
		p.Agents = append(p.Agents, *agent)
	}
	if p.X509, err = a.X509Authorities(); err != nil {
		t.Fatal(err)
	}
	if p.JWT, err = a.JWTAuthorities(); err != nil {
		t.Fatal(err)
	}
	return p
}

// fill puts something of every kind into the state.
func fill(t *testing.T, a *embedded.Authority) *entry.Entry {
	t.Helper()
	ctx := t.Context()
	foreign := start(t, func() embedded.Config { c := testConfig(t); c.TrustDomain = other; return c }())
	if err := a.CreateFederatedBundle(ctx, &embedded.Bundle{
		TrustDomain: other, X509: foreign.OwnBundle().X509, JWT: foreign.OwnBundle().JWT, RefreshHint: time.Minute, Sequence: 7,
	}); err != nil {
		t.Fatal(err)
	}
	e := mustCreate(t, a, &entry.Entry{
		ID: "fixed", SPIFFEID: id("/w"), ParentID: node, Selectors: attest.MustSelectors("k8s:ns:a", "unix:uid:1"),
		X509SVIDTTL: time.Hour, JWTSVIDTTL: time.Minute, FederatesWith: []spiffeid.TrustDomain{other}, DNSNames: []string{"b.example", "a.example"},
		Hint: "h", Admin: true, Downstream: true, ExpiresAt: time.Unix(4e9, 0).UTC(), JWTSVIDIncludeJTI: true, Fallback: true,
	})
	mustCreate(t, a, newEntry("/deleted"))
	mustCreate(t, a, newEntry("/last", "unix:uid:2"))
	for e := range a.Set().All() {
		if e.SPIFFEID == id("/deleted") {
			if err := a.DeleteEntry(ctx, e.ID); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := a.UpdateEntry(ctx, "fixed", func(e *entry.Entry) error { e.Hint = "new"; return nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := a.UpsertAgent(ctx, &embedded.Agent{
		ID: node, AttestationType: "local", Serial: "12", ExpiresAt: time.Unix(3e9, 0).UTC(), Selectors: attest.MustSelectors("unix:uid:0"), Version: "1",
	}); err != nil {
		t.Fatal(err)
	}
	if _, err := a.PrepareX509(ctx); err != nil {
		t.Fatal(err)
	}
	return e
}

func comparePictures(t *testing.T, got, want picture) {
	t.Helper()
	opts := cmp.Options{
		cmp.Comparer(func(a, b attest.Selectors) bool { return a.Equal(b) }),
		cmp.Comparer(func(a, b spiffeid.ID) bool { return a == b }),
		cmp.Comparer(func(a, b spiffeid.TrustDomain) bool { return a == b }),
		cmp.Comparer((*spiffebundle.Bundle).Equal),
		cmpopts.EquateEmpty(),
	}
	if diff := cmp.Diff(want, got, opts); diff != "" {
		t.Errorf("state differs (-want +got):\n%s", diff)
	}
}

func TestRestart(t *testing.T) {
	cfg := testConfig(t)
	a := start(t, cfg)
	fill(t, a)
	want := takePicture(t, a)
	// Without Close first: the file must be complete at any moment.
	copied := cfg
	copied.StatePath = filepath.Join(filepath.Dir(cfg.StatePath), "copy.db")
	data, err := os.ReadFile(cfg.StatePath)
	if err != nil {
		t.Fatal(err)
	}
	if err := durable.WriteFile(copied.StatePath, data, 0o600); err != nil {
		t.Fatal(err)
	}
	b := start(t, copied)
	comparePictures(t, takePicture(t, b), want)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	c := start(t, cfg)
	comparePictures(t, takePicture(t, c), want)
	e, ok := c.Set().Get("fixed")
	if !ok {
		t.Fatal("entry is gone")
	}
	sign(t, c, e)
}

func TestStateFileModes(t *testing.T) {
	cfg := testConfig(t)
	start(t, cfg)
	for path, want := range map[string]os.FileMode{cfg.StatePath: 0o600, filepath.Dir(cfg.StatePath): 0o700} {
		info, err := os.Stat(path)
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode().Perm() != want {
			t.Errorf("%s has mode %v, want %v", path, info.Mode().Perm(), want)
		}
	}
	names, err := os.ReadDir(filepath.Dir(cfg.StatePath))
	if err != nil {
		t.Fatal(err)
	}
	if len(names) != 1 {
		t.Errorf("left over in the state directory: %v", names)
	}
}

func TestStateOpenToOthers(t *testing.T) {
	for name, chmod := range map[string]func(path string) error{
		"directory": func(path string) error { return os.Chmod(filepath.Dir(path), 0o755) },
		"file":      func(path string) error { return os.Chmod(path, 0o644) },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := testConfig(t)
			closed(t, cfg)
			if err := chmod(cfg.StatePath); err != nil {
				t.Fatal(err)
			}
			wantOpenError(t, cfg, durable.ErrNotPrivate)
		})
	}
}

// closed makes a filled state file and returns its bytes.
func closed(t *testing.T, cfg embedded.Config) []byte {
	t.Helper()
	a := start(t, cfg)
	fill(t, a)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(cfg.StatePath)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func wantOpenError(t *testing.T, cfg embedded.Config, want error) {
	t.Helper()
	a, err := embedded.Open(cfg)
	if err == nil {
		t.Error("opened", a.Close())
		return
	}
	if !errors.Is(err, want) {
		t.Errorf("error %v, want %v", err, want)
	}
	if !strings.Contains(err.Error(), filepath.Dir(cfg.StatePath)) {
		t.Errorf("error does not name the path: %v", err)
	}
}

func TestCorrupt(t *testing.T) {
	base := testConfig(t)
	good := closed(t, base)
	damaged := map[string][]byte{
		"empty":           {},
		"garbage":         bytes.Repeat([]byte("garbage!"), 4096),
		"text":            []byte("hello"),
		"half":            good[:len(good)/2],
		"two pages":       good[:2*os.Getpagesize()],
		"both metas gone": append(make([]byte, 2*os.Getpagesize()), good[2*os.Getpagesize():]...),
		"body zeroed":     append(bytes.Clone(good[:2*os.Getpagesize()]), make([]byte, len(good)-2*os.Getpagesize())...),
		"body ones":       append(bytes.Clone(good[:2*os.Getpagesize()]), bytes.Repeat([]byte{0xff}, len(good)-2*os.Getpagesize())...),
	}
	for name, data := range damaged {
		t.Run(name, func(t *testing.T) {
			cfg := base
			cfg.StatePath = filepath.Join(t.TempDir(), "state", "authority.db")
			writeState(t, cfg.StatePath, data)
			wantOpenError(t, cfg, embedded.ErrCorrupt)
			if after, err := os.ReadFile(cfg.StatePath); err != nil || !bytes.Equal(after, data) {
				t.Errorf("the damaged file was touched: %v", err)
			}
			// The lock is gone with the failed attempt.
			writeState(t, cfg.StatePath, good)
			b, err := embedded.Open(cfg)
			if err != nil {
				t.Fatal(err)
			}
			if err := b.Close(); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestFlippedBits flips bits all over the file. The state either loads as it
// was (the bit was in free space) or is refused: never changed, never a crash.
// The two meta pages are left alone: a damaged one looks like a commit that was
// cut off, which is no damage.
func TestFlippedBits(t *testing.T) {
	cfg := testConfig(t)
	good := closed(t, cfg)
	a := start(t, cfg)
	want := takePicture(t, a)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	cfg.Logger = nil
	tries := 1500
	if testing.Short() {
		tries = 100
	}
	rnd := rand.New(rand.NewPCG(1, 2))
	refused := 0
	for range tries {
		data := bytes.Clone(good)
		metas := 2 * os.Getpagesize()
		at := metas + rnd.IntN(len(data)-metas)
		// Files have more free space than content; look for content.
		for data[at] == 0 && rnd.IntN(20) != 0 {
			at = metas + rnd.IntN(len(data)-metas)
		}
		if page := at - at%os.Getpagesize(); raceEnabled && bytes.Contains(data[page:page+os.Getpagesize()], []byte("bundles")) {
			// Small buckets lie in the page with the names, and bbolt reads them
			// from the heap: the checks that come with the race detector end the
			// process where a plain build finds the damage later.
			continue
		}
		data[at] ^= 1 << rnd.IntN(8)
		writeState(t, cfg.StatePath, data)
		b, err := embedded.Open(cfg)
		if err != nil {
			refused++
			if !errors.Is(err, embedded.ErrCorrupt) && !errors.Is(err, embedded.ErrForeign) && !errors.Is(err, embedded.ErrNewer) {
				t.Fatalf("byte %d: %v", at, err)
			}
			continue
		}
		got := takePicture(t, b)
		if err := b.Close(); err != nil {
			t.Error(err)
		}
		comparePictures(t, got, want)
		if t.Failed() {
			t.Fatalf("flipping a bit of byte %d (page %d) went unnoticed", at, at/os.Getpagesize())
		}
	}
	t.Logf("%d of %d damaged files refused", refused, tries)
	if refused == 0 {
		t.Error("no damage was noticed")
	}
}

func writeState(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func TestForeignAndNewer(t *testing.T) {
	cfg := testConfig(t)
	data := closed(t, cfg)
	wrong := cfg
	wrong.TrustDomain = other
	wantOpenError(t, wrong, embedded.ErrForeign)

	db, err := bolt.Open(cfg.StatePath, 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := db.Update(func(tx *bolt.Tx) error {
		return tx.Bucket([]byte("meta")).Put([]byte("format"), []byte("2"))
	}); err != nil {
		t.Fatal(err)
	}
	if err := db.Close(); err != nil {
		t.Fatal(err)
	}
	wantOpenError(t, cfg, embedded.ErrNewer)
	writeState(t, cfg.StatePath, data)
	start(t, cfg)
}

func TestLocked(t *testing.T) {
	cfg := testConfig(t)
	start(t, cfg)
	wantOpenError(t, cfg, embedded.ErrLocked)

	t.Run("let go in time", func(t *testing.T) {
		cfg := testConfig(t)
		a := start(t, cfg)
		time.AfterFunc(100*time.Millisecond, func() {
			if err := a.Close(); err != nil {
				t.Error(err)
			}
		})
		cfg.LockTimeout = 10 * time.Second
		start(t, cfg)
	})
}

// TestDoubtfulWrite: after a write that failed but may be on the disk, nothing
// more is written over it; a restart reads it back.
func TestDoubtfulWrite(t *testing.T) {
	cfg := testConfig(t)
	a := start(t, cfg)
	e := mustCreate(t, a, newEntry("/w"))
	a.ForgetWrite()
	for range 2 {
		if _, err := a.CreateEntry(t.Context(), newEntry("/x")); !errors.Is(err, embedded.ErrReadOnly) || !strings.Contains(err.Error(), "restart") {
			t.Errorf("error %v, want ErrReadOnly", err)
		}
	}
	sign(t, a, e)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	a = start(t, cfg)
	mustCreate(t, a, newEntry("/x"))
	sign(t, a, e)
}

func TestNoSpace(t *testing.T) {
	cfg := testConfig(t)
	mount := smallTmpfs(t)
	cfg.StatePath = filepath.Join(mount, "state", "authority.db")
	cfg.Logger = nil
	a := start(t, cfg)
	first := mustCreate(t, a, newEntry("/first"))
	created := 1
	fillUp := func(size int) (failure error) {
		for i := range 100000 {
			if _, failure = a.CreateEntry(t.Context(), newEntry(fmt.Sprintf("/fill/%s/%d/%d", strings.Repeat("x", size), size, i))); failure != nil {
				return failure
			}
			created++
		}
		return nil
	}
	for _, size := range []int{1000, 100, 1} {
		failure := fillUp(size)
		if !errors.Is(failure, syscall.ENOSPC) || !strings.Contains(failure.Error(), cfg.StatePath) {
			t.Fatalf("error %v, want one that wraps ENOSPC and names the file", failure)
		}
		if a.Set().Len() != created {
			t.Errorf("%d entries in memory, %d acknowledged", a.Set().Len(), created)
		}
		sign(t, a, first)
	}

	// Room again: the same process goes on writing.
	if err := syscall.Mount("", mount, "", syscall.MS_REMOUNT, "size=16m"); err != nil {
		t.Fatal(err)
	}
	mustCreate(t, a, newEntry("/room"))
	want := takePicture(t, a)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	comparePictures(t, takePicture(t, start(t, cfg)), want)
}

func TestReadOnly(t *testing.T) {
	cfg := testConfig(t)
	mount := smallTmpfs(t)
	cfg.StatePath = filepath.Join(mount, "state", "authority.db")
	a := start(t, cfg)
	e := mustCreate(t, a, newEntry("/w"))
	want := takePicture(t, a)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mount("", mount, "", syscall.MS_REMOUNT|syscall.MS_RDONLY, ""); err != nil {
		t.Fatal(err)
	}
	a = start(t, cfg)
	comparePictures(t, takePicture(t, a), want)
	sign(t, a, e)
	if _, err := a.CreateEntry(t.Context(), newEntry("/new")); !errors.Is(err, embedded.ErrReadOnly) {
		t.Errorf("error %v, want ErrReadOnly", err)
	}
	comparePictures(t, takePicture(t, a), want)

	missing := cfg
	missing.StatePath = filepath.Join(mount, "state", "other.db")
	if _, err := embedded.Open(missing); !errors.Is(err, syscall.EROFS) {
		t.Errorf("error %v, want EROFS", err)
	}
}

func smallTmpfs(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root to mount a small tmpfs")
	}
	dir := t.TempDir()
	if err := syscall.Mount("tmpfs", dir, "tmpfs", 0, "size=512k,mode=0700"); err != nil {
		t.Skipf("cannot mount a tmpfs here: %v", err)
	}
	t.Cleanup(func() {
		if err := syscall.Unmount(dir, syscall.MNT_DETACH); err != nil {
			t.Errorf("unmount: %v", err)
		}
	})
	return dir
}

func TestOpenSSL(t *testing.T) {
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		t.Skip("openssl is not installed")
	}
	for _, keys := range []embedded.KeyType{embedded.ECP256, embedded.ECP384, embedded.RSA2048} {
		cfg := testConfig(t)
		cfg.CAKeyType = keys
		a := start(t, cfg)
		e := mustCreate(t, a, &entry.Entry{SPIFFEID: id("/w"), ParentID: node, Selectors: attest.MustSelectors("unix:uid:0"), DNSNames: []string{"w.example", "*.w.example"}})
		dir := t.TempDir()
		writePEM(t, filepath.Join(dir, "ca.pem"), a.OwnBundle().X509[0].Certificate.Raw)
		writePEM(t, filepath.Join(dir, "leaf.pem"), sign(t, a, e).Raw)
		for _, purpose := range []string{"sslclient", "sslserver"} {
			cmd := exec.CommandContext(context.Background(), openssl, "verify", "-x509_strict", "-purpose", purpose, "-CAfile", "ca.pem", "leaf.pem")
			cmd.Dir = dir
			if out, err := cmd.CombinedOutput(); err != nil {
				t.Errorf("%s %s: %v\n%s", keys, purpose, err, out)
			}
		}
	}
}
