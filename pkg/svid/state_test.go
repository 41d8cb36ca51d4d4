package svid_test

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/svid"
)

// keeping makes a manager keep restart state in dir, on whatever filesystem.
func keeping(dir string) func(*svid.Config) {
	return func(c *svid.Config) {
		c.StateDir = dir
		*c = c.AnyFilesystem()
	}
}

func stateDir(t *testing.T) string {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "state")
	if err := os.Mkdir(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	return dir
}

// silence is an authority and a registry that never answer.
func silence() (*fakeAuthority, *fakeEntries) {
	ca, entries := newAuthority(), newEntries()
	ca.silent, entries.silent = true, true
	ca.delay = 24 * time.Hour
	return ca, entries
}

func TestRestartServesBeforeTheAuthorityAnswers(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir := stateDir(t)
		partner := spiffeid.RequireTrustDomainFromString("partner.org")
		web := workload("web", "k8s:ns:prod")
		web.FederatesWith = []spiffeid.TrustDomain{partner}
		web.DNSNames, web.Hint, web.X509SVIDTTL, web.JWTSVIDTTL = []string{"web"}, "h", 2*time.Hour, time.Minute
		web.Admin, web.Downstream, web.Fallback, web.JWTSVIDIncludeJTI, web.DisableX509SVIDPrefetch = true, true, true, true, true
		web.Revision, web.ExpiresAt = 7, time.Now().Add(24*time.Hour)
		ca := newAuthority()
		ca.feds = newFederation(partner)
		w := run(t, ca, newEntries(web, workload("unused")), keeping(dir))
		c := newCaller("web", "unix:user:web", "k8s:ns:prod")
		s := w.subscribe(c)
		synctest.Wait()
		before := s.Update()
		in, _ := w.m.Inspect(c)
		advance(time.Second)
		w.stop()

		info, err := os.Stat(filepath.Join(dir, svid.StateName))
		if err != nil || info.Mode().Perm() != 0o600 {
			t.Fatalf("%v %v", info, err)
		}

		away, quiet := silence()
		w = run(t, away, quiet, keeping(dir))
		s = w.subscribe(c)
		after := s.Update()
		if serial(after) != serial(before) || serial(after) == "" || after.Synced {
			t.Fatalf("%+v", after)
		}
		if !after.Identities[0].Entry.Equal(web) {
			t.Errorf("the entry changed on the way: %+v", after.Identities[0].Entry)
		}
		if !after.Own.Equal(before.Own) || !after.Federated[partner].Equal(before.Federated[partner]) {
			t.Error("the bundles changed on the way")
		}
		if !bytes.Equal(after.Identities[0].SVID.KeyDER, before.Identities[0].SVID.KeyDER) {
			t.Error("the key changed on the way")
		}
		if again, _ := w.m.Inspect(c); !again.Entries[0].NextRenewal.Equal(in.Entries[0].NextRenewal) {
			t.Error("the renewal time was drawn again")
		}
		if u, _ := w.m.Snapshot(newCaller("x", "unix:user:web")); len(u.Identities) != 0 {
			t.Error("handed to a caller that does not match")
		}

		// The sources come back, without any change: nothing is signed anew.
		told := s.told.Load()
		w.entries.mu.Lock()
		w.entries.set = entry.NewSet(web.Clone())
		w.entries.mu.Unlock()
		w.entries.speak()
		away.change(func() { away.silent, away.own, away.feds, away.delay = false, before.Own, before.Federated, 0 })
		synctest.Wait()
		if u := s.Update(); serial(u) != serial(before) || !u.Synced || away.signs() != 0 {
			t.Errorf("%+v, %d signatures", u, away.signs())
		}
		if n := s.told.Load() - told; n != 1 && n != 2 {
			t.Errorf("told %d times that the agent is in sync", n)
		}
		advance(90 * time.Minute)
		if again := s.Update(); len(again.Identities) != 1 || bytes.Equal(again.Identities[0].SVID.KeyDER, before.Identities[0].SVID.KeyDER) {
			t.Error("not renewed")
		}
	})
}

func TestRestoredButDeletedMeanwhile(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir := stateDir(t)
		w := run(t, newAuthority(), newEntries(workload("web")), keeping(dir))
		c := newCaller("web", "unix:user:web")
		w.subscribe(c)
		advance(time.Second)
		w.stop()
		away, quiet := silence()
		w = run(t, away, quiet, keeping(dir))
		s := w.subscribe(c)
		if serial(s.Update()) == "" {
			t.Fatal("not restored")
		}
		w.entries.speak()
		synctest.Wait()
		if u := s.Update(); len(u.Identities)+len(u.Late) != 0 {
			t.Fatalf("%+v", u)
		}
		advance(time.Second)
		raw, err := os.ReadFile(filepath.Join(dir, svid.StateName))
		must(err)
		if bytes.Contains(raw, []byte("entry-web")) {
			t.Error("a withdrawn identity is still in the file")
		}
	})
}

func TestExpiredIsErasedFromState(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir := stateDir(t)
		w := run(t, newAuthority(), newEntries(workload("web")), keeping(dir))
		c := newCaller("web", "unix:user:web")
		w.subscribe(c)
		advance(time.Second)
		w.ca.set(func() { w.ca.delay = 24 * time.Hour })
		advance(time.Hour + time.Second)
		raw, err := os.ReadFile(filepath.Join(dir, svid.StateName))
		must(err)
		if bytes.Contains(raw, []byte("entry-web")) {
			t.Error("an expired identity is still in the file")
		}
	})
}

func TestExpiredIsNotRestored(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir := stateDir(t)
		w := run(t, newAuthority(), newEntries(workload("web")), keeping(dir))
		c := newCaller("web", "unix:user:web")
		w.subscribe(c)
		advance(time.Second)
		w.stop()
		time.Sleep(time.Hour)
		away, quiet := silence()
		w = run(t, away, quiet, keeping(dir))
		if u := w.subscribe(c).Update(); len(u.Identities) != 0 {
			t.Errorf("%+v", u)
		}
	})
}

func TestRestoredStateSurvivesALongOutage(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir := stateDir(t)
		w := run(t, newAuthority(), newEntries(workload("web"), workload("db")), keeping(dir))
		w.subscribe(newCaller("web", "unix:user:web"))
		w.subscribe(newCaller("db", "unix:user:db"))
		advance(time.Second)
		w.stop()
		// Restarted twice while nobody answers; only one pod is back at first.
		for range 2 {
			away, quiet := silence()
			w = run(t, away, quiet, keeping(dir), func(c *svid.Config) { c.MaxIdle = 1 })
			if serial(w.subscribe(newCaller("web", "unix:user:web")).Update()) == "" {
				t.Fatal("web is not served")
			}
			advance(20 * time.Minute)
			if serial(w.subscribe(newCaller("db", "unix:user:db")).Update()) == "" {
				t.Fatal("db is not served")
			}
			w.stop()
		}
	})
}

func TestBrokenStateIsSetAside(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir := stateDir(t)
		w := run(t, newAuthority(), newEntries(workload("web")), keeping(dir))
		w.subscribe(newCaller("web", "unix:user:web"))
		advance(time.Second)
		w.stop()
		path := filepath.Join(dir, svid.StateName)
		good, err := os.ReadFile(path)
		must(err)
		cases := map[string]func() error{
			"empty":     func() error { return os.WriteFile(path, nil, 0o600) },
			"cut":       func() error { return os.WriteFile(path, good[:len(good)/2], 0o600) },
			"flipped":   func() error { b := bytes.Clone(good); b[len(b)/2] ^= 1; return os.WriteFile(path, b, 0o600) },
			"version":   func() error { return os.WriteFile(path, bytes.Replace(good, []byte(" 1 "), []byte(" 2 "), 1), 0o600) },
			"garbage":   func() error { return os.WriteFile(path, []byte("\x00\xff{}"), 0o600) },
			"readable":  func() error { _ = os.WriteFile(path, good, 0o600); return os.Chmod(path, 0o644) },
			"directory": func() error { return os.Mkdir(path, 0o700) },
			"symlink": func() error {
				_ = os.WriteFile(filepath.Join(dir, "elsewhere"), good, 0o600)
				return os.Symlink("elsewhere", path)
			},
		}
		for name, breakIt := range cases {
			must(os.RemoveAll(path))
			must(os.RemoveAll(path + ".bad"))
			must(breakIt())
			var log journal
			ca, entries := newAuthority(), newEntries(workload("web"))
			ca.silent, entries.silent = true, true
			w := run(t, ca, entries, keeping(dir), func(c *svid.Config) { c.Logger = slog.New(slog.NewJSONHandler(&log, nil)) })
			s := w.subscribe(newCaller("web", "unix:user:web"))
			if u := s.Update(); len(u.Identities)+len(u.Late) != 0 || u.Own != nil {
				t.Errorf("%s: half used: %+v", name, u)
			}
			if _, err := os.Lstat(path + ".bad"); err != nil {
				t.Errorf("%s: not set aside: %v", name, err)
			}
			if !strings.Contains(log.take(), "set aside") {
				t.Errorf("%s: not logged", name)
			}
			// And the agent goes on, and writes a good file again.
			entries.speak()
			advance(2 * time.Second)
			if serial(s.Update()) == "" {
				t.Errorf("%s: not served", name)
			}
			w.stop()
			if raw, err := os.ReadFile(path); err != nil || !bytes.Contains(raw, []byte("entry-web")) {
				t.Errorf("%s: no new file: %v", name, err)
			}
		}
	})
}

func TestStateThatCannotBeWritten(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		dir := stateDir(t)
		var log journal
		w := run(t, newAuthority(), newEntries(workload("web")), keeping(dir), func(c *svid.Config) { c.Logger = slog.New(slog.NewJSONHandler(&log, nil)) })
		must(os.RemoveAll(dir))
		s := w.subscribe(newCaller("web", "unix:user:web"))
		advance(time.Second)
		if serial(s.Update()) == "" {
			t.Error("not served")
		}
		if !strings.Contains(log.take(), "restart state was not written") {
			t.Error("not logged")
		}
	})
}

func TestStateDirectoryMustBeSafe(t *testing.T) {
	t.Parallel()
	try := func(dir string, edit ...func(*svid.Config)) error {
		cfg := svid.Config{Authority: newAuthority(), Entries: newEntries(), StateDir: dir}
		for _, f := range edit {
			f(&cfg)
		}
		_, err := svid.New(cfg)
		return err
	}
	dir := stateDir(t)
	err := try(dir)
	if onDisk := !isTmpfs(t, dir); onDisk && (err == nil || !strings.Contains(err.Error(), "--state-dir")) {
		t.Errorf("keys on a disk: %v", err)
	}
	must(os.Chmod(dir, 0o755))
	if err := try(dir, keeping(dir)); err == nil || !strings.Contains(err.Error(), "0755") {
		t.Errorf("open to others: %v", err)
	}
	if !isTmpfs(t, "/dev/shm") {
		t.Skip("/dev/shm is not tmpfs here: acceptance of tmpfs is not tested")
	}
	shm, err := os.MkdirTemp("/dev/shm", "svid-test-") //nolint:usetesting // t.TempDir need not be tmpfs
	if err != nil {
		t.Skipf("cannot write to /dev/shm: acceptance of tmpfs is not tested: %v", err)
	}
	defer os.RemoveAll(shm)
	if err := try(filepath.Join(shm, "state")); err != nil {
		t.Errorf("tmpfs refused: %v", err)
	}
}

func TestStateThatCannotBeTrue(t *testing.T) {
	t.Parallel()
	const e = `"id":"a","spiffe_id":"spiffe://example.org/a","parent_id":"spiffe://example.org/n","selectors":["a:b"],"created_at":"2000-01-01T00:00:00Z"`
	for body, want := range map[string]string{
		`{"identities":[{"entry":{}}]}`:                                                                        "entry ID is missing",
		`{"identities":[{"entry":{"id":"a"}}]}`:                                                                "SPIFFE ID is missing",
		`{"identities":[{"entry":{"id":"a","spiffe_id":"spiffe://example.org/a"}}]}`:                           "selectors are missing",
		`{"identities":[{"entry":{"id":"a","spiffe_id":"http://a"}}]}`:                                         "decode",
		`{"identities":[{"entry":{"id":"a","spiffe_id":"spiffe://example.org/a","selectors":["a:b","a:b"]}}]}`: "occurs twice",
		`{"identities":[{"entry":{"id":"a","spiffe_id":"spiffe://example.org/a","selectors":["ab"]}}]}`:        "decode",
		`{"identities":[{"entry":{` + e + `,"x509_svid_ttl":-1}}]}`:                                            "TTL is negative",
		`{"identities":[{"entry":{` + e + `,"federates_with":["//"]}}]}`:                                       "federated trust domain",
		`{"identities":[{"entry":{` + e + `}}]}`:                                                               "key cannot be read",
		`{"identities":[],"more":1}`:                                                                           "unknown field",
		`{"identities":[]}{}`:                                                                                  "follows",
		`{"bundles":{"own":{"trust_domain":"//","jwks":{}}},"identities":[]}`:                                  "bundle of",
		`{"bundles":{"federated":[{"trust_domain":"a","jwks":{}}]},"identities":[]}`:                           "bundle",
	} {
		if err := svid.DecodeState([]byte(svid.SealState(body))); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s\n got %v\nwant %s", body, err, want)
		}
	}
}

func FuzzState(f *testing.F) {
	f.Add([]byte(svid.SealState(`{"identities":[]}`)))
	f.Add([]byte(svid.SealState(`{"identities":[{"entry":{"id":"a","spiffe_id":"spiffe://example.org/a","selectors":["a:b"]},"chain":["AA=="],"key":"AA=="}]}`)))
	f.Add([]byte(svid.SealState(`{"bundles":{"own":{"trust_domain":"example.org","jwks":{"keys":[]}},"federated":[{"trust_domain":"","jwks":1}]}}`)))
	f.Add([]byte("spiffe-node identities 1 00\n{}"))
	f.Add([]byte(svid.SealState("null")))
	f.Fuzz(func(t *testing.T, data []byte) {
		_ = svid.DecodeState(data)
		_ = svid.DecodeState([]byte(svid.SealState(string(data))))
	})
}
