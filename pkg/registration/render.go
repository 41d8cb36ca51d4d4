package registration

import (
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

// context is what templates see of a pod and its node.
func (s *settings) context(node *nodeState) *TemplateContext {
	return &TemplateContext{
		TrustDomain: s.TrustDomain.Name(), ClusterName: s.ClusterName, ClusterDomain: s.ClusterDomain,
		NodeMeta: node.meta, NodeSpec: node.spec,
	}
}

// parentOf is the parent of entries for a node's pods.
func (s *settings) parentOf(meta *metav1.ObjectMeta, spec *corev1.NodeSpec) (spiffeid.ID, error) {
	text, err := s.parent.render(s.context(&nodeState{meta: meta, spec: spec}))
	if err != nil {
		return spiffeid.ID{}, err
	}
	id, err := spiffeid.FromString(text)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("parentIDTemplate: rendered %q: %w", text, err)
	}
	if err := entry.CheckMember(s.TrustDomain, id); err != nil {
		return spiffeid.ID{}, fmt.Errorf("parentIDTemplate: %w", err)
	}
	return id, nil
}

// render is the entry a rule gives a scheduled pod, without ID.
func (s *settings) render(r *ruleSpec, p *podState) (*entry.Entry, error) {
	if p.node.err != nil {
		return nil, p.node.err
	}
	c := s.context(p.node)
	c.PodMeta, c.PodSpec = &p.pod.ObjectMeta, &p.pod.Spec
	e := &entry.Entry{
		ParentID: p.node.parent, X509SVIDTTL: r.x509, JWTSVIDTTL: r.jwt, FederatesWith: r.federates,
		Hint: r.hint, Admin: r.admin, Downstream: r.downstream, Fallback: r.fallback,
	}
	text, err := r.id.render(c)
	if err != nil {
		return nil, err
	}
	if e.SPIFFEID, err = spiffeid.FromString(text); err != nil {
		return nil, fmt.Errorf("spiffeIDTemplate: rendered %q: %w", text, err)
	}
	if e.Selectors, err = r.renderSelectors(c); err != nil {
		return nil, err
	}
	for _, t := range r.dns {
		name, err := t.render(c)
		if err != nil {
			return nil, err
		}
		if err := entry.CheckDNSName(name); err != nil {
			return nil, fmt.Errorf("%s: rendered %q: %w", t.field, name, err)
		}
		e.DNSNames = appendNew(e.DNSNames, name)
	}
	if r.autoDNS {
		for _, name := range p.serviceNames(s.ClusterDomain) {
			e.DNSNames = appendNew(e.DNSNames, name)
		}
	}
	if err := e.Validate(s.TrustDomain); err != nil {
		return nil, err
	}
	return e, nil
}

func (r *ruleSpec) renderSelectors(c *TemplateContext) (attest.Selectors, error) {
	uid, err := attest.NewSelector("k8s", "pod-uid:"+string(c.PodMeta.UID))
	if err != nil {
		return attest.Selectors{}, err
	}
	all := []attest.Selector{uid}
	for _, t := range r.selectors {
		text, err := t.render(c)
		if err != nil {
			return attest.Selectors{}, err
		}
		sel, err := attest.ParseSelector(text)
		if err != nil {
			return attest.Selectors{}, fmt.Errorf("%s: %w", t.field, err)
		}
		all = append(all, sel)
	}
	return attest.NewSelectors(all...), nil
}

// serviceNames are the DNS names of the services in front of the pod, sorted.
func (p *podState) serviceNames(clusterDomain string) []string {
	var out []string
	ns := p.pod.Namespace
	for key := range p.services {
		if key.namespace != ns {
			continue // nobody names another namespace's pods
		}
		service := key.name
		out = append(out, service, service+"."+ns, service+"."+ns+".svc")
		if clusterDomain != "" {
			out = append(out, service+"."+ns+".svc."+clusterDomain)
		}
	}
	slices.Sort(out)
	return out
}

func appendNew(list []string, s string) []string {
	if slices.Contains(list, s) {
		return list
	}
	return append(list, s)
}

// renderStatic is the entry of a ClusterStaticEntry, without ID.
func (s *settings) renderStatic(spec *v1alpha1.ClusterStaticEntrySpec) (*entry.Entry, error) {
	e := &entry.Entry{
		DNSNames: slices.Clone(spec.DNSNames), Hint: spec.Hint, Admin: spec.Admin,
		Downstream: spec.Downstream, StoreSVID: spec.StoreSVID,
	}
	var err error
	if e.SPIFFEID, err = spiffeid.FromString(spec.SPIFFEID); err != nil {
		return nil, fmt.Errorf("spiffeID: %w", err)
	}
	if e.ParentID, err = spiffeid.FromString(spec.ParentID); err != nil {
		return nil, fmt.Errorf("parentID: %w", err)
	}
	var all []attest.Selector
	for i, text := range spec.Selectors {
		sel, err := attest.ParseSelector(text)
		if err != nil {
			return nil, fmt.Errorf("selectors[%d]: %w", i, err)
		}
		all = append(all, sel)
	}
	e.Selectors = attest.NewSelectors(all...)
	if e.FederatesWith, err = parseTrustDomains(spec.FederatesWith); err != nil {
		return nil, err
	}
	if e.X509SVIDTTL, err = parseTTL("x509SVIDTTL", spec.X509SVIDTTL); err != nil {
		return nil, err
	}
	if e.JWTSVIDTTL, err = parseTTL("jwtSVIDTTL", spec.JWTSVIDTTL); err != nil {
		return nil, err
	}
	if err := e.Validate(s.TrustDomain); err != nil {
		return nil, err
	}
	in := entry.Input{DNSNames: e.DNSNames}
	if err := in.CheckRepeated(entry.FieldDNSNames); err != nil {
		return nil, fmt.Errorf("dnsNames: a name is given twice: %w", err)
	}
	return e, nil
}
