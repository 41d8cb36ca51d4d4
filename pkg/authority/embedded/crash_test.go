package embedded_test

import (
	"bufio"
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
)

// crashEnv makes the test binary a writer that is going to be killed.
const crashEnv = "SPIFFE_NODE_TEST_CRASH_STATE"

// crashChild creates, updates and deletes entries and rotates the CA until it
// is killed. Each acknowledged change is written to stdout before the next one
// begins.
func crashChild(path string) {
	a, err := embedded.Open(embedded.Config{TrustDomain: td, StatePath: path, LockTimeout: 5 * time.Second, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		fmt.Println("error", err)
		os.Exit(1)
	}
	ctx := context.Background()
	say := func(what, id string) { fmt.Println(what, id) }
	say("root", a.OwnBundle().X509[0].Certificate.SerialNumber.String())
	for i := 0; ; i++ {
		e, err := a.CreateEntry(ctx, newEntry(fmt.Sprintf("/w/%d/%d", os.Getpid(), i)))
		if err != nil {
			fmt.Println("error", err)
			os.Exit(1)
		}
		say("created", e.ID)
		if i%3 == 1 {
			if err := a.DeleteEntry(ctx, e.ID); err != nil {
				fmt.Println("error", err)
				os.Exit(1)
			}
			say("deleted", e.ID)
		}
		if i%7 == 3 {
			if err := a.RotateNow(ctx); err != nil {
				fmt.Println("error", err)
				os.Exit(1)
			}
			roots := a.OwnBundle().X509
			say("root", roots[len(roots)-1].Certificate.SerialNumber.String())
		}
	}
}

// TestKill kills a writer at random moments, again and again on one file.
// Nothing acknowledged may be missing, nothing deleted may be back.
func TestKill(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	rounds := 12
	if testing.Short() {
		rounds = 3
	}
	path := filepath.Join(t.TempDir(), "state", "authority.db")
	present, roots := make(map[string]bool), make(map[string]bool)
	for round := range rounds {
		cmd := exec.Command(self)
		cmd.Env = append(os.Environ(), crashEnv+"="+path)
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		lines := bufio.NewScanner(out)
		var pending string // a change that may or may not have happened
		// A different number of steps and a different delay each round.
		steps := 1 + round*3
		for lines.Scan() {
			what, id, _ := strings.Cut(lines.Text(), " ")
			pending = ""
			switch what {
			case "created":
				present[id] = true
				pending = id // its deletion may be under way
			case "deleted":
				present[id] = false
			case "root":
				roots[id] = true
			default:
				t.Fatalf("round %d: child says %q", round, lines.Text())
			}
			if steps--; steps == 0 {
				time.Sleep(time.Duration(round*731%5000) * time.Microsecond)
				if err := cmd.Process.Kill(); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := cmd.Wait(); err == nil {
			t.Fatal("child was not killed")
		}
		checkAfterKill(t, path, present, roots, pending)
	}
}

func checkAfterKill(t *testing.T, path string, present, roots map[string]bool, pending string) {
	t.Helper()
	cfg := testConfig(t)
	cfg.StatePath = path
	a, err := embedded.Open(cfg)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	}()
	for id, want := range present {
		_, got := a.Set().Get(id)
		if id == pending {
			present[id] = got
			continue
		}
		if got != want {
			t.Errorf("entry %s: present %v, want %v", id, got, want)
		}
	}
	have := make(map[string]bool)
	for _, r := range a.OwnBundle().X509 {
		have[r.Certificate.SerialNumber.String()] = true
	}
	for serial := range roots {
		if !have[serial] {
			t.Errorf("root %s is gone", serial)
		}
	}
	e := mustCreate(t, a, newEntry("/after/"+strings.ReplaceAll(t.Name(), "/", "-")+fmt.Sprint(time.Now().UnixNano())))
	sign(t, a, e)
	present[e.ID] = true
}
