package registration

import (
	"errors"
	"fmt"
	"math"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"

	"github.com/spiffe-node/spiffe-node/pkg/entry"
	"github.com/spiffe-node/spiffe-node/pkg/registration/api/v1alpha1"
)

// ruleSpec is a compiled ClusterSPIFFEIDSpec. Immutable.
type ruleSpec struct {
	id         *textTemplate
	dns        []*textTemplate
	selectors  []*textTemplate
	x509, jwt  time.Duration
	federates  []spiffeid.TrustDomain
	namespaces labels.Selector
	pods       labels.Selector
	admin      bool
	downstream bool
	autoDNS    bool
	fallback   bool
	hint       string
}

func compileRule(spec *v1alpha1.ClusterSPIFFEIDSpec) (*ruleSpec, error) {
	r := &ruleSpec{
		admin: spec.Admin, downstream: spec.Downstream, autoDNS: spec.AutoPopulateDNSNames,
		fallback: spec.Fallback, hint: spec.Hint,
	}
	var errs []error
	fail := func(err error) {
		if err != nil {
			errs = append(errs, err)
		}
	}
	var err error
	r.id, err = parseTemplate("spiffeIDTemplate", spec.SPIFFEIDTemplate)
	fail(err)
	r.dns, err = parseTemplates("dnsNameTemplates", spec.DNSNameTemplates)
	fail(err)
	r.selectors, err = parseTemplates("workloadSelectorTemplates", spec.WorkloadSelectorTemplates)
	fail(err)
	r.x509, err = parseTTL("ttl", spec.TTL)
	fail(err)
	r.jwt, err = parseTTL("jwtTtl", spec.JWTTTL)
	fail(err)
	r.federates, err = parseTrustDomains(spec.FederatesWith)
	fail(err)
	r.namespaces, err = parseLabelSelector("namespaceSelector", spec.NamespaceSelector)
	fail(err)
	r.pods, err = parseLabelSelector("podSelector", spec.PodSelector)
	fail(err)
	if len(spec.Hint) > entry.MaxHint {
		fail(fmt.Errorf("hint: is longer than %d bytes", entry.MaxHint))
	}
	if err := errors.Join(errs...); err != nil {
		return nil, err
	}
	return r, nil
}

func parseTemplates(field string, texts []string) ([]*textTemplate, error) {
	var out []*textTemplate
	var errs []error
	for i, text := range texts {
		t, err := parseTemplate(fmt.Sprintf("%s[%d]", field, i), text)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		out = append(out, t)
	}
	return out, errors.Join(errs...)
}

var (
	errNegativeTTL = errors.New("is negative")
	errLongTTL     = errors.New("is too long")
)

// parseTTL reads a duration as whole seconds; what is less is dropped.
func parseTTL(field, text string) (time.Duration, error) {
	if text == "" {
		return 0, nil
	}
	d, err := time.ParseDuration(text)
	switch {
	case err != nil:
		return 0, fmt.Errorf("%s: %w", field, err)
	case d < 0:
		return 0, fmt.Errorf("%s: %s %w", field, text, errNegativeTTL)
	case d/time.Second > math.MaxInt32:
		return 0, fmt.Errorf("%s: %s %w", field, text, errLongTTL)
	}
	return d.Truncate(time.Second), nil
}

func parseTrustDomains(names []string) ([]spiffeid.TrustDomain, error) {
	var out []spiffeid.TrustDomain
	seen := make(map[spiffeid.TrustDomain]bool)
	for i, name := range names {
		td, err := spiffeid.TrustDomainFromString(name)
		if err != nil {
			return nil, fmt.Errorf("federatesWith[%d]: %q: %w", i, name, err)
		}
		if !seen[td] {
			seen[td] = true
			out = append(out, td)
		}
	}
	return out, nil
}

func parseLabelSelector(field string, s *metav1.LabelSelector) (labels.Selector, error) {
	if s == nil {
		return labels.Everything(), nil
	}
	out, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	return out, nil
}

// rule is a ClusterSPIFFEID: its compiled specification and where it matches.
type rule struct {
	*source
	spec *ruleSpec // nil = never was a valid one
	// namespaces selected, ignored ones included.
	namespaces map[*nsState]bool
	ignored    int
	// pods selected in namespaces that are not ignored.
	pods map[*podState]*match
	// renderErrors are those of the pods selected.
	renderErrors map[*podState]error
	// foreign counts selected pods with entries that somebody else wrote.
	foreign int
}

func (r *rule) fallback() bool { return r.spec != nil && r.spec.fallback }

// oneLine is an error as a status message: joined errors on one line, bounded.
func oneLine(err error) string {
	const longest = 1024
	s := strings.Join(strings.Fields(strings.ReplaceAll(err.Error(), "\n", "; ")), " ")
	if len(s) > longest {
		s = strings.ToValidUTF8(s[:longest], "") + "..."
	}
	return s
}
