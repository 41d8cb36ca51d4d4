package attest

import (
	"fmt"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

// podState is a pod of which at least one binding exists: all of them share
// one watch and one reading of what the witness knows.
type podState struct {
	a    *Attestor
	uid  string
	stop func()
	refs int // under Attestor.mu

	// version counts what the source has told of; facts are behind it until
	// somebody asks. Notifications take mu and nothing else, and mu is never
	// held while the source is called, so that a source may notify with its
	// own lock held.
	version atomic.Uint64
	facts   atomic.Pointer[facts]

	mu       sync.Mutex
	bindings map[*Binding]struct{}

	reading sync.Mutex // one reader of the source at a time
	first   *Pod       // what it knew first, under reading
	err     error      // final, under reading
}

// facts are what the witness knows of a pod at one version. Immutable.
type facts struct {
	version   uint64
	pod       Pod
	known     bool
	selectors []Selector // of the pod as a whole
	err       error      // the witness disagrees with the cgroup or itself
}

func (a *Attestor) attach(b *Binding) *podState {
	a.mu.Lock()
	defer a.mu.Unlock()
	uid := b.place.pod
	p := a.pods[uid]
	if p == nil {
		p = &podState{a: a, uid: uid, stop: func() {}, bindings: make(map[*Binding]struct{})}
		if a.source != nil {
			p.stop = a.source.Watch(uid, p.notify)
		}
		a.pods[uid] = p
	}
	p.refs++
	p.mu.Lock()
	p.bindings[b] = struct{}{}
	p.mu.Unlock()
	return p
}

func (a *Attestor) detach(b *Binding) {
	p := b.pod
	p.mu.Lock()
	delete(p.bindings, b)
	p.mu.Unlock()
	a.mu.Lock()
	p.refs--
	last := p.refs == 0
	if last {
		delete(a.pods, p.uid)
	}
	a.mu.Unlock()
	if last {
		p.stop()
	}
}

func (p *podState) notify() {
	p.version.Add(1)
	p.mu.Lock()
	list := make([]*Binding, 0, len(p.bindings))
	for b := range p.bindings {
		list = append(list, b)
	}
	p.mu.Unlock()
	for _, b := range list {
		b.changed()
	}
}

// current is what the witness knows now.
func (p *podState) current() *facts {
	if f := p.facts.Load(); f != nil && f.version == p.version.Load() {
		return f
	}
	p.reading.Lock()
	defer p.reading.Unlock()
	version := p.version.Load()
	if f := p.facts.Load(); f != nil && f.version == version {
		return f
	}
	f := &facts{version: version}
	if p.a.source != nil {
		f.pod, f.known = p.a.source.Pod(p.uid)
	}
	if joined, ok := p.a.source.(JoinedSource); ok {
		for _, said := range joined.Testimony(p.uid) {
			if p.err == nil {
				p.err = p.check(said)
			}
		}
	}
	if f.known && p.err == nil {
		p.err = p.check(f.pod)
	}
	if f.err = p.err; f.err != nil {
		f.pod, f.known = Pod{}, false
		p.facts.Store(f)
		return f
	}
	f.pod.UID = p.uid
	f.selectors = p.a.podSelectors(f)
	p.facts.Store(f)
	return f
}

// check compares what the witness says with the cgroup and with what it has
// said before: a UID's namespace, name and service account never change.
func (p *podState) check(pod Pod) error {
	if pod.UID != "" && pod.UID != p.uid {
		return fmt.Errorf("%w: the cgroup says pod %s, the %s says %s", ErrDenied, p.uid, witness(pod), pod.UID)
	}
	if p.first == nil {
		p.first = &pod
		return nil
	}
	for _, f := range [...]struct {
		name string
		was  *string
		is   string
	}{
		{"namespace", &p.first.Namespace, pod.Namespace},
		{"name", &p.first.Name, pod.Name},
		{"service account", &p.first.ServiceAccount, pod.ServiceAccount},
	} {
		if *f.was == "" {
			*f.was = f.is
		}
		if f.is != "" && f.is != *f.was {
			return fmt.Errorf("%w: the %s of pod %s was %q, the %s now says %q", ErrDenied, f.name, p.uid, *f.was, witness(pod), f.is)
		}
	}
	return nil
}

func witness(pod Pod) string {
	if pod.Witness == "" {
		return "pod source"
	}
	return pod.Witness
}

// podSelectors are those of the pod as a whole, in SPIRE's spelling. Without
// the required witness there are none.
func (a *Attestor) podSelectors(f *facts) []Selector {
	if a.requireLedger && (!f.known || !hasWitness(f.pod.Witness, WitnessLedger)) {
		return nil
	}
	return f.pod.K8sSelectors()
}

// K8sSelectors are the selectors of the pod as a whole, in SPIRE's spelling:
// what each caller in it has, whatever its container.
func (p Pod) K8sSelectors() []Selector {
	return append(selector.OfPod(p.UID, p.Namespace, p.ServiceAccount, p.Name, p.NodeName), p.Selectors...)
}

func hasWitness(list, want string) bool {
	for w := range strings.SplitSeq(list, ",") {
		if w == want {
			return true
		}
	}
	return false
}
