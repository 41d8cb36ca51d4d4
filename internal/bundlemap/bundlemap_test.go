package bundlemap_test

import (
	"context"
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"errors"
	"maps"
	"math/big"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/spiffe-node/spiffe-node/internal/bundlemap"
	"github.com/spiffe-node/spiffe-node/pkg/authority"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// root is a CA of the tests.
var root = sync.OnceValue(func() *x509.Certificate {
	pub, key, err := ed25519.GenerateKey(nil)
	if err != nil {
		panic(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), IsCA: true, BasicConstraintsValid: true, NotAfter: time.Now().Add(time.Hour)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, pub, key)
	if err != nil {
		panic(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		panic(err)
	}
	return cert
})

var td = spiffeid.RequireTrustDomainFromString("example.org")

// cluster is an API server with ConfigMaps of one namespace.
type cluster struct {
	mu     sync.Mutex
	maps   map[string]map[string]string
	down   error
	writes int
}

func (c *cluster) Get(_ context.Context, name string, _ metav1.GetOptions) (*corev1.ConfigMap, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	data, ok := c.maps[name]
	switch {
	case c.down != nil:
		return nil, c.down
	case !ok:
		return nil, apierrors.NewNotFound(schema.GroupResource{Resource: "configmaps"}, name)
	}
	return &corev1.ConfigMap{Data: maps.Clone(data)}, nil
}

func (c *cluster) Create(_ context.Context, m *corev1.ConfigMap, _ metav1.CreateOptions) (*corev1.ConfigMap, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.writes++
	c.maps[m.Name] = maps.Clone(m.Data)
	return m, c.down
}

func (c *cluster) Patch(_ context.Context, name string, pt types.PatchType, patch []byte, _ metav1.PatchOptions, _ ...string) (*corev1.ConfigMap, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if pt != types.MergePatchType {
		return nil, errors.New("another patch type")
	}
	var m corev1.ConfigMap
	if err := json.Unmarshal(patch, &m); err != nil {
		return nil, err
	}
	c.writes++
	if c.maps[name] == nil {
		c.maps[name] = map[string]string{}
	}
	maps.Copy(c.maps[name], m.Data)
	return &m, nil
}

func (c *cluster) state() (map[string]string, int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return maps.Clone(c.maps["spire-bundle"]), c.writes
}

func (c *cluster) set(change func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	change()
}

// source hands out bundles as an authority does.
type source struct {
	mu      sync.Mutex
	version uint64
	own     *spiffebundle.Bundle
	changed chan struct{}
}

func newSource() *source {
	s := &source{changed: make(chan struct{})}
	s.publish(1)
	return s
}

// publish makes a bundle that is told by its sequence number.
func (s *source) publish(seq uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	b := spiffebundle.FromX509Authorities(td, []*x509.Certificate{root()})
	b.SetSequenceNumber(seq)
	s.version, s.own = s.version+1, b
	close(s.changed)
	s.changed = make(chan struct{})
}

func (s *source) Bundles(ctx context.Context, after uint64) (*authority.BundleSet, error) {
	for {
		s.mu.Lock()
		set, changed := &authority.BundleSet{Version: s.version, Own: s.own}, s.changed
		s.mu.Unlock()
		if set.Version > after {
			return set, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-changed:
		}
	}
}

// run starts a publisher in a bubble of time and ends it with the test.
func run(t *testing.T, check func(*cluster, *source)) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		c, s := &cluster{maps: map[string]map[string]string{}}, newSource()
		p, err := bundlemap.New(bundlemap.Config{ConfigMaps: c, Name: "spire-bundle", Bundles: s.Bundles})
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- p.Run(ctx) }()
		check(c, s)
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Run: %v", err)
		}
	})
}

func sequence(t *testing.T, data map[string]string) uint64 {
	t.Helper()
	b, err := spiffebundle.Parse(td, []byte(data[bundlemap.KeySPIFFE]))
	if err != nil {
		t.Fatalf("%v in %q", err, data)
	}
	n, _ := b.SequenceNumber()
	return n
}

func TestPublishes(t *testing.T) {
	run(t, func(c *cluster, s *source) {
		synctest.Wait()
		data, writes := c.state()
		if got := sequence(t, data); got != 1 || writes != 1 {
			t.Errorf("bundle %d after %d writes", got, writes)
		}
		if _, ok := data[bundlemap.KeyPEM]; !ok {
			t.Errorf("no %s", bundlemap.KeyPEM)
		}
		s.publish(2)
		synctest.Wait()
		if data, writes = c.state(); sequence(t, data) != 2 || writes != 2 {
			t.Errorf("bundle %d after %d writes", sequence(t, data), writes)
		}
		time.Sleep(time.Hour)
		if _, writes = c.state(); writes != 2 {
			t.Errorf("%d writes without a change", writes)
		}
	})
}

// TestKept: what others delete or change comes back, what is theirs stays.
func TestKept(t *testing.T) {
	run(t, func(c *cluster, _ *source) {
		synctest.Wait()
		c.set(func() { c.maps["spire-bundle"][bundlemap.KeySPIFFE] = "{}"; c.maps["spire-bundle"]["mine"] = "stays" })
		time.Sleep(time.Minute)
		data, _ := c.state()
		if sequence(t, data) != 1 || data["mine"] != "stays" {
			t.Errorf("%q", data)
		}
		c.set(func() { delete(c.maps, "spire-bundle") })
		time.Sleep(time.Minute)
		if data, _ = c.state(); sequence(t, data) != 1 {
			t.Errorf("%q", data)
		}
	})
}

// TestAway: an API server that comes back gets the newest bundle soon.
func TestAway(t *testing.T) {
	run(t, func(c *cluster, s *source) {
		synctest.Wait()
		c.set(func() { c.down = errors.New("connection refused") })
		s.publish(2)
		s.publish(3)
		time.Sleep(10 * time.Minute)
		c.set(func() { c.down = nil })
		time.Sleep(20 * time.Second)
		if data, _ := c.state(); sequence(t, data) != 3 {
			t.Errorf("bundle %d", sequence(t, data))
		}
	})
}

func TestConfig(t *testing.T) {
	for name, c := range map[string]bundlemap.Config{
		"no bundles":   {ConfigMaps: &cluster{}},
		"no client":    {Bundles: newSource().Bundles},
		"no namespace": {Bundles: newSource().Bundles, Client: &rest.Config{}}, // these tests run in no pod
	} {
		if _, err := bundlemap.New(c); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if _, err := bundlemap.New(bundlemap.Config{Bundles: newSource().Bundles, Client: &rest.Config{}, Namespace: "a"}); err != nil {
		t.Error(err)
	}
}
