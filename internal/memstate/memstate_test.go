package memstate_test

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	"github.com/spiffe-node/spiffe-node/internal/durable"
	"github.com/spiffe-node/spiffe-node/internal/memstate"
)

const header = "spiffe-node test 1 "

func open(t *testing.T, dir string) *memstate.File {
	t.Helper()
	f, err := memstate.Open(memstate.Config{Dir: dir, Name: "s", Header: header, Limit: 1000, AnyFilesystem: true})
	if err != nil {
		t.Fatal(err)
	}
	return f
}

func TestFile(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	f := open(t, dir)
	if _, err := f.Read(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("nothing there: %v", err)
	}
	secret := []byte("secret")
	if err := f.Write(secret); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(secret, make([]byte, 6)) {
		t.Error("the secret is still in memory")
	}
	if got, err := open(t, dir).Read(); err != nil || string(got) != "secret" {
		t.Errorf("%q %v", got, err)
	}
	path := filepath.Join(dir, "s")
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("mode: %v %v", info.Mode(), err)
	}
	if bad, err := f.SetAside(); err != nil || bad != path+".bad" {
		t.Errorf("%s %v", bad, err)
	}
	if _, err := f.Read(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("set aside: %v", err)
	}
}

func TestRefusals(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	f := open(t, dir)
	path := filepath.Join(dir, "s")
	for name, data := range map[string][]byte{
		"empty":         nil,
		"other version": memstate.Seal("spiffe-node test 2 ", []byte("x")),
		"cut short":     memstate.Seal(header, []byte("secret"))[:88],
		"too large":     memstate.Seal(header, make([]byte, 2000)),
	} {
		if err := os.WriteFile(path, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := f.Read(); !errors.Is(err, memstate.ErrUnusable) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := os.Chmod(path, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Read(); !errors.Is(err, durable.ErrNotPrivate) {
		t.Errorf("open to others: %v", err)
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := memstate.Open(memstate.Config{Dir: dir, Name: "s", AnyFilesystem: true}); !errors.Is(err, durable.ErrNotPrivate) {
		t.Errorf("a directory open to others: %v", err)
	}
	if err := os.Chmod(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := memstate.Open(memstate.Config{Dir: "/proc/self/task", Name: "s"}); err == nil {
		t.Error("a directory of the kernel's")
	}
}

func TestOnDisk(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	_, err := memstate.Open(memstate.Config{Dir: dir, Name: "s"})
	if err == nil {
		t.Skip("temporary files are in memory here")
	}
	if !errors.Is(err, memstate.ErrOnDisk) {
		t.Errorf("got %v", err)
	}
}

func FuzzUnseal(f *testing.F) {
	f.Add(memstate.Seal(header, []byte("{}")))
	f.Add([]byte(header + "00\n"))
	f.Add([]byte("\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		body, err := memstate.Unseal(header, data)
		if err == nil && !bytes.Equal(memstate.Seal(header, body), data) {
			t.Fatal("what was taken is not what Seal makes")
		}
	})
}

func TestSomebodyElses(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "state")
	of := func(owner string) *memstate.File {
		f, err := memstate.Open(memstate.Config{Dir: dir, Name: "s", Header: header, Limit: 1000, Of: owner, AnyFilesystem: true})
		if err != nil {
			t.Fatal(err)
		}
		return f
	}
	if err := open(t, dir).Write([]byte("{}")); err != nil {
		t.Fatal(err)
	}
	if got, err := of("a:1").Read(); err != nil || string(got) != "{}" {
		t.Errorf("of nobody in particular: %q %v", got, err)
	}
	secret := []byte("{1}")
	if err := of("a:1").Write(secret); err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(secret, make([]byte, 3)) {
		t.Error("the secret is still in memory")
	}
	for _, owner := range []string{"a:1", ""} {
		if got, err := of(owner).Read(); err != nil || string(got) != "{1}" {
			t.Errorf("read by %q: %q %v", owner, got, err)
		}
	}
	if _, err := of("b:1").Read(); !errors.Is(err, memstate.ErrOthers) {
		t.Errorf("read by another: %v", err)
	}
	if _, err := of("a:1").Read(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("it is still there: %v", err)
	}
}
