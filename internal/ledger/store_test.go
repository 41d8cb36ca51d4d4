package ledger_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/spiffe-node/spiffe-node/internal/durable"
	"github.com/spiffe-node/spiffe-node/internal/ledger"
	"github.com/spiffe-node/spiffe-node/internal/mount/mounttest"
)

func open(tb testing.TB, dir string) *ledger.Store {
	tb.Helper()
	s, err := ledger.Open(dir, nil)
	if err != nil {
		tb.Fatal(err)
	}
	return s
}

func put(tb testing.TB, s *ledger.Store, r ledger.Record) {
	tb.Helper()
	if err := s.Put(r); err != nil {
		tb.Fatal(err)
	}
}

func write(tb testing.TB, path, text string) {
	tb.Helper()
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		tb.Fatal(err)
	}
}

func TestStoreKeepsRecords(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "a/ledger")
	s := open(t, dir)
	a, b := record("csi-a"), record("An odd ID / of sorts")
	put(t, s, a)
	put(t, s, b)
	for _, st := range []*ledger.Store{s, open(t, dir)} {
		if got, ok := st.Get("csi-a"); !ok || got != a {
			t.Errorf("%+v, %v", got, ok)
		}
		if got, ok := st.Get(b.VolumeID); !ok || got != b {
			t.Errorf("%+v, %v", got, ok)
		}
		if got := st.List(); len(got) != 2 || got[0] != b || got[1] != a {
			t.Errorf("%+v", got)
		}
		if len(st.Bad()) != 0 || st.Writable() != nil {
			t.Errorf("bad %v, writable %v", st.Bad(), st.Writable())
		}
	}
	fi, err := os.Stat(filepath.Join(dir, "csi-a.json"))
	if err != nil || fi.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", fi.Mode(), err)
	}
	for range 2 {
		if err := s.Delete("csi-a"); err != nil {
			t.Fatal(err)
		}
	}
	if _, ok := open(t, dir).Get("csi-a"); ok {
		t.Error("it is still there")
	}
}

func TestOpenRefusesADirectoryOfOthers(t *testing.T) {
	dir := t.TempDir()
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := ledger.Open(dir, nil); !errors.Is(err, durable.ErrNotPrivate) {
		t.Errorf("error %v", err)
	}
	if _, err := ledger.NewReader(ledger.ReaderConfig{Dir: dir}); !errors.Is(err, durable.ErrNotPrivate) {
		t.Errorf("error %v", err)
	}
}

// A file that cannot be read neither disturbs the others nor changes, until its
// volume is written or removed, and then it is kept aside.
func TestCorruptFilesAreKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	put(t, open(t, dir), record("csi-good"))
	good, err := os.ReadFile(filepath.Join(dir, "csi-good.json"))
	if err != nil {
		t.Fatal(err)
	}
	bad := map[string]string{
		"csi-torn.json":      string(good[:50]),
		"csi-empty.json":     "",
		"csi-stranger.json":  string(good), // of another volume
		"csi-future.json":    `{"version":9}`,
		"csi-endless.json":   strings.Repeat("x", 1<<20),
		"csi-unlinkable.txt": "no record at all",
	}
	for name, text := range bad {
		write(t, filepath.Join(dir, name), text)
	}
	if err := unix.Mkfifo(filepath.Join(dir, "csi-fifo.json"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("csi-good.json", filepath.Join(dir, "csi-link.json")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, "csi-dir.json"), 0o700); err != nil {
		t.Fatal(err)
	}
	s := open(t, dir)
	if got := s.List(); len(got) != 1 || got[0].VolumeID != "csi-good" {
		t.Errorf("%+v", got)
	}
	if got := len(s.Bad()); got != 8 {
		t.Errorf("%d bad files: %v", got, s.Bad())
	}
	for name, text := range bad {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != text {
			t.Errorf("%s was touched: %v", name, err)
		}
	}
	put(t, s, record("csi-torn"))
	if err := s.Delete("csi-empty"); err != nil {
		t.Fatal(err)
	}
	for name, text := range map[string]string{"csi-torn.json.corrupt": bad["csi-torn.json"], "csi-empty.json.corrupt": ""} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != text {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	again := open(t, dir)
	if _, ok := again.Get("csi-torn"); !ok || len(again.Bad()) != 6 {
		t.Errorf("%v, %v", ok, again.Bad())
	}
	// A second time does not overwrite the first.
	write(t, filepath.Join(dir, "csi-torn.json"), "again")
	s = open(t, dir)
	put(t, s, record("csi-torn"))
	for name, text := range map[string]string{"csi-torn.json.corrupt": bad["csi-torn.json"], "csi-torn.json.corrupt-2": "again"} {
		if got, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(got) != text {
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
}

func TestOpenRemovesWhatAnInterruptedPutLeft(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	open(t, dir)
	temp, other := filepath.Join(dir, ".csi-a.json.tmp-123"), filepath.Join(dir, ".other")
	write(t, temp, "half")
	write(t, other, "not ours")
	open(t, dir)
	if _, err := os.Stat(temp); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
	if _, err := os.Stat(other); err != nil {
		t.Error(err)
	}
}

func TestFullDiskLosesNothing(t *testing.T) {
	dir := filepath.Join(mounttest.Tmpfs(t, "16k"), "ledger")
	s := open(t, dir)
	old := record("csi-old")
	put(t, s, old)
	var err error
	n := 0
	for ; err == nil && n < 100; n++ {
		err = s.Put(record(fmt.Sprintf("csi-%d", n)))
	}
	if !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("error %v after %d", err, n)
	}
	if err := s.Writable(); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("writable: %v", err)
	}
	changed := old
	changed.PodName = "web-1"
	if err := s.Put(changed); !errors.Is(err, unix.ENOSPC) {
		t.Fatalf("error %v", err)
	}
	again := open(t, dir)
	if got, ok := again.Get("csi-old"); !ok || got != old || len(again.Bad()) != 0 {
		t.Errorf("%+v, %v, bad %v", got, ok, again.Bad())
	}
	if got, _ := s.Get("csi-old"); got != old {
		t.Error("the store believes what it could not write")
	}
	if err := s.Delete("csi-0"); err != nil {
		t.Fatal(err)
	}
	put(t, s, changed)
}

// Two processes on one ledger, while one driver takes over from another: each
// sees what the other did.
func TestTwoStores(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	a, b := open(t, dir), open(t, dir)
	rec := record("csi-a")
	put(t, a, rec)
	if got, ok := b.Get("csi-a"); !ok || got != rec {
		t.Fatalf("%+v, %v", got, ok)
	}
	changed := rec
	changed.PodName = "web-1"
	put(t, b, changed)
	if got, ok := a.Get("csi-a"); !ok || got != changed {
		t.Fatalf("%+v, %v", got, ok)
	}
	if err := a.Delete("csi-a"); err != nil {
		t.Fatal(err)
	}
	if got, ok := b.Get("csi-a"); ok || b.Len() != 0 {
		t.Fatalf("%+v", got)
	}
	write(t, filepath.Join(dir, "csi-a.json"), "broken meanwhile")
	if _, ok := b.Get("csi-a"); ok || len(b.Bad()) != 1 {
		t.Fatalf("bad: %v", b.Bad())
	}
	put(t, b, rec)
	if got, err := os.ReadFile(filepath.Join(dir, "csi-a.json.corrupt")); err != nil || string(got) != "broken meanwhile" {
		t.Errorf("%q, %v", got, err)
	}
}

func TestConcurrentUse(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ledger")
	s := open(t, dir)
	var wg sync.WaitGroup
	for i := range 8 {
		wg.Go(func() {
			id := fmt.Sprintf("csi-%d", i)
			for range 20 {
				if err := s.Put(record(id)); err != nil {
					t.Error(err)
				}
				s.List()
				if i%2 == 0 {
					if err := s.Delete(id); err != nil {
						t.Error(err)
					}
				}
			}
		})
	}
	wg.Wait()
	if got := len(open(t, dir).List()); got != 4 {
		t.Errorf("%d records", got)
	}
}

func BenchmarkPutDelete(b *testing.B) {
	s := open(b, filepath.Join(mounttest.Tmpfs(b, ""), "ledger"))
	r := record("csi-a")
	for b.Loop() {
		put(b, s, r)
		if err := s.Delete(r.VolumeID); err != nil {
			b.Fatal(err)
		}
	}
}
