package registration_test

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"

	"github.com/spiffe-node/spiffe-node/pkg/authority"
	"github.com/spiffe-node/spiffe-node/pkg/authority/embedded"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/registration"
	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("example.org")

// fakeAuthority is the embedded authority's behaviour in memory, with faults on
// demand and a hook that sees every set.
type fakeAuthority struct {
	mu      sync.Mutex
	set     *entry.Set
	bundles map[spiffeid.TrustDomain]*embedded.Bundle
	fail    error
	onSet   func(*entry.Set)
	writes  map[string]int // calls that changed something
	n       int
}

func newFake(entries ...*entry.Entry) *fakeAuthority {
	return &fakeAuthority{set: entry.NewSet(entries...), bundles: make(map[spiffeid.TrustDomain]*embedded.Bundle), writes: make(map[string]int)}
}

func (f *fakeAuthority) Set() *entry.Set {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.set
}

func (f *fakeAuthority) Entries(ctx context.Context, after uint64) (*entry.Set, error) {
	for {
		if s := f.Set(); s.Version() > after {
			return s, nil
		}
		select {
		case <-ctx.Done():
			return nil, ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}

func (f *fakeAuthority) Bundles(ctx context.Context, after uint64) (*authority.BundleSet, error) {
	if after > 0 {
		<-ctx.Done()
		return nil, ctx.Err()
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	out := &authority.BundleSet{Version: 1, Federated: make(map[spiffeid.TrustDomain]*spiffebundle.Bundle)}
	for td := range f.bundles {
		out.Federated[td] = spiffebundle.New(td)
	}
	return out, nil
}

func (f *fakeAuthority) SetFederatedBundle(_ context.Context, b *embedded.Bundle) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fail != nil {
		return f.fail
	}
	f.writes["bundle"]++
	f.bundles[b.TrustDomain] = b
	return nil
}

func (f *fakeAuthority) change(changed []*entry.Entry, removed []string) {
	f.set = f.set.With(changed, removed)
	if f.onSet != nil {
		f.onSet(f.set)
	}
}

func (f *fakeAuthority) CreateEntries(_ context.Context, in ...*entry.Entry) []embedded.Result {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]embedded.Result, len(in))
	var added []*entry.Entry
	batch := make(map[string]*entry.Entry)
	for i, e := range in {
		if f.fail != nil {
			out[i].Err = f.fail
			continue
		}
		if err := f.check(e); err != nil {
			out[i].Err = err
			continue
		}
		if same, ok := f.set.Similar(e); ok {
			out[i].Err = &embedded.SimilarError{Stored: same}
			continue
		}
		key := e.SPIFFEID.String() + " " + e.ParentID.String() + " " + e.Selectors.Key()
		if same, ok := batch[key]; ok {
			out[i].Err = &embedded.SimilarError{Stored: same}
			continue
		}
		if _, ok := f.set.Get(e.ID); ok {
			out[i].Err = fmt.Errorf("%w: ID", embedded.ErrExists)
			continue
		}
		e = e.Clone()
		if e.ID == "" {
			f.n++
			e.ID = fmt.Sprintf("manual-%d", f.n)
		}
		added, batch[key] = append(added, e), e
		out[i].Entry = e
		f.writes["create"]++
	}
	f.change(added, nil)
	return out
}

func (f *fakeAuthority) check(e *entry.Entry) error {
	for _, with := range e.FederatesWith {
		if f.bundles[with] == nil && with != td {
			return &embedded.NoBundleError{TrustDomain: with}
		}
	}
	return e.Validate(td)
}

func (f *fakeAuthority) UpdateEntries(_ context.Context, updates ...embedded.EntryUpdate) []embedded.Result {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]embedded.Result, len(updates))
	var changed []*entry.Entry
	for i, u := range updates {
		old, ok := f.set.Get(u.ID)
		switch {
		case f.fail != nil:
			out[i].Err = f.fail
			continue
		case !ok:
			out[i].Err = embedded.ErrNotFound
			continue
		}
		e := old.Clone()
		if out[i].Err = u.Edit(e); out[i].Err != nil {
			continue
		}
		e.ID, e.Revision, e.CreatedAt = old.ID, old.Revision+1, old.CreatedAt
		if out[i].Err = f.check(e); out[i].Err != nil {
			continue
		}
		changed = append(changed, e)
		out[i].Entry = e
		f.writes["update"]++
	}
	f.change(changed, nil)
	return out
}

func (f *fakeAuthority) DeleteEntries(_ context.Context, ids ...string) []error {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]error, len(ids))
	var removed []string
	for i, id := range ids {
		if _, ok := f.set.Get(id); !ok {
			out[i] = embedded.ErrNotFound
		} else if out[i] = f.fail; out[i] == nil {
			removed = append(removed, id)
			f.writes["delete"]++
		}
	}
	f.change(nil, removed)
	return out
}

func (f *fakeAuthority) total() int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.writes["create"] + f.writes["update"] + f.writes["delete"]
}

func testConfig(tb testing.TB, a registration.Authority) registration.Config {
	tb.Helper()
	return registration.Config{
		Client: &rest.Config{Host: "http://127.0.0.1:1"}, Authority: a, TrustDomain: td, ClusterName: "demo", ClusterDomain: "cluster.local",
		Logger: slog.New(slog.NewTextHandler(tb.Output(), nil)),
	}
}

func newEngine(tb testing.TB, a registration.Authority, edit ...func(*registration.Config)) *registration.Engine {
	tb.Helper()
	cfg := testConfig(tb, a)
	for _, f := range edit {
		f(&cfg)
	}
	e, err := registration.NewEngine(tb.Context(), cfg)
	if err != nil {
		tb.Fatal(err)
	}
	return e
}

func start(tb testing.TB, e *registration.Engine) {
	tb.Helper()
	if err := e.Start(); err != nil {
		tb.Fatal(err)
	}
}

func namespace(name string, labels ...string) *corev1.Namespace {
	m := pairs(labels)
	m["kubernetes.io/metadata.name"] = name
	return &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("ns-" + name), Labels: m}}
}

func node(name string) *corev1.Node {
	return &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("node-uid-" + name), Labels: map[string]string{"zone": "z-" + name}}}
}

// pod is one named ns/name that runs on a node, or nowhere yet.
func pod(name, node string, labels ...string) *corev1.Pod {
	ns, base, _ := strings.Cut(name, "/")
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: base, UID: types.UID("uid-" + ns + "-" + base), Labels: pairs(labels)},
		Spec:       corev1.PodSpec{NodeName: node, ServiceAccountName: "sa-" + base, Containers: []corev1.Container{{Name: "main", Image: "img"}}},
	}
}

func pairs(list []string) map[string]string {
	m := make(map[string]string)
	for c := range slices.Chunk(list, 2) {
		m[c[0]] = c[1]
	}
	return m
}

var epoch = time.Unix(1_700_000_000, 0)

// spiffeID is a ClusterSPIFFEID created age seconds after the first.
func spiffeID(name string, age int, edit ...func(*v1alpha1.ClusterSPIFFEIDSpec)) *v1alpha1.ClusterSPIFFEID {
	c := &v1alpha1.ClusterSPIFFEID{
		ObjectMeta: metav1.ObjectMeta{Name: name, UID: types.UID("cr-" + name), Generation: 1, CreationTimestamp: metav1.NewTime(epoch.Add(time.Duration(age) * time.Second))},
		Spec:       v1alpha1.ClusterSPIFFEIDSpec{SPIFFEIDTemplate: istioID},
	}
	for _, f := range edit {
		f(&c.Spec)
	}
	return c
}

const istioID = "spiffe://{{ .TrustDomain }}/ns/{{ .PodMeta.Namespace }}/sa/{{ .PodSpec.ServiceAccountName }}"

func slice(ns, service, name string, pods ...*corev1.Pod) *discoveryv1.EndpointSlice {
	s := &discoveryv1.EndpointSlice{ObjectMeta: metav1.ObjectMeta{Namespace: ns, Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: service}}}
	for _, p := range pods {
		s.Endpoints = append(s.Endpoints, discoveryv1.Endpoint{
			Addresses: []string{"10.0.0.1"}, TargetRef: &corev1.ObjectReference{Kind: "Pod", Namespace: p.Namespace, Name: p.Name, UID: p.UID},
		})
	}
	return s
}

// show is an entry as one line.
func show(e *entry.Entry) string {
	out := fmt.Sprintf("%s <- %s %s", e.SPIFFEID.Path(), strings.TrimPrefix(e.ParentID.Path(), "/spire/agent/k8s_psat/"), strings.Join(e.Selectors.Strings(), ","))
	if len(e.DNSNames) > 0 {
		out += " dns=" + strings.Join(e.DNSNames, ",")
	}
	if e.X509SVIDTTL != 0 || e.JWTSVIDTTL != 0 {
		out += fmt.Sprintf(" ttl=%s/%s", e.X509SVIDTTL, e.JWTSVIDTTL)
	}
	for _, f := range e.FederatesWith {
		out += " federates=" + f.Name()
	}
	for name, on := range map[string]bool{"admin": e.Admin} {
		if on {
			out += " " + name
		}
	}
	if e.Downstream {
		out += " downstream"
	}
	if e.StoreSVID {
		out += " store"
	}
	if e.Fallback {
		out += " fallback"
	}
	if e.Hint != "" {
		out += " hint=" + e.Hint
	}
	return out
}

func showAll(s *entry.Set) []string {
	out := []string{}
	for e := range s.All() {
		out = append(out, show(e))
	}
	slices.Sort(out)
	return out
}

func condition(list []metav1.Condition, kind string) string {
	for _, c := range list {
		if c.Type == kind {
			return fmt.Sprintf("%s %s %s", c.Status, c.Reason, c.Message)
		}
	}
	return ""
}
