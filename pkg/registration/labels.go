package registration

import (
	"k8s.io/apimachinery/pkg/labels"
	"k8s.io/apimachinery/pkg/selection"
)

// labelIndex finds pods by label, for the keys that rules have asked for: a
// rule that changes then meets the pods it may select and not all there are.
type labelIndex map[string]map[string]map[*podState]bool // key -> value -> pods

func (i labelIndex) add(p *podState, set map[string]string) {
	for key, values := range i {
		if value, ok := set[key]; ok {
			if values[value] == nil {
				values[value] = make(map[*podState]bool)
			}
			values[value][p] = true
		}
	}
}

func (i labelIndex) remove(p *podState, set map[string]string) {
	for key, values := range i {
		value, ok := set[key]
		if !ok {
			continue
		}
		delete(values[value], p)
		if len(values[value]) == 0 {
			delete(values, value)
		}
	}
}

// use begins to index a key.
func (i labelIndex) use(key string, pods map[string]*podState) {
	if i[key] != nil {
		return
	}
	i[key] = make(map[string]map[*podState]bool)
	one := labelIndex{key: i[key]}
	for _, p := range pods {
		one.add(p, p.pod.Labels)
	}
}

// equalLabel is a label that every pod of a selector has, with the values it may
// have.
func equalLabel(s labels.Selector) (key string, values []string, ok bool) {
	requirements, _ := s.Requirements()
	for _, r := range requirements {
		switch r.Operator() {
		case selection.Equals, selection.DoubleEquals, selection.In:
			return r.Key(), r.Values().UnsortedList(), true
		}
	}
	return "", nil, false
}

// candidates are pods among which are all that a rule selects.
func (x *engine) candidates(r *rule) map[*podState]bool {
	out := make(map[*podState]bool, len(r.pods))
	for p := range r.pods {
		out[p] = true
	}
	if key, values, ok := equalLabel(r.spec.pods); ok {
		x.byLabel.use(key, x.pods)
		for _, value := range values {
			for p := range x.byLabel[key][value] {
				if r.namespaces[p.ns] {
					out[p] = true
				}
			}
		}
		return out
	}
	for ns := range r.namespaces {
		for p := range ns.pods {
			out[p] = true
		}
	}
	return out
}
