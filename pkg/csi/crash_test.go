package csi_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"testing"

	csipb "github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/spiffe-node/spiffe-node/internal/ledger"
	"github.com/spiffe-node/spiffe-node/internal/mount"
	"github.com/spiffe-node/spiffe-node/pkg/csi"
)

var errCrash = errors.New("the process has been killed")

// fuse lets a number of changing steps through and kills the process before
// the next: from then on nothing it does has an effect, its undoing included.
type fuse struct {
	mu    sync.Mutex
	left  int
	burnt bool
}

func (f *fuse) step() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.left == 0 {
		f.burnt = true
	}
	if f.burnt {
		return errCrash
	}
	f.left--
	return nil
}

type fusedLedger struct {
	csi.Ledger
	f *fuse
}

func (l fusedLedger) Put(r ledger.Record) error {
	if err := l.f.step(); err != nil {
		return err
	}
	return l.Ledger.Put(r)
}

func (l fusedLedger) Delete(id string) error {
	if err := l.f.step(); err != nil {
		return err
	}
	return l.Ledger.Delete(id)
}

type fusedMounts struct {
	csi.Mounts
	f *fuse
}

func (m fusedMounts) Target(root, rel string) (csi.Target, error) {
	t, err := m.Mounts.Target(root, rel)
	if err != nil {
		return nil, err
	}
	return fusedTarget{t, m.f}, nil
}

type fusedTarget struct {
	csi.Target
	f *fuse
}

func (t fusedTarget) Mkdir(perm uint32) error {
	if err := t.f.step(); err != nil {
		return err
	}
	return t.Target.Mkdir(perm)
}

func (t fusedTarget) Bind(src *mount.Source, o mount.Options) error {
	if err := t.f.step(); err != nil {
		return err
	}
	return t.Target.Bind(src, o)
}

func (t fusedTarget) Unmount() (bool, error) {
	if err := t.f.step(); err != nil {
		return false, err
	}
	return t.Target.Unmount()
}

func (t fusedTarget) Rmdir() error {
	if err := t.f.step(); err != nil {
		return err
	}
	return t.Target.Rmdir()
}

// TestCrashBetweenAnyTwoSteps kills the driver after every number of steps of
// a publish, an unpublish and a repair, and lets another process go on in each
// way the kubelet can.
func TestCrashBetweenAnyTwoSteps(t *testing.T) {
	starts := map[string]struct {
		prepare func(n *node, r *csipb.NodePublishVolumeRequest)
		call    func(n *node, r *csipb.NodePublishVolumeRequest) error
		steps   int // changing steps of the call when nothing stops it
	}{
		"publish": {
			prepare: func(*node, *csipb.NodePublishVolumeRequest) {},
			call:    callPublish,
			steps:   3, // record, directory, bind
		},
		"unpublish": {
			prepare: func(n *node, r *csipb.NodePublishVolumeRequest) { n.publish(r) },
			call:    callUnpublish,
			steps:   3, // unmount, directory, record
		},
		"repair": {
			prepare: func(n *node, r *csipb.NodePublishVolumeRequest) {
				n.publish(r)
				n.replaceSource()
			},
			call:  callPublish,
			steps: 3, // unmount, record, bind
		},
	}
	follows := map[string]struct {
		reconcile bool
		call      func(n *node, r *csipb.NodePublishVolumeRequest) error
		want      func(n *node, r *csipb.NodePublishVolumeRequest)
	}{
		"publish":                {false, callPublish, (*node).wantPublished},
		"unpublish":              {false, callUnpublish, (*node).wantNothing},
		"reconcile to publish":   {true, callPublish, (*node).wantPublished},
		"reconcile to unpublish": {true, callUnpublish, (*node).wantNothing},
	}
	for start, s := range starts {
		for follow, f := range follows {
			for after := range s.steps + 1 {
				t.Run(fmt.Sprintf("%s killed after %d then %s", start, after, follow), func(t *testing.T) {
					n := newNode(t)
					r := n.request(testUID, testVolume)
					s.prepare(n, r)
					fu := &fuse{left: after}
					n.start(func(c *csi.Config) {
						c.Mounts = fusedMounts{csi.HostMounts(), fu}
						c.Ledger = fusedLedger{c.Ledger, fu}
					})
					err := s.call(n, r)
					if fu.burnt != (after < s.steps) || (err != nil) != fu.burnt {
						t.Fatalf("killed: %v, error: %v; the call has not the steps this test thinks", fu.burnt, err)
					}
					// The one thing that must hold at any moment.
					if mountsAt(t, r.GetTargetPath()) > 0 {
						n.wantRecord(r, true)
					}
					n.start()
					if f.reconcile {
						found, seen, err := n.driver.Reconcile(context.Background())
						if err != nil || seen > 1 {
							t.Fatalf("reconcile: %v, %d seen", err, seen)
						}
						for _, x := range found {
							if x.Err != nil {
								t.Fatalf("reconcile: %+v", x)
							}
						}
						// Whole or nothing, before anybody calls again.
						_, recorded := n.store.Get(r.GetVolumeId())
						if mounted := mountsAt(t, r.GetTargetPath()) == 1; mounted != recorded {
							t.Fatalf("mounted %v, recorded %v", mounted, recorded)
						}
					}
					if err := f.call(n, r); err != nil {
						t.Fatal(err)
					}
					f.want(n, r)
				})
			}
		}
	}
}

func callPublish(n *node, r *csipb.NodePublishVolumeRequest) error {
	_, err := n.client.NodePublishVolume(context.Background(), r)
	return err
}

func callUnpublish(n *node, r *csipb.NodePublishVolumeRequest) error {
	_, err := n.client.NodeUnpublishVolume(context.Background(), unpublishOf(r))
	return err
}

// replaceSource deletes the socket directory and makes it anew, as an agent
// that misbehaves or an administrator would.
func (n *node) replaceSource() {
	n.t.Helper()
	_ = n.agent.Close()
	if err := os.RemoveAll(n.source); err != nil {
		n.t.Fatal(err)
	}
	if err := os.Mkdir(n.source, 0o755); err != nil {
		n.t.Fatal(err)
	}
	n.startAgent()
}

// failing fails one step and lets the rest through: the undo must work.
type failing struct {
	csi.Mounts
	step string
	err  error
}

func (f failing) Target(root, rel string) (csi.Target, error) {
	t, err := f.Mounts.Target(root, rel)
	if err != nil {
		return nil, err
	}
	return failingTarget{t, f}, nil
}

type failingTarget struct {
	csi.Target
	f failing
}

func (t failingTarget) Mkdir(perm uint32) error {
	if t.f.step == "mkdir" {
		return t.f.err
	}
	return t.Target.Mkdir(perm)
}

func (t failingTarget) Bind(src *mount.Source, o mount.Options) error {
	if t.f.step == "bind" {
		return t.f.err
	}
	err := t.Target.Bind(src, o)
	if t.f.step == "after bind" {
		return t.f.err
	}
	return err
}

func TestFailedPublishLeavesNothing(t *testing.T) {
	for _, step := range []string{"mkdir", "bind", "after bind"} {
		t.Run(step, func(t *testing.T) {
			n := newNode(t, func(c *csi.Config) {
				c.Mounts = failing{csi.HostMounts(), step, errors.New("no luck")}
			})
			r := n.request(testUID, testVolume)
			wantCode(t, callPublish(n, r), codes.Internal, "no luck")
			n.wantNothing(r)
			n.start(func(c *csi.Config) { c.Mounts = nil })
			n.publish(r)
			n.wantPublished(r)
		})
	}
}

type panicking struct{ csi.Mounts }

func (panicking) Target(string, string) (csi.Target, error) { panic("a bug") }

func TestPanicEndsTheCallOnly(t *testing.T) {
	n := newNode(t, func(c *csi.Config) { c.Mounts = panicking{csi.HostMounts()} })
	r := n.request(testUID, testVolume)
	for range 2 { // the lock of the first call is free again
		err := callPublish(n, r)
		wantCode(t, err, codes.Internal, "bug")
		if got := status.Convert(err).Message(); len(got) > 200 {
			t.Errorf("the panic is told to the caller: %s", got)
		}
	}
}
