package main

import (
	"context"
	"fmt"
	"io"
	"net/url"
	"slices"
	"strings"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"

	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/kube"
)

// clusterSPIFFEIDsPath is where the rules of registration are.
const clusterSPIFFEIDsPath = "/apis/spire.spiffe.io/v1alpha1/clusterspiffeids"

// clusterSPIFFEID is as much of the resource as it takes to say whom it
// selects.
type clusterSPIFFEID struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata"`
	Spec              struct {
		SPIFFEIDTemplate  string                `json:"spiffeIDTemplate"`
		ClassName         string                `json:"className"`
		Hint              string                `json:"hint"`
		Fallback          bool                  `json:"fallback"`
		NamespaceSelector *metav1.LabelSelector `json:"namespaceSelector"`
		PodSelector       *metav1.LabelSelector `json:"podSelector"`
	} `json:"spec"`
	Status struct {
		Conditions []metav1.Condition `json:"conditions"`
	} `json:"status"`
}

// rule is a ClusterSPIFFEID as one pod sees it.
type rule struct {
	Name     string   `json:"name"`
	Selects  bool     `json:"selects"`
	Fallback bool     `json:"fallback,omitempty"`
	Template string   `json:"template"`
	Class    string   `json:"class,omitempty"`
	Misses   []string `json:"misses,omitempty"` // what does not match
	Problem  string   `json:"problem,omitempty"`
}

// rulesFor judges every ClusterSPIFFEID. That there are none, or no such kind,
// is no error.
func rulesFor(ctx context.Context, cluster *kube.Cluster, pod *corev1.Pod) ([]rule, error) {
	all, err := kube.List[clusterSPIFFEID](ctx, cluster, clusterSPIFFEIDsPath, "", "")
	switch {
	case kube.IsAbsent(err):
		return nil, nil
	case err != nil:
		return nil, err
	}
	var namespace corev1.Namespace
	if err := cluster.Get(ctx, "/api/v1/namespaces/"+url.PathEscape(pod.Namespace), &namespace); err != nil {
		if !kube.IsForbidden(err) {
			return nil, err
		}
		namespace.Labels = nil // only its name is known for certain
	}
	if namespace.Labels == nil {
		namespace.Labels = map[string]string{}
	}
	namespace.Labels[corev1.LabelMetadataName] = pod.Namespace
	out := make([]rule, len(all))
	for i := range all {
		out[i] = judge(&all[i], namespace.Labels, pod.Labels)
	}
	// A fallback is for pods that nothing else selects.
	if i := slices.IndexFunc(out, func(r rule) bool { return r.Selects && !r.Fallback }); i >= 0 {
		for k := range out {
			if out[k].Selects && out[k].Fallback {
				out[k].Selects = false
				out[k].Misses = append(out[k].Misses, "a fallback: "+out[i].Name+" selects the pod")
			}
		}
	}
	slices.SortStableFunc(out, func(x, y rule) int {
		if x.Selects != y.Selects {
			return map[bool]int{true: -1, false: 1}[x.Selects]
		}
		return strings.Compare(x.Name, y.Name)
	})
	return out, nil
}

func judge(c *clusterSPIFFEID, namespace, pod map[string]string) rule {
	r := rule{Name: c.Name, Template: c.Spec.SPIFFEIDTemplate, Fallback: c.Spec.Fallback, Class: c.Spec.ClassName}
	for what, s := range map[string]*metav1.LabelSelector{"namespace": c.Spec.NamespaceSelector, "pod": c.Spec.PodSelector} {
		values := pod
		if what == "namespace" {
			values = namespace
		}
		missed, err := misses(what, s, values)
		if err != nil {
			r.Problem = what + "Selector: " + err.Error()
		}
		r.Misses = append(r.Misses, missed...)
	}
	slices.Sort(r.Misses)
	for _, cond := range c.Status.Conditions {
		if cond.Status == metav1.ConditionFalse && r.Problem == "" {
			r.Problem = cond.Type + " is false: " + cond.Message
		}
	}
	r.Selects = len(r.Misses) == 0 && r.Problem == ""
	return r
}

// misses are the requirements of a selector that labels do not meet, in words.
// A selector that is not there selects everything.
func misses(what string, s *metav1.LabelSelector, have map[string]string) ([]string, error) {
	if s == nil {
		return nil, nil
	}
	selector, err := metav1.LabelSelectorAsSelector(s)
	if err != nil {
		return nil, err
	}
	reqs, _ := selector.Requirements()
	var out []string
	for _, req := range reqs {
		if req.Matches(labels.Set(have)) {
			continue
		}
		value, is := have[req.Key()]
		now := "it is missing"
		if is {
			now = fmt.Sprintf("it is %q", value)
		}
		want := req.Values().List()
		var text string
		switch req.Operator() {
		case selection.Exists:
			text = "must be there"
		case selection.DoesNotExist:
			text = "must not be there"
		case selection.NotIn, selection.NotEquals:
			text = "must not be " + strings.Join(want, " or ")
		default:
			text = "must be " + strings.Join(want, " or ")
		}
		out = append(out, fmt.Sprintf("%s label %s %s: %s", what, req.Key(), text, now))
	}
	return out, nil
}

func printRules(w io.Writer, rules []rule, unknown string) error {
	switch {
	case unknown != "":
		_, err := fmt.Fprintf(w, "\nClusterSPIFFEIDs could not be read: %s\n", clean(unknown))
		return err
	case len(rules) == 0:
		return nil
	}
	fmt.Fprint(w, "\nClusterSPIFFEIDs:\n")
	t := &table{}
	t.columns("NAME", "SELECTS", "WHY NOT", "TEMPLATE")
	for _, r := range rules {
		selects := "no"
		if r.Selects {
			selects = "yes"
		}
		why := strings.Join(r.Misses, "; ")
		if r.Problem != "" {
			why = strings.TrimPrefix(why+"; "+r.Problem, "; ")
		}
		t.row(r.Name, selects, why, r.Template)
	}
	return t.write(w)
}
