package attest_test

import (
	"encoding/json"
	"errors"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/spiffe-node/spiffe-node/pkg/attest"
)

func TestParseSelector(t *testing.T) {
	t.Parallel()
	s, err := attest.ParseSelector("k8s:pod-label:app:web")
	if err != nil || s.Type() != "k8s" || s.Value() != "pod-label:app:web" || s.String() != "k8s:pod-label:app:web" || s.IsZero() {
		t.Errorf("ParseSelector = %v, %v", s, err)
	}
	for in, want := range map[string]error{
		"":      attest.ErrSelectorFormat,
		"unix":  attest.ErrSelectorFormat,
		":x":    attest.ErrSelectorTypeMissing,
		"unix:": attest.ErrSelectorValueMissing,
	} {
		if s, err := attest.ParseSelector(in); !errors.Is(err, want) || !s.IsZero() {
			t.Errorf("ParseSelector(%q) = %v, %v; want %v", in, s, err, want)
		}
	}
	if _, err := attest.NewSelector("a:b", "c"); !errors.Is(err, attest.ErrSelectorTypeColon) {
		t.Errorf("colon in the type: %v", err)
	}
}

func TestSelectorText(t *testing.T) {
	t.Parallel()
	in := []attest.Selector{attest.MustSelector("unix:uid:0"), {}}
	text, err := json.Marshal(in[:1])
	if err != nil || string(text) != `["unix:uid:0"]` {
		t.Errorf("Marshal = %s, %v", text, err)
	}
	var out []attest.Selector
	if err := json.Unmarshal([]byte(`["unix:uid:0",""]`), &out); err != nil || !cmp.Equal(in, out, cmp.Comparer(func(a, b attest.Selector) bool { return a == b })) {
		t.Errorf("Unmarshal = %v, %v", out, err)
	}
	if err := json.Unmarshal([]byte(`["unix"]`), &out); err == nil {
		t.Error("a bad selector was read")
	}
}

func TestSelectors(t *testing.T) {
	t.Parallel()
	set := attest.MustSelectors("unix:uid:1", "k8s:ns:b", "unix:uid:1", "k8s:ns:a")
	if d := cmp.Diff([]string{"k8s:ns:a", "k8s:ns:b", "unix:uid:1"}, set.Strings()); d != "" {
		t.Error(d)
	}
	var none attest.Selectors
	for _, tc := range []struct {
		sub  attest.Selectors
		want bool
	}{
		{none, true},
		{set, true},
		{attest.MustSelectors("k8s:ns:b"), true},
		{attest.MustSelectors("k8s:ns:a", "unix:uid:1"), true},
		{attest.MustSelectors("k8s:ns:a", "unix:uid:2"), false},
		{attest.MustSelectors("a:a"), false},
		{attest.MustSelectors("z:z"), false},
		{set.Union(attest.MustSelectors("z:z")), false},
	} {
		if got := tc.sub.SubsetOf(set); got != tc.want {
			t.Errorf("%v subset of %v: %v", tc.sub.Strings(), set.Strings(), got)
		}
	}
	if !set.Contains(set.At(1)) || set.Contains(attest.MustSelector("k8s:ns:c")) || set.Len() != 3 {
		t.Error("Contains")
	}
	if !none.Union(set).Equal(set) || !set.Union(none).Equal(set) || set.Equal(none) {
		t.Error("Union, Equal")
	}
	if set.Key() == attest.MustSelectors("k8s:ns:a", "k8s:ns:b").Key() || set.Key() != set.Union(set).Key() {
		t.Error("Key")
	}
}

func FuzzParseSelector(f *testing.F) {
	f.Add("unix:uid:0")
	f.Add("k8s:pod-label:a:b")
	f.Add(":")
	f.Fuzz(func(t *testing.T, in string) {
		s, err := attest.ParseSelector(in)
		if err == nil && s.String() != in || (err != nil) != s.IsZero() {
			t.Errorf("ParseSelector(%q) = %q, %v", in, s, err)
		}
	})
}
