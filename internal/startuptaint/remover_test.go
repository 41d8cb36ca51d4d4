package startuptaint_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"

	"github.com/spiffe-node/spiffe-node/internal/startuptaint"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

const key = "spiffe-node.io/agent-not-ready"

// cluster is an API server with one node.
type cluster struct {
	mu         sync.Mutex
	node       *corev1.Node
	registered bool
	pods       []corev1.Pod
	serving    error
	patchErr   error
	patches    []string
	looks      int
	set        func(*corev1.Node)
	gone       func(string)
}

var errAway = errors.New("connection refused")

func newCluster(taints ...corev1.Taint) *cluster {
	return &cluster{
		node:       &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: "n1", UID: "u1", ResourceVersion: "7"}, Spec: corev1.NodeSpec{Taints: taints}},
		registered: true,
		pods:       []corev1.Pod{agent(corev1.ConditionTrue)},
	}
}

func agent(ready corev1.ConditionStatus) corev1.Pod {
	return corev1.Pod{Status: corev1.PodStatus{Conditions: []corev1.PodCondition{{Type: corev1.PodReady, Status: ready}}}}
}

func (c *cluster) Watch(ctx context.Context, set func(*corev1.Node), gone func(string)) {
	c.mu.Lock()
	c.set, c.gone = set, gone
	n := c.node.DeepCopy()
	c.mu.Unlock()
	set(n)
	<-ctx.Done()
}

func (c *cluster) Node(_ context.Context, name string) (*corev1.Node, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.looks++
	if c.node == nil {
		return nil, apierrors.NewNotFound(schema.GroupResource{Resource: "nodes"}, name)
	}
	return c.node.DeepCopy(), nil
}

func (c *cluster) PatchNode(_ context.Context, _ string, patch []byte) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.patches = append(c.patches, string(patch))
	if c.patchErr != nil {
		return c.patchErr
	}
	var p struct {
		Metadata struct {
			UID             types.UID
			ResourceVersion string
		}
		Spec struct{ Taints []corev1.Taint }
	}
	if err := json.Unmarshal(patch, &p); err != nil {
		return err
	}
	if p.Metadata.ResourceVersion != c.node.ResourceVersion || p.Metadata.UID != c.node.UID {
		return apierrors.NewConflict(schema.GroupResource{Resource: "nodes"}, "n1", errors.New("changed"))
	}
	c.node.Spec.Taints, c.node.ResourceVersion = p.Spec.Taints, c.node.ResourceVersion+"1"
	c.set(c.node.DeepCopy())
	return nil
}

func (c *cluster) Registered(_ context.Context, _, driver string) (bool, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.registered && driver == "csi.spiffe.io", nil
}

func (c *cluster) AgentPods(_ context.Context, node, namespace, account string) ([]corev1.Pod, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if node != "n1" || namespace != "spire-server" || account != "spire-agent" {
		return nil, nil
	}
	return c.pods, nil
}

func (c *cluster) change(f func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f()
}

func (c *cluster) taints() []string {
	c.mu.Lock()
	defer c.mu.Unlock()
	out := []string{}
	for _, t := range c.node.Spec.Taints {
		out = append(out, t.Key+":"+string(t.Effect))
	}
	return out
}

// run starts a Remover in a bubble; the log is what it has said.
func run(t *testing.T, c *cluster) *bytes.Buffer {
	t.Helper()
	var log bytes.Buffer
	r, err := startuptaint.New(startuptaint.Config{
		API: c, Key: key, Driver: "csi.spiffe.io", Agents: []string{"other:one", "spire-server:spire-agent"},
		Serving: func(uid string) error {
			c.mu.Lock()
			defer c.mu.Unlock()
			if uid != "u1" {
				return errors.New("another node")
			}
			return c.serving
		},
		Logger: slog.New(slog.NewTextHandler(&log, nil)),
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return &log
}

func after(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

var (
	noSchedule = corev1.Taint{Key: key, Effect: corev1.TaintEffectNoSchedule}
	noExecute  = corev1.Taint{Key: key, Value: "true", Effect: corev1.TaintEffectNoExecute}
	foreign    = corev1.Taint{Key: "example.org/gpu", Effect: corev1.TaintEffectNoSchedule}
)

func TestRemovesOurTaintAndNoOther(t *testing.T) {
	for name, taints := range map[string][]corev1.Taint{
		"alone":        {noSchedule},
		"both effects": {noSchedule, foreign, noExecute},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCluster(taints...)
				log := run(t, c)
				after(time.Second)
				want := []string{}
				if slices.Contains(taints, foreign) {
					want = append(want, "example.org/gpu:NoSchedule")
				}
				if diff := cmp.Diff(want, c.taints()); diff != "" {
					t.Errorf("-want +got:\n%s\n%s", diff, log)
				}
				if len(c.patches) != 1 {
					t.Errorf("patches: %q", c.patches)
				}
			})
		})
	}
}

// Whatever is missing keeps the taint on; when it comes, the taint goes soon.
func TestKeepsTheTaintUntilAllIsThere(t *testing.T) {
	for name, tc := range map[string]struct {
		lack, have func(*cluster)
		says       string
	}{
		"agent": {
			func(c *cluster) { c.serving = errors.New("agent X is not connected") },
			func(c *cluster) { c.serving = nil }, "agent X is not connected",
		},
		"driver": {
			func(c *cluster) { c.registered = false },
			func(c *cluster) { c.registered = true }, "does not know driver csi.spiffe.io",
		},
		"readiness": {
			func(c *cluster) { c.pods = []corev1.Pod{agent(corev1.ConditionFalse)} },
			func(c *cluster) { c.pods = []corev1.Pod{agent(corev1.ConditionTrue)} }, "no pod of the agents is Ready",
		},
		"pod that goes": {
			func(c *cluster) { c.pods[0].DeletionTimestamp = &metav1.Time{Time: time.Now()} },
			func(c *cluster) { c.pods[0].DeletionTimestamp = nil }, "no pod of the agents is Ready",
		},
		"right": {
			func(c *cluster) {
				c.patchErr = apierrors.NewForbidden(schema.GroupResource{Resource: "nodes"}, "n1", nil)
			},
			func(c *cluster) { c.patchErr = nil }, "startupTaint.enabled",
		},
		"API server": {
			func(c *cluster) { c.patchErr = errAway },
			func(c *cluster) { c.patchErr = nil }, "connection refused",
		},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				c := newCluster(noExecute)
				tc.lack(c)
				log := run(t, c)
				after(2 * time.Minute)
				if diff := cmp.Diff([]string{key + ":NoExecute"}, c.taints()); diff != "" {
					t.Fatalf("-want +got:\n%s", diff)
				}
				if !strings.Contains(log.String(), tc.says) {
					t.Errorf("the log does not say %q:\n%s", tc.says, log)
				}
				if c.looks > 20 {
					t.Errorf("looked at %d times in two minutes", c.looks)
				}
				c.change(func() { tc.have(c) })
				after(15 * time.Second)
				if got := c.taints(); len(got) != 0 {
					t.Errorf("still %v", got)
				}
			})
		})
	}
}

// A change of the node between read and patch is not undone.
func TestConflict(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(noSchedule)
		c.patchErr = apierrors.NewConflict(schema.GroupResource{Resource: "nodes"}, "n1", nil)
		run(t, c)
		after(100 * time.Millisecond)
		c.change(func() {
			c.patchErr = nil
			c.node.Spec.Taints = append(c.node.Spec.Taints, foreign)
			c.node.ResourceVersion = "8"
		})
		after(time.Second)
		if diff := cmp.Diff([]string{"example.org/gpu:NoSchedule"}, c.taints()); diff != "" {
			t.Errorf("-want +got:\n%s\n%q", diff, c.patches)
		}
	})
}

// A node that comes back tainted is looked at again, one that is gone is not.
func TestComesAndGoes(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(noSchedule)
		c.serving = errors.New("not yet")
		run(t, c)
		after(time.Second)
		c.change(func() { c.node = nil })
		c.gone("n1")
		looks := c.looks
		after(time.Hour)
		if c.looks > looks+1 {
			t.Errorf("a node that is gone was looked at %d times", c.looks-looks)
		}
		again := newCluster(noSchedule).node
		c.change(func() { c.node, c.serving = again, nil })
		c.set(again.DeepCopy())
		after(time.Second)
		if got := c.taints(); len(got) != 0 {
			t.Errorf("still %v", got)
		}
		c.change(func() { c.node.Spec.Taints = []corev1.Taint{noExecute} })
		c.set(c.node.DeepCopy())
		after(time.Second)
		if got := c.taints(); len(got) != 0 {
			t.Errorf("tainted again: still %v", got)
		}
	})
}

func TestUntaintedNodesCostNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCluster(foreign)
		run(t, c)
		after(time.Hour)
		if c.looks != 0 || len(c.patches) != 0 {
			t.Errorf("%d looks, %d patches", c.looks, len(c.patches))
		}
	})
}

func TestConfig(t *testing.T) {
	good := func() startuptaint.Config {
		return startuptaint.Config{API: newCluster(), Key: key, Driver: "d", Agents: []string{"a:b"}, Serving: func(string) error { return nil }}
	}
	if _, err := startuptaint.New(good()); err != nil {
		t.Error(err)
	}
	spoil := map[string]func(*startuptaint.Config){
		"API":     func(c *startuptaint.Config) { c.API = nil },
		"Key":     func(c *startuptaint.Config) { c.Key = "" },
		"Driver":  func(c *startuptaint.Config) { c.Driver = "" },
		"Agents":  func(c *startuptaint.Config) { c.Agents = nil },
		"Serving": func(c *startuptaint.Config) { c.Serving = nil },
	}
	for _, name := range slices.Sorted(maps.Keys(spoil)) {
		c := good()
		spoil[name](&c)
		if _, err := startuptaint.New(c); err == nil {
			t.Errorf("no %s is taken", name)
		}
	}
}
