package registration

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

// Types of conditions.
const (
	CondAccepted        = "Accepted"
	CondEntriesSet      = "EntriesSet"
	CondFederated       = "Federated"
	CondOtherRegistrar  = "OtherRegistrar"
	CondBundleSet       = "BundleSet"
	CondRelationshipSet = "RelationshipSet"
	CondBundleFresh     = "BundleFresh"
)

// signature is a status without times: equal signatures need no write.
type signature string

func signatureOf(status any) signature {
	text, err := json.Marshal(status)
	if err != nil {
		return signature(err.Error()) // cannot be: statuses are plain data
	}
	return signature(text)
}

func withoutTimes(in []metav1.Condition) []metav1.Condition {
	out := slices.Clone(in)
	for i := range out {
		out[i].LastTransitionTime = metav1.Time{}
	}
	return out
}

// conditions collects a status's conditions.
type conditions struct {
	generation int64
	now        metav1.Time
	old, list  []metav1.Condition
}

func (c *conditions) add(kind string, ok bool, reason, message string) {
	status := metav1.ConditionFalse
	if ok {
		status = metav1.ConditionTrue
	}
	next := metav1.Condition{Type: kind, Status: status, Reason: reason, Message: message, ObservedGeneration: c.generation, LastTransitionTime: c.now}
	for _, o := range c.old {
		if o.Type == kind && o.Status == status {
			next.LastTransitionTime = o.LastTransitionTime
		}
	}
	c.list = append(c.list, next)
}

func (c *conditions) accepted(s *source) {
	switch {
	case s.refused == nil:
		c.add(CondAccepted, true, "Valid", "")
	case s.valid > 0:
		c.add(CondAccepted, false, "Invalid", fmt.Sprintf("generation %d stays in force: %s", s.valid, oneLine(s.refused)))
	default:
		c.add(CondAccepted, false, "Invalid", oneLine(s.refused))
	}
}

func (c *conditions) federated(s *source, wanted int) {
	switch {
	case wanted == 0:
	case len(s.unfederated) == 0:
		c.add(CondFederated, true, "BundlesStored", "")
	default:
		c.add(CondFederated, false, "BundleMissing",
			fmt.Sprintf("%d entries go without a foreign bundle that is not stored; it is added when it is", len(s.unfederated)))
	}
}

// entries is the condition for entries that should exist.
func (c *conditions) entries(s *source, renderErrors map[*podState]error) {
	var parts []string
	reason := "AllSet"
	if n := len(renderErrors); n > 0 {
		reason = "RenderFailed"
		name, err := firstPod(renderErrors)
		parts = append(parts, fmt.Sprintf("%s get no entry, among them %s: %s", plural(n, "pod"), name, oneLine(err)))
	}
	if n := len(s.failures); n > 0 {
		reason = "WriteFailed"
		d, err := firstFailure(s.failures)
		of := ""
		if d.pod != "" {
			of = " of pod " + d.pod
		}
		parts = append(parts, fmt.Sprintf("%s cannot be written, among them that%s: %s", plural(n, "entry"), of, oneLine(err)))
	}
	ok := len(parts) == 0
	if s.masked > 0 {
		if ok {
			reason = "SomeMasked"
		}
		parts = append(parts, plural(s.masked, "entry")+" declared by an older resource too")
	}
	c.add(CondEntriesSet, ok, reason, strings.Join(parts, "; "))
}

func plural(n int, noun string) string {
	switch {
	case n == 1:
		return "1 " + noun
	case noun == "entry":
		return fmt.Sprintf("%d entries", n)
	default:
		return fmt.Sprintf("%d %ss", n, noun)
	}
}

func firstPod(errs map[*podState]error) (string, error) {
	var first *podState
	for p := range errs {
		if first == nil || p.name() < first.name() {
			first = p
		}
	}
	return first.name(), errs[first]
}

func firstFailure(errs map[*declaration]error) (*declaration, error) {
	var first *declaration
	for d := range errs {
		if first == nil || cmp.Or(cmp.Compare(d.pod, first.pod), cmp.Compare(d.id, first.id)) < 0 {
			first = d
		}
	}
	return first, errs[first]
}

// wanted is a status to write.
type wanted struct {
	kind, name string
	uid        types.UID
	status     any
	sig        signature // of the status wanted
	have       signature // of the one observed
}

func (x *engine) wantedOf(s *source) *wanted {
	w := &wanted{kind: s.kind, name: s.name, uid: s.uid}
	c := &conditions{generation: s.generation, now: metav1.Now()}
	switch s.kind {
	case kindSPIFFEID:
		w.spiffeID(x.rules[s.uid], c)
	case kindStatic:
		w.static(x.statics[s.uid], c)
	default:
		w.federated(x.federated[s.uid], c, x.Relationships, x.bundles[x.federated[s.uid].relationship.TrustDomain])
	}
	return w
}

func (w *wanted) spiffeID(r *rule, c *conditions) {
	old := *r.observed.spiffeID
	c.old = old.Conditions
	c.accepted(r.source)
	c.entries(r.source, r.renderErrors)
	if r.spec != nil {
		c.federated(r.source, len(r.spec.federates))
	}
	if r.foreign > 0 {
		c.add(CondOtherRegistrar, true, "ForeignEntries", plural(r.foreign, "pod")+" selected here have entries written by somebody else as well")
	}
	status := v1alpha1.ClusterSPIFFEIDStatus{
		Stats: v1alpha1.ClusterSPIFFEIDStats{
			NamespacesSelected: len(r.namespaces), NamespacesIgnored: r.ignored, PodsSelected: len(r.pods),
			PodEntryRenderFailures: len(r.renderErrors), EntriesMasked: r.masked, EntriesToSet: r.toSet,
			EntryFailures: len(r.failures), EntrySuccess: r.success,
		},
		ObservedGeneration: r.generation, Conditions: c.list,
	}
	w.status = status
	status.Conditions, old.Conditions = withoutTimes(status.Conditions), withoutTimes(old.Conditions)
	w.sig, w.have = signatureOf(status), signatureOf(old)
}

func (w *wanted) static(s *staticState, c *conditions) {
	old := *s.observed.static
	c.old = old.Conditions
	c.accepted(s.source)
	if s.decl != nil {
		c.entries(s.source, nil)
		c.federated(s.source, len(s.decl.entry.FederatesWith))
	}
	status := v1alpha1.ClusterStaticEntryStatus{
		Rendered: s.refused == nil, Masked: s.masked > 0, Set: s.success > 0,
		ObservedGeneration: s.generation, Conditions: c.list,
	}
	w.status = status
	status.Conditions, old.Conditions = withoutTimes(status.Conditions), withoutTimes(old.Conditions)
	w.sig, w.have = signatureOf(status), signatureOf(old)
}

// fresh is the condition for a bundle that is fetched from an endpoint.
func (c *conditions) fresh(r Refresh, known bool) {
	switch {
	case !known:
		c.add(CondBundleFresh, false, "Pending", "the endpoint has not been asked yet")
	case r.Error == "":
		c.add(CondBundleFresh, true, "Fetched", "")
	case r.Stale:
		c.add(CondBundleFresh, false, "Stale", oneLine(errors.New(r.Error)))
	case r.Fetched:
		c.add(CondBundleFresh, true, "Retrying", oneLine(errors.New(r.Error)))
	default:
		c.add(CondBundleFresh, false, "FetchFailed", oneLine(errors.New(r.Error)))
	}
}

func (w *wanted) federated(f *federatedState, c *conditions, relationships Relationships, stored bool) {
	old := *f.observed.federated
	c.old = old.Conditions
	if f.loses {
		c.add(CondAccepted, false, "Masked", "an older resource declares the same trust domain")
	} else {
		c.accepted(f.source)
	}
	if f.valid > 0 && !f.loses {
		switch {
		case f.bundleErr != nil:
			c.add(CondBundleSet, false, "Refused", oneLine(f.bundleErr))
		case stored:
			c.add(CondBundleSet, true, "Stored", "")
		default:
			c.add(CondBundleSet, false, "Missing", "no bundle is stored; give one in trustDomainBundle or with `bundle set`")
		}
		switch {
		case relationships == nil:
			c.add(CondRelationshipSet, false, "NotSupported",
				"this authority does not fetch bundles from their endpoints; the bundle is the one in trustDomainBundle until it is changed")
		case f.relationErr != nil:
			c.add(CondRelationshipSet, false, "Refused", oneLine(f.relationErr))
		default:
			c.add(CondRelationshipSet, true, "Set", "")
			c.fresh(relationships.Refresh(f.relationship.TrustDomain))
		}
	}
	status := v1alpha1.ClusterFederatedTrustDomainStatus{ObservedGeneration: f.generation, BundleHash: f.applied, Conditions: c.list}
	w.status = status
	status.Conditions, old.Conditions = withoutTimes(status.Conditions), withoutTimes(old.Conditions)
	w.sig, w.have = signatureOf(status), signatureOf(old)
}

// Pauses after a status that somebody else overwrote.
const (
	contestedMin = 30 * time.Second
	contestedMax = 10 * time.Minute
)

// echoTime is how long a status that was written may take to come back from the
// API server; until then what is observed is taken for older, not for somebody
// else's.
const echoTime = 5 * time.Second

// saying is the status last written for a resource.
type saying struct {
	sig signature
	at  time.Time
	// echoed: the API server has shown it.
	echoed bool
	// quiet: it does not last, and is not repeated before then.
	quiet time.Time
}

// writeStatuses hands those statuses that changed, and whose time has come, to
// the patcher. It returns when the next one is due; zero = none.
func (x *engine) writeStatuses(now time.Time) time.Time {
	if x.resourcesDirty {
		x.resourcesDirty = false
		x.countResources()
	}
	var next time.Time
	for s := range x.statusDirty {
		again := x.writeStatus(s, now)
		if again.IsZero() {
			delete(x.statusDirty, s)
		} else if next.IsZero() || again.Before(next) {
			next = again
		}
	}
	return next
}

// writeStatus does so for one resource. It returns when to look at it again;
// zero = when something changes.
func (x *engine) writeStatus(s *source, now time.Time) time.Time {
	if at := x.statusNext[s]; at.After(now) {
		return at
	}
	w := x.wantedOf(s)
	last := x.said[s]
	if w.sig == w.have {
		if last.sig == w.sig && !last.echoed {
			last.echoed = true
			x.said[s] = last
		}
		return time.Time{}
	}
	next := saying{sig: w.sig, at: now}
	if last.sig == w.sig {
		if back := last.at.Add(echoTime); !last.echoed && back.After(now) {
			return back
		}
		if last.quiet.After(now) {
			return last.quiet
		}
		// It was written and does not last.
		next.quiet = now.Add(min(contestedMin<<min(s.contested, 5), contestedMax))
		if s.contested == 1 {
			x.Logger.Warn("somebody else writes this status too; if a SPIRE controller manager handles the resource as well, give one of the two a className",
				slog.String("kind", s.kind), slog.String("name", s.name))
		}
		s.contested++
	} else {
		s.contested = 0
	}
	x.said[s] = next
	x.statusNext[s] = now.Add(x.StatusInterval)
	x.out.put(w, func(err error) { x.post(func() { x.statusWritten(s, err) }) })
	return time.Time{}
}

// statusWritten notes a failure: the status is written again after a pause.
func (x *engine) statusWritten(s *source, err error) {
	if err == nil || !x.alive(s) {
		return
	}
	delete(x.said, s)
	x.statusDirty[s] = true
	x.statusNext[s] = time.Now().Add(max(x.StatusInterval, 5*time.Second))
}

func (x *engine) alive(s *source) bool {
	switch s.kind {
	case kindSPIFFEID:
		r := x.rules[s.uid]
		return r != nil && r.source == s
	case kindStatic:
		r := x.statics[s.uid]
		return r != nil && r.source == s
	default:
		r := x.federated[s.uid]
		return r != nil && r.source == s
	}
}

func (x *engine) countResources() {
	counts := map[[2]string]int{}
	for _, kind := range []string{kindSPIFFEID, kindStatic, kindFederated} {
		counts[[2]string{kind, "valid"}], counts[[2]string{kind, "refused"}], counts[[2]string{kind, "other_class"}] = 0, 0, 0
	}
	count := func(s *source) {
		state := "valid"
		if s.refused != nil {
			state = "refused"
		}
		counts[[2]string{s.kind, state}]++
	}
	for _, r := range x.rules {
		count(r.source)
	}
	for _, s := range x.statics {
		count(s.source)
	}
	for _, f := range x.federated {
		count(f.source)
	}
	for key := range x.otherClass {
		kind, _, _ := strings.Cut(key, "/")
		counts[[2]string{kind, "other_class"}]++
	}
	for key, n := range counts {
		x.Metrics.resources.WithLabelValues(key[0], key[1]).Set(float64(n))
	}
}
