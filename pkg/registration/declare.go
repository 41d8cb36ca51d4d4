package registration

import (
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/types"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

func labelSet(m map[string]string) labels.Set { return labels.Set(m) }

// match is a pod that a rule selects, with the entry it declares for it, if any.
type match struct {
	rule    *rule
	pod     *podState
	decl    *declaration
	primary bool // counted in pod.primary
}

// declaration is an entry that a resource wants.
type declaration struct {
	src   *source
	pod   string // namespace/name, empty for static entries
	id    string // the entry ID it prefers
	entry *entry.Entry
	group *group

	place  place
	stored bool // counted in src.success
}

// place is a declaration's place in its group.
type place int

const (
	placeNone place = iota // not decided yet
	placeMasked
	placeWinner
)

// evaluatePod looks at everything about a pod.
func (x *engine) evaluatePod(p *podState) {
	for r := range p.matches {
		if !p.ns.rules[r] {
			x.unmatch(p, r)
		}
	}
	for r := range p.ns.rules {
		if !r.fallback() {
			x.evaluate(p, r)
		}
	}
	x.evaluateFallbacks(p)
}

func (x *engine) evaluateFallbacks(p *podState) {
	for r := range p.ns.rules {
		if r.fallback() {
			x.evaluate(p, r)
		}
	}
}

// evaluateRule looks at one rule for one pod, and at the pod's fallback rules
// if they are now, or no longer, called for.
func (x *engine) evaluateRule(p *podState, r *rule) {
	before := p.primary > 0
	if p.ns.rules[r] {
		x.evaluate(p, r)
	} else {
		x.unmatch(p, r)
	}
	if before != (p.primary > 0) {
		x.evaluateFallbacks(p)
	}
}

func (x *engine) evaluateNamespace(r *rule, ns *nsState) {
	for p := range ns.pods {
		x.evaluateRule(p, r)
	}
}

// evaluate looks at one rule, which selects the pod's namespace, for one pod.
func (x *engine) evaluate(p *podState, r *rule) {
	if !r.spec.pods.Matches(labelSet(p.pod.Labels)) {
		x.unmatch(p, r)
		return
	}
	m := p.matches[r]
	if m == nil {
		m = &match{rule: r, pod: p}
		p.matches[r], r.pods[p] = m, m
		if len(p.foreign) > 0 {
			r.foreign++
		}
		x.touch(r.source)
	}
	if m.primary && r.spec.fallback { // it has just become one
		m.primary = false
		p.primary--
	}
	switch {
	case p.node == nil || !p.node.known:
		// Not scheduled yet, or its node comes any moment: no error, only late.
		x.declare(m, nil, nil)
	case r.spec.fallback && p.primary > 0:
		x.declare(m, nil, nil)
	default:
		e, err := x.render(r.spec, p)
		x.declare(m, e, err)
	}
}

func (x *engine) unmatch(p *podState, r *rule) {
	m := p.matches[r]
	if m == nil {
		return
	}
	x.declare(m, nil, nil)
	delete(p.matches, r)
	delete(r.pods, p)
	if len(p.foreign) > 0 {
		r.foreign--
	}
	x.touch(r.source)
}

// declare makes e, or nothing, the entry of a match.
func (x *engine) declare(m *match, e *entry.Entry, err error) {
	if old := m.rule.renderErrors[m.pod]; err != nil || old != nil {
		if err == nil {
			delete(m.rule.renderErrors, m.pod)
		} else {
			m.rule.renderErrors[m.pod] = err
		}
		if old == nil || err == nil || old.Error() != err.Error() {
			x.touch(m.rule.source)
		}
	}
	if primary := e != nil && !m.rule.spec.fallback; primary != m.primary {
		m.primary = primary
		if primary {
			m.pod.primary++
		} else {
			m.pod.primary--
		}
	}
	m.decl = x.replace(m.decl, e, m.rule.source, m.pod.pod)
}

// replace makes e the content of a declaration, which may be nil before and
// after.
func (x *engine) replace(d *declaration, e *entry.Entry, src *source, pod *corev1.Pod) *declaration {
	if d == nil && e == nil {
		return nil
	}
	if d != nil && e != nil && groupOf(e) == d.group.key {
		if !d.entry.SameContent(e) {
			d.entry = e
			x.dirty[d.group] = true
		}
		return d
	}
	if d != nil {
		x.withdraw(d)
	}
	if e == nil {
		return nil
	}
	d = &declaration{src: src, entry: e}
	if pod != nil {
		d.id, d.pod = entryID(src.uid, pod.UID), pod.Namespace+"/"+pod.Name
	} else {
		d.id = entryID(src.uid, "")
	}
	x.join(d)
	return d
}

// setRule takes over a ClusterSPIFFEID.
func (x *engine) setRule(c *v1alpha1.ClusterSPIFFEID) {
	x.replaceNamed(kindSPIFFEID, c.Name, c.UID)
	r := x.rules[c.UID]
	if !x.handles(c.Spec.ClassName) {
		x.notOurs(kindSPIFFEID, c.Name, c.UID, c.Spec.ClassName)
		return
	}
	delete(x.otherClass, kindSPIFFEID+"/"+c.Name)
	if r == nil {
		r = &rule{
			source: newSource(kindSPIFFEID, &c.ObjectMeta), namespaces: make(map[*nsState]bool),
			pods: make(map[*podState]*match), renderErrors: make(map[*podState]error),
		}
		x.rules[c.UID] = r
	}
	unchanged := r.same(&c.ObjectMeta)
	r.meta(&c.ObjectMeta)
	r.observed.spiffeID = &c.Status
	x.touch(r.source)
	if unchanged {
		return
	}
	spec, err := compileRule(&c.Spec)
	x.accept(r.source, err)
	if err != nil {
		// The last valid version stays in force.
		return
	}
	r.spec = spec
	for _, ns := range x.namespaces {
		x.selectNamespace(r, ns)
	}
	for p := range x.candidates(r) {
		x.evaluateRule(p, r)
		if m := p.matches[r]; m != nil && m.decl != nil {
			x.dirty[m.decl.group] = true // age and deletion decide on who wins
		}
	}
	x.releaseHeld(r.uid)
}

func (x *engine) deleteRule(uid types.UID) {
	r := x.rules[uid]
	if r == nil {
		return
	}
	for ns := range r.namespaces {
		delete(ns.rules, r)
	}
	for p := range r.pods {
		x.evaluateRule(p, r)
	}
	x.dropSource(r.source)
	x.releaseHeld(r.uid)
	delete(x.rules, r.uid)
}
