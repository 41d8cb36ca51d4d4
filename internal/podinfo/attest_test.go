package podinfo_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/spiffe-node/spiffe-node/internal/podinfo"
	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

type alive struct{}

func (alive) Alive() error              { return nil }
func (alive) Groups() ([]uint32, error) { return nil, nil }

// attestor is a real one, of callers with the given cgroups.
func attestor(t *testing.T, s *podinfo.Source, cgroups map[int]string) *attest.Attestor {
	t.Helper()
	root := t.TempDir()
	cgroups[0] = "/"
	for pid, path := range cgroups {
		name := strconv.Itoa(pid)
		if pid == 0 {
			name = "self"
		}
		if err := os.MkdirAll(filepath.Join(root, name, "ns"), 0o700); err != nil {
			t.Fatal(err)
		}
		write(t, filepath.Join(root, name, "cgroup"), "0::"+path+"\n")
	}
	if err := os.Symlink("cgroup:[4026531835]", filepath.Join(root, "self", "ns", "cgroup")); err != nil {
		t.Fatal(err)
	}
	a, err := attest.New(attest.Config{Mode: attest.ModeKubernetes, Proc: root, Pods: s})
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func bind(t *testing.T, a *attest.Attestor, pid int32) *attest.Binding {
	t.Helper()
	b, err := a.Bind(context.Background(), attest.Caller{PID: pid, Process: alive{}})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(b.Close)
	return b
}

// Witnesses that disagree are seen to disagree, whichever came first and even
// if both were there before the caller.
func TestDisagreement(t *testing.T) {
	t.Parallel()
	for _, field := range []string{"namespace", "name", "service account"} {
		lie := published(uidA, "web-0")
		switch field {
		case "namespace":
			lie.Namespace = "other"
		case "name":
			lie.Name = "other"
		case "service account":
			lie.ServiceAccount = "other"
		}
		for _, order := range []string{"both before", "ledger first", "watch first"} {
			t.Run(field+", "+order, func(t *testing.T) {
				t.Parallel()
				server := newAPIServer(t)
				book := &ledger{}
				s := start(t, podinfo.Config{API: server.api(), Ledger: book})
				eventually(t, "the first list", func() bool { return link(s, "pods").Synced })
				fromWatch := func() {
					server.put(makePod(uidA, "web-0"))
					eventually(t, "the watch", func() bool { return s.Status().Pods == 1 })
				}
				a := attestor(t, s, map[int]string{10: "/kubepods/pod" + uidA + "/" + idA})
				var b *attest.Binding
				switch order {
				case "both before":
					fromWatch()
					book.put(lie)
					b = bind(t, a, 10)
				case "ledger first":
					book.put(lie)
					b = bind(t, a, 10)
					if b.Selectors().Len() < 4 || b.Err() != nil {
						t.Fatalf("with the ledger alone: %v, %v", b.Selectors().Strings(), b.Err())
					}
					fromWatch()
				case "watch first":
					fromWatch()
					b = bind(t, a, 10)
					if b.Selectors().Len() < 4 || b.Err() != nil {
						t.Fatalf("with the watch alone: %v, %v", b.Selectors().Strings(), b.Err())
					}
					book.put(lie)
				}
				if n := b.Selectors().Len(); n != 0 {
					t.Errorf("%d selectors of a caller whose witnesses disagree", n)
				}
				if err := b.Err(); !errors.Is(err, attest.ErrDenied) {
					t.Errorf("Err = %v, want ErrDenied", err)
				}
			})
		}
	}
}

// A bound caller's selectors follow its pod and its container; what is missing
// holds up nothing else.
func TestBoundCaller(t *testing.T) {
	t.Parallel()
	server := newAPIServer(t)
	book := &ledger{}
	book.put(published(uidA, "web-0"))
	s := start(t, podinfo.Config{API: server.api(), Ledger: book})
	a := attestor(t, s, map[int]string{
		10: "/kubepods/pod" + uidA + "/" + idA,
		11: "/kubepods/burstable/pod" + hash + "/" + idB,
	})
	b, static := bind(t, a, 10), bind(t, a, 11)
	contains := func(b *attest.Binding, sel string) func() bool {
		return func() bool { return b.Selectors().Contains(attest.MustSelector(sel)) }
	}
	if !contains(b, "k8s:sa:web")() || contains(b, "k8s:pod-label:app:web")() || !contains(static, "k8s:pod-uid:"+hash)() {
		t.Errorf("at first %v and %v", b.Selectors().Strings(), static.Selectors().Strings())
	}
	server.put(makePod(uidA, "web-0", running(waiting("main"))))
	eventually(t, "labels", contains(b, "k8s:pod-label:app:web"))
	if slices.ContainsFunc(b.Selectors().Strings(), func(s string) bool { return len(s) > 14 && s[:14] == "k8s:container-" }) {
		t.Errorf("container selectors of no container: %v", b.Selectors().Strings())
	}
	server.put(makePod(uidA, "web-0", running(made("main", idA), made("side", idC))))
	eventually(t, "the container", contains(b, "k8s:container-name:main"))
	if contains(b, "k8s:container-name:side")() || contains(b, "k8s:container-image:registry.example/side:1")() {
		t.Error("it is the other container too")
	}
	server.put(makePod("mirror-uid", "etcd-node-1", mirror(hash), running(made("etcd", idB))))
	eventually(t, "the static pod's container", contains(static, "k8s:container-name:etcd"))
	if !slices.Equal(b.Witnesses(), []string{"kernel", "cgroup", "ledger,watch"}) {
		t.Errorf("witnesses %v", b.Witnesses())
	}
	server.put(makePod(uidA, "web-0", running(made("main", idC))))
	eventually(t, "the end of the old run", func() bool { return !contains(b, "k8s:container-name:main")() })
	if b.Err() != nil || static.Err() != nil {
		t.Errorf("denied: %v, %v", b.Err(), static.Err())
	}
}

// Everything at once, for the race detector and for lock order.
func TestConcurrently(t *testing.T) {
	t.Parallel()
	server := newAPIServer(t)
	book := &ledger{}
	var told atomic.Int64
	s := start(t, podinfo.Config{API: server.api(), Ledger: book, NamespaceLabels: true, OnPod: func(attest.Pod) { told.Add(1) }})
	cgroups := map[int]string{}
	for i := range 8 {
		cgroups[10+i] = fmt.Sprintf("/kubepods/poduid-%d/%s", i, idA)
	}
	a := attestor(t, s, cgroups)
	var wg sync.WaitGroup
	for w := range 4 {
		wg.Go(func() {
			for i := range 100 {
				k := (i + w) % 8
				b, err := a.Bind(context.Background(), attest.Caller{PID: int32(10 + k), Process: alive{}})
				if err != nil {
					t.Error(err)
					return
				}
				stop := b.Watch(func() {})
				b.Selectors()
				s.Status()
				s.Problems()
				stop()
				b.Close()
			}
		})
		wg.Go(func() {
			for i := range 50 {
				k := (2*i + w) % 8
				uid, name := fmt.Sprintf("uid-%d", k), fmt.Sprintf("web-%d-%d", w, k)
				switch i % 4 {
				case 0:
					s.Published(book.put(attest.Pod{UID: uid, Namespace: "shop", Name: name}))
				case 1:
					server.put(makePod(uid, name, label("i", strconv.Itoa(i))))
				case 2:
					server.put(makePod(uid, name, running(made("main", idA))))
				default:
					server.breakWatches()
				}
				server.putNamespace("shop", map[string]string{"i": strconv.Itoa(i)})
			}
		})
	}
	wg.Wait()
	if _, _, interests := s.Held(); interests != 0 {
		t.Errorf("%d interests are left", interests)
	}
}
