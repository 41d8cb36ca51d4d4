package attest_test

import (
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

// The names file is read again when it has changed, and looked at rarely.
func TestNames(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "passwd")
	synctest.Test(t, func(t *testing.T) {
		n := attest.OpenNames(path)
		want := func(name string) {
			t.Helper()
			if got := n.Name(7); got != name {
				t.Errorf("user 7 is %q, want %q", got, name)
			}
		}
		want("")
		writeFile(t, path, "a:x:7:7::/:\n")
		want("")
		time.Sleep(2 * time.Second)
		want("a")
		// Replaced by rename, as useradd does it.
		writeFile(t, path+".new", "b:x:7:7::/:\nc:x:8:8::/:\n")
		if err := os.Rename(path+".new", path); err != nil {
			t.Fatal(err)
		}
		want("a")
		time.Sleep(2 * time.Second)
		want("b")
		time.Sleep(2 * time.Second)
		want("b")
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
		time.Sleep(2 * time.Second)
		want("")
	})
}
