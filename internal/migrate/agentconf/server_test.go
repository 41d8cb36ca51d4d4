package agentconf_test

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/spiffe-node/spiffe-node/internal/migrate/agentconf"
)

func TestReadServer(t *testing.T) {
	t.Parallel()
	want := &agentconf.Server{TrustDomain: "example.org", Clusters: map[string][]string{"prod": {"spire-system:spire-agent"}, "other": nil}}
	for name, in := range map[string]string{
		"chart": `{"server":{"trust_domain":"example.org"},"plugins":{"NodeAttestor":[{"k8s_psat":{"plugin_data":{"clusters":[
			{"prod":{"audience":[],"service_account_allow_list":["spire-system:spire-agent"]}},{"other":{}}]}}}]}}`,
		"hand": `server { trust_domain = "example.org" }
plugins { NodeAttestor "k8s_psat" { plugin_data { clusters = { "prod" = { service_account_allow_list = ["spire-system:spire-agent"] }, "other" = {} } } } }`,
	} {
		got, err := agentconf.ReadServer([]byte(in))
		if err != nil {
			t.Fatal(name, err)
		}
		if d := cmp.Diff(want, got); d != "" {
			t.Errorf("%s: %s", name, d)
		}
	}
	if _, err := agentconf.ReadServer([]byte("server {")); err == nil {
		t.Error("half a file was read")
	}
}

func FuzzReadServer(f *testing.F) {
	f.Add([]byte(`{"plugins":{"NodeAttestor":[{"k8s_psat":{"plugin_data":{"clusters":[{"a":{"service_account_allow_list":["b"]}}]}}}]}}`))
	f.Add([]byte("server {}\nplugins { NodeAttestor \"k8s_psat\" { plugin_data { clusters = 1 } } }"))
	f.Fuzz(func(t *testing.T, data []byte) {
		if s, err := agentconf.ReadServer(data); (err == nil) != (s != nil) {
			t.Errorf("%v, %v", s, err)
		}
	})
}
