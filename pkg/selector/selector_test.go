package selector_test

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/spiffe-node/spiffe-node/pkg/selector"
)

func TestParse(t *testing.T) {
	t.Parallel()
	s, err := selector.Parse("k8s:pod-label:app:web")
	if err != nil || s.Type() != "k8s" || s.Value() != "pod-label:app:web" || s.String() != "k8s:pod-label:app:web" || s.IsZero() {
		t.Errorf("Parse = %v, %v", s, err)
	}
	for in, want := range map[string]error{
		"":      selector.ErrFormat,
		"unix":  selector.ErrFormat,
		":x":    selector.ErrTypeMissing,
		"unix:": selector.ErrValueMissing,
	} {
		if s, err := selector.Parse(in); !errors.Is(err, want) || !s.IsZero() {
			t.Errorf("Parse(%q) = %v, %v; want %v", in, s, err, want)
		}
	}
	if _, err := selector.New("a:b", "c"); !errors.Is(err, selector.ErrTypeColon) {
		t.Errorf("colon in the type: %v", err)
	}
}

func TestText(t *testing.T) {
	t.Parallel()
	in := []selector.Selector{selector.Must("unix:uid:0"), {}}
	text, err := json.Marshal(in[:1])
	if err != nil || string(text) != `["unix:uid:0"]` {
		t.Errorf("Marshal = %s, %v", text, err)
	}
	var out []selector.Selector
	if err := json.Unmarshal([]byte(`["unix:uid:0",""]`), &out); err != nil || !cmp.Equal(in, out, cmp.Comparer(func(a, b selector.Selector) bool { return a == b })) {
		t.Errorf("Unmarshal = %v, %v", out, err)
	}
	if err := json.Unmarshal([]byte(`["unix"]`), &out); err == nil {
		t.Error("a bad selector was read")
	}
}

func TestSet(t *testing.T) {
	t.Parallel()
	set := selector.MustSet("unix:uid:1", "k8s:ns:b", "unix:uid:1", "k8s:ns:a")
	if d := cmp.Diff([]string{"k8s:ns:a", "k8s:ns:b", "unix:uid:1"}, set.Strings()); d != "" {
		t.Error(d)
	}
	var none selector.Set
	for _, tc := range []struct {
		sub  selector.Set
		want bool
	}{
		{none, true},
		{set, true},
		{selector.MustSet("k8s:ns:b"), true},
		{selector.MustSet("k8s:ns:a", "unix:uid:1"), true},
		{selector.MustSet("k8s:ns:a", "unix:uid:2"), false},
		{selector.MustSet("a:a"), false},
		{selector.MustSet("z:z"), false},
		{set.Union(selector.MustSet("z:z")), false},
	} {
		if got := tc.sub.SubsetOf(set); got != tc.want {
			t.Errorf("%v subset of %v: %v", tc.sub.Strings(), set.Strings(), got)
		}
	}
	if !set.Contains(set.At(1)) || set.Contains(selector.Must("k8s:ns:c")) || set.Len() != 3 {
		t.Error("Contains")
	}
	if !none.Union(set).Equal(set) || !set.Union(none).Equal(set) || set.Equal(none) {
		t.Error("Union, Equal")
	}
	if set.Key() == selector.MustSet("k8s:ns:a", "k8s:ns:b").Key() || set.Key() != set.Union(set).Key() {
		t.Error("Key")
	}
}

func FuzzParse(f *testing.F) {
	f.Add("unix:uid:0")
	f.Add("k8s:pod-label:a:b")
	f.Add(":")
	f.Fuzz(func(t *testing.T, in string) {
		s, err := selector.Parse(in)
		if err == nil && s.String() != in || (err != nil) != s.IsZero() {
			t.Errorf("Parse(%q) = %q, %v", in, s, err)
		}
	})
}

func TestOfPod(t *testing.T) {
	t.Parallel()
	got := selector.NewSet(selector.OfPod("u", "ns1", "", "web", "n1")...).Strings()
	if d := cmp.Diff([]string{"k8s:node-name:n1", "k8s:ns:ns1", "k8s:pod-name:web", "k8s:pod-uid:u"}, got); d != "" {
		t.Error(d)
	}
}
