package registration

import (
	"errors"
	"fmt"
	"strings"
	"text/template"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TemplateContext is what templates see. Parent templates see no pod.
type TemplateContext struct {
	TrustDomain   string
	ClusterName   string
	ClusterDomain string
	PodMeta       *metav1.ObjectMeta
	PodSpec       *corev1.PodSpec
	NodeMeta      *metav1.ObjectMeta
	NodeSpec      *corev1.NodeSpec
}

// maxRendered bounds what one template may give, in bytes. A SPIFFE ID has at
// most 2048.
const maxRendered = 4096

// noValue is what text/template prints for a missing key of a map.
const noValue = "<no value>"

var (
	errEmptyTemplate = errors.New("is empty")
	errNoValue       = errors.New("a label, annotation or other key it uses is missing")
	errTooLong       = fmt.Errorf("gives more than %d bytes", maxRendered)
)

// textTemplate is a parsed template of one field. Safe for concurrent use.
type textTemplate struct {
	field string
	t     *template.Template
}

func parseTemplate(field, text string) (*textTemplate, error) {
	if text == "" {
		return nil, fmt.Errorf("%s: %w", field, errEmptyTemplate)
	}
	t, err := template.New(field).Funcs(templateFuncs()).Parse(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", field, err)
	}
	tt := &textTemplate{field: field, t: t}
	if err := tt.checkNames(); err != nil {
		return nil, err
	}
	return tt, nil
}

// render executes the template. A missing key anywhere in the output is an
// error: an identity must not depend on what is not there.
func (t *textTemplate) render(c *TemplateContext) (string, error) {
	var out limitedText
	if err := t.t.Execute(&out, c); err != nil {
		return "", fmt.Errorf("%s: %w", t.field, err)
	}
	s := out.b.String()
	if strings.Contains(s, noValue) {
		return "", fmt.Errorf("%s: %w (rendered %q)", t.field, errNoValue, s)
	}
	return s, nil
}

// checkNames finds fields that no object has: such a template can never be
// rendered, whatever the pod. Other errors may come from the example.
func (t *textTemplate) checkNames() error {
	err := t.t.Execute(&limitedText{}, exampleContext())
	if execErr := (template.ExecError{}); errors.As(err, &execErr) && strings.Contains(err.Error(), "can't evaluate field") {
		return fmt.Errorf("%s: %w", t.field, err)
	}
	return nil
}

// exampleContext is a pod with something in each list that templates index.
func exampleContext() *TemplateContext {
	meta := func(name string) *metav1.ObjectMeta {
		return &metav1.ObjectMeta{
			Name: name, Namespace: "example", UID: "00000000-0000-0000-0000-000000000000",
			Labels: map[string]string{"app": name}, Annotations: map[string]string{"example": name},
			OwnerReferences: []metav1.OwnerReference{{APIVersion: "apps/v1", Kind: "ReplicaSet", Name: name}},
		}
	}
	return &TemplateContext{
		TrustDomain: "example.org", ClusterName: "example", ClusterDomain: "cluster.local",
		PodMeta: meta("pod"),
		PodSpec: &corev1.PodSpec{
			NodeName: "node", ServiceAccountName: "default",
			Containers: []corev1.Container{{Name: "main", Image: "example"}},
			Volumes:    []corev1.Volume{{Name: "volume"}},
		},
		NodeMeta: meta("node"),
		NodeSpec: &corev1.NodeSpec{ProviderID: "example:///node", PodCIDRs: []string{"10.0.0.0/24"}},
	}
}

// limitedText is a text of at most maxRendered bytes.
type limitedText struct{ b strings.Builder }

// Write implements io.Writer.
func (l *limitedText) Write(p []byte) (int, error) {
	if l.b.Len()+len(p) > maxRendered {
		return 0, errTooLong
	}
	return l.b.Write(p)
}

// DefaultParentTemplate is the ID of a node's agent under k8s_psat.
const DefaultParentTemplate = "spiffe://{{ .TrustDomain }}/spire/agent/k8s_psat/{{ .ClusterName }}/{{ .NodeMeta.UID }}"

func parseParentTemplate(text string) (*textTemplate, error) {
	t, err := template.New("parentIDTemplate").Funcs(templateFuncs()).Parse(text)
	if err != nil {
		return nil, fmt.Errorf("parentIDTemplate: %w", err)
	}
	c := exampleContext()
	c.PodMeta, c.PodSpec = nil, nil
	tt := &textTemplate{field: "parentIDTemplate", t: t}
	s, err := tt.render(c)
	switch {
	case errors.Is(err, errNoValue):
		return tt, nil // real nodes may have the label
	case err != nil:
		return nil, err
	}
	if _, err := spiffeid.FromString(s); err != nil {
		return nil, fmt.Errorf("parentIDTemplate: rendered %q: %w", s, err)
	}
	return tt, nil
}
