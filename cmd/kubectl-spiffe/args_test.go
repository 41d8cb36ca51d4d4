package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func testRoot() *app { return &app{output: formatPretty} }

func TestNormalizeArgs(t *testing.T) {
	for name, tc := range map[string]struct{ in, want string }{
		"one dash":               {"entry create -spiffeID spiffe://td/a", "entry create --spiffeID=spiffe://td/a"},
		"two dashes":             {"entry create --spiffeID spiffe://td/a", "entry create --spiffeID=spiffe://td/a"},
		"equals":                 {"entry create -spiffeID=spiffe://td/a", "entry create --spiffeID=spiffe://td/a"},
		"equals in the value":    {"entry create -hint=a=b", "entry create --hint=a=b"},
		"bool":                   {"entry create -node -admin=false", "entry create --node --admin=false"},
		"bool takes no value":    {"entry create -node x", "entry create --node x"},
		"value with a dash":      {"entry create -x509SVIDTTL -1 -hint -node", "entry create --x509SVIDTTL=-1 --hint=-node"},
		"flag before command":    {"-output json entry show", "--output=json entry show"},
		"flag between":           {"entry -socketPath /s show", "entry --socketPath=/s show"},
		"letter":                 {"entry show -o json", "entry show --output=json"},
		"letter, joined":         {"entry show -ojson", "entry show -ojson"},
		"letter, equals":         {"entry show -o=json", "entry show --output=json"},
		"help":                   {"entry create -help", "entry create --help"},
		"help, letter":           {"entry create -h", "entry create --help"},
		"value that is no flag":  {"entry show -selector -", "entry show --selector=-"},
		"lone dash":              {"entry create -", "entry create -"},
		"unknown":                {"entry create -foo bar", "entry create --foo bar"},
		"flag of another":        {"entry show -node", "entry show --node"},
		"after two dashes":       {"entry create -- -node", "entry create -- -node"},
		"value missing":          {"entry create -spiffeID", "entry create --spiffeID"},
		"command name as value":  {"entry -socketPath show count -hint h", "entry --socketPath=show count --hint=h"},
		"empty":                  {"", ""},
		"case matters":           {"entry create -SpiffeID x", "entry create --SpiffeID x"},
		"three dashes":           {"entry create ---node", "entry create ---node"},
		"completion's own flags": {"completion bash --no-descriptions", "completion bash --no-descriptions"},
	} {
		t.Run(name, func(t *testing.T) {
			got := normalizeArgs(testRoot().rootCommand(), strings.Fields(tc.in))
			if diff := cmp.Diff(strings.Fields(tc.want), got, cmp.Transformer("nil", func(s []string) []string { return append([]string{}, s...) })); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// What is normal stays as it is, nothing panics, and no argument behind -- is
// touched.
func FuzzNormalizeArgs(f *testing.F) {
	for _, s := range []string{
		"entry create -spiffeID a -node", "-o json", "entry\nshow\n-ojson", "--\n-x", "-", "--", "---", "---o", "-=", "--=x", "-o", "-ö",
		"entry show -selector a:b -selector -c", "x509 mint -ttl 1h -dns=a", "explain -pid 1", "\x00", "-\x00=",
	} {
		f.Add(strings.ReplaceAll(s, " ", "\n"))
	}
	f.Fuzz(func(t *testing.T, s string) {
		in := strings.Split(s, "\n")
		once := normalizeArgs(testRoot().rootCommand(), in)
		twice := normalizeArgs(testRoot().rootCommand(), once)
		if diff := cmp.Diff(once, twice); diff != "" {
			t.Errorf("not stable for %q:\n%s", in, diff)
		}
		if len(once) > len(in) {
			t.Errorf("%q grew to %q", in, once)
		}
	})
}
