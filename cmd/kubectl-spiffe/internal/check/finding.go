package check

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
)

// Severity says how bad a finding is.
type Severity string

// The severities, worst first.
const (
	Error   Severity = "error"   // some pod gets no identity, or the wrong peers refuse it
	Warning Severity = "warning" // works today, or cannot be told from here
	Note    Severity = "note"    // could be simpler, or was not checked
)

// Finding is one thing that is wrong.
type Finding struct {
	Severity Severity `json:"severity"`
	// Rule is a stable short name.
	Rule string `json:"rule"`
	// Where is the object, as Kind namespace/name.
	Where string `json:"where"`
	// Source is file:line, empty for objects of a cluster.
	Source string `json:"source,omitempty"`
	// What is wrong, and Fix how to mend it: one sentence each.
	What string `json:"what"`
	Fix  string `json:"fix"`
}

// report collects findings.
type report struct{ findings []Finding }

func (r *report) add(s Severity, rule string, o *Object, fix, what string, args ...any) {
	f := Finding{Severity: s, Rule: rule, What: fmt.Sprintf(what, args...), Fix: fix}
	if o != nil {
		f.Where, f.Source = o.String(), o.Source
	}
	r.findings = append(r.findings, f)
}

// sorted is worst first, each once.
func (r *report) sorted() []Finding {
	rank := map[Severity]int{Error: 0, Warning: 1, Note: 2}
	slices.SortStableFunc(r.findings, func(a, b Finding) int {
		return cmp.Or(cmp.Compare(rank[a.Severity], rank[b.Severity]), strings.Compare(a.Rule, b.Rule), strings.Compare(a.Where, b.Where), strings.Compare(a.What, b.What))
	})
	return slices.Compact(r.findings)
}
