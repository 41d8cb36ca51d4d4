package agentconf_test

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/spiffe-node/spiffe-node/internal/config"
	"github.com/spiffe-node/spiffe-node/internal/migrate/agentconf"
)

// reference is every key of SPIRE Agent with a value.
func reference(tb testing.TB) map[string]any {
	tb.Helper()
	data, err := os.ReadFile("testdata/keys.txt")
	if err != nil {
		tb.Fatal(err)
	}
	out := map[string]any{}
	for line := range strings.Lines(string(data)) {
		if strings.HasPrefix(line, "#") {
			continue
		}
		key, text, _ := strings.Cut(strings.TrimSpace(line), " ")
		var value any
		if err := json.Unmarshal([]byte(text), &value); err != nil {
			tb.Fatalf("%s: %v", key, err)
		}
		out[key] = value
	}
	return out
}

// file is a configuration with one key.
func file(key string, value any) []byte {
	parts := strings.Split(key, ".")
	for _, part := range slices.Backward(parts) {
		value = map[string]any{part: value}
	}
	data, err := json.MarshalIndent(value, "", "  ")
	if err != nil {
		panic(err)
	}
	return data
}

func TestEveryKeyIsAccountedFor(t *testing.T) {
	t.Parallel()
	all := reference(t)
	if len(all) < 120 {
		t.Fatalf("%d keys in the reference", len(all))
	}
	ours := config.Keys()
	for key, value := range all {
		r, err := agentconf.Translate(file(key, value), agentconf.Options{})
		if err != nil {
			t.Errorf("%s: %v", key, err)
			continue
		}
		accounted := false
		for _, i := range r.Items {
			if i.Line == 0 {
				continue // what SPIRE Agent does without being told
			}
			accounted = accounted || strings.HasPrefix(key, i.Key) || strings.HasPrefix(i.Key, key)
			if i.Outcome == agentconf.Unknown {
				t.Errorf("%s: %s is unknown: %s", key, i.Key, i.Text)
			}
			if i.Outcome != agentconf.Translated && i.Text == "" || i.Outcome == agentconf.Translated && i.To == "" {
				t.Errorf("%s: the account says nothing: %+v", key, i)
			}
			for to := range strings.SplitSeq(i.To, ", ") {
				if to != "" && !slices.Contains(ours, to) {
					t.Errorf("%s becomes %s, which is no key of the sds-agent", key, to)
				}
			}
		}
		if !accounted {
			t.Errorf("%s is not accounted for: %+v", key, r.Items)
		}
	}
}

// A rule whose key is in no reference is one that was mistyped.
func TestEveryRuleIsInTheReference(t *testing.T) {
	t.Parallel()
	var all []string
	for key := range reference(t) {
		all = append(all, strings.ToLower(key))
	}
	for _, rule := range agentconf.RuleKeys() {
		if !slices.ContainsFunc(all, func(key string) bool { return key == rule || strings.HasPrefix(key, rule+".") }) {
			t.Errorf("rule %s is for a key that is not in testdata/keys.txt", rule)
		}
	}
}

// What was translated takes effect: a key's value is in the sds-agent's file.
func TestTranslatedKeysAreWritten(t *testing.T) {
	t.Parallel()
	for key, want := range map[string]string{
		"agent.trust_domain":                                                    "trustDomain: example.org",
		"agent.allow_unauthenticated_verifiers":                                 "allowUnauthenticatedVerifiers: true",
		"agent.allowed_foreign_jwt_claims":                                      "- email",
		"agent.disable_sds_api":                                                 "sds:\n  disabled: true",
		"agent.disable_workload_api":                                            "workloadAPI:\n  disabled: true",
		"agent.experimental.sync_interval":                                      "syncInterval: 10s",
		"agent.insecure_bootstrap":                                              "insecure: true",
		"agent.join_token":                                                      "joinTokenFile: /etc/spiffe-node/join-token",
		"agent.join_token_file":                                                 "joinTokenFile: /token",
		"agent.jwt_svid_cache_max_size":                                         "maxJWTSVIDs: 5",
		"agent.x509_svid_cache_max_size":                                        "maxX509SVIDs: 5",
		"agent.log_level":                                                       "level: debug",
		"agent.profiling_enabled":                                               "profiling: true",
		"agent.sds.default_bundle_name":                                         `defaultBundleName: "null"`,
		"agent.sds.default_all_bundles_name":                                    "defaultAllBundlesName: ROOTCA",
		"agent.availability_target":                                             "availabilityTarget: 48h0m0s",
		"agent.experimental.require_pq_kem":                                     "requirePQKEM: true",
		"agent.rebootstrap_mode":                                                "mode: always",
		"agent.rebootstrap_delay":                                               "delay: 10m0s",
		"agent.trust_bundle_unix_socket":                                        "unixSocket: /web.sock",
		"agent.trust_bundle_spiffe_workload_api":                                "workloadAPISocket: /run/upstream.sock",
		"plugins.NodeAttestor.x509pop.plugin_data.certificate_path":             "certificatePath: /c",
		"plugins.NodeAttestor.x509pop.plugin_data.intermediates_path":           "intermediatesPath: /i",
		"plugins.NodeAttestor.x509pop.plugin_data.private_key_path":             "privateKeyPath: /k",
		"plugins.NodeAttestor.x509pop.plugin_data.spiffe_endpoint_socket":       "workloadAPISocket: /s",
		"agent.trust_bundle_path":                                               "path: /run/spire/bundle/bundle.spiffe",
		"agent.workload_x509_svid_key_type":                                     "x509SVIDKeyType: ec-p384",
		"agent.socket_path":                                                     "directory: /run/spire/agent-sockets\n  name: socket\n  alternateNames:\n    - spire-agent.sock\n    - api.sock",
		"plugins.NodeAttestor.k8s_psat.plugin_data.cluster":                     "cluster: prod",
		"plugins.NodeAttestor.join_token.plugin_data":                           "type: join_token",
		"plugins.WorkloadAttestor.k8s.plugin_data.node_name":                    "name: n1",
		"plugins.WorkloadAttestor.k8s.plugin_data.enable_namespace_labels":      "namespaceLabels: true",
		"plugins.WorkloadAttestor.unix.plugin_data.discover_workload_path":      "discoverWorkloadPath: true",
		"plugins.WorkloadAttestor.unix.plugin_data.workload_size_limit":         "workloadSizeLimit: 1000",
		"plugins.WorkloadAttestor.k8s.plugin_data.use_anonymous_authentication": "mode: kubernetes",
		"health_checks.listener_enabled":                                        "address: localhost:80",
		"telemetry.Prometheus.port":                                             "address: localhost:9988",
	} {
		r, err := agentconf.Translate(file(key, reference(t)[key]), agentconf.Options{})
		if err != nil || !strings.Contains(string(r.YAML), want) {
			t.Errorf("%s: %v\n%s\nlacks %s", key, err, r.YAML, want)
		}
	}
}

func TestNoSecretIsRepeated(t *testing.T) {
	t.Parallel()
	for key, value := range reference(t) {
		r, err := agentconf.Translate(file(key, value), agentconf.Options{})
		if err != nil {
			t.Fatal(err)
		}
		account, err := json.Marshal(r.Items)
		if err != nil {
			t.Fatal(err)
		}
		if strings.Contains(string(account)+string(r.YAML), "very-secret") {
			t.Errorf("%s: its value is in the result", key)
		}
	}
}

// The files of testdata are a chart's and a hand-written one; beside each is
// what it becomes.
func TestFiles(t *testing.T) {
	t.Parallel()
	files, err := filepath.Glob("testdata/*.conf")
	if err != nil || len(files) < 3 {
		t.Fatal(files, err)
	}
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		r, err := agentconf.Translate(data, agentconf.Options{Getenv: func(name string) (string, bool) {
			return map[string]string{"TRUST_DOMAIN": "example.org", "ADDRESS": "spire.example.org"}[name], name != "MISSING"
		}})
		if err != nil {
			t.Errorf("%s: %v", name, err)
			continue
		}
		var out strings.Builder
		out.Write(r.YAML)
		if r.Refused != nil {
			out.WriteString("# refused: " + r.Refused.Error() + "\n")
		}
		for _, v := range r.Unset {
			out.WriteString("# unset: " + v + "\n")
		}
		for _, i := range r.Items {
			line, err := json.Marshal(i)
			if err != nil {
				t.Fatal(err)
			}
			out.WriteString("# " + string(line) + "\n")
		}
		golden := strings.TrimSuffix(name, ".conf") + ".yaml"
		if os.Getenv("UPDATE_GOLDEN") != "" {
			if err := os.WriteFile(golden, []byte(out.String()), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if d := cmp.Diff(string(want), out.String()); d != "" {
			t.Errorf("%s (UPDATE_GOLDEN=1 writes it):\n%s", name, d)
		}
	}
}

func TestUnreadable(t *testing.T) {
	t.Parallel()
	for in, want := range map[string]string{
		"agent {":                         "object expected closing RBRACE",
		`{"agent":`:                       "line 1: not JSON",
		"{\n\"agent\": {} }\n x":          "line 3: not JSON",
		"{\"a\":1} {\"b\":2}":             "more follows after the object",
		strings.Repeat("a = [", 100):      "nested deeper than 64",
		`{"a":` + strings.Repeat("[", 99): "nested deeper than 64",
		strings.Repeat("#", 1<<20+1):      "longer than 1048576 bytes",
	} {
		if _, err := agentconf.Translate([]byte(in), agentconf.Options{}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.20s: got %v, want %s", in, err, want)
		}
	}
}

func FuzzTranslate(f *testing.F) {
	files, _ := filepath.Glob("testdata/*.conf")
	for _, name := range files {
		if data, err := os.ReadFile(name); err == nil {
			f.Add(data)
		}
	}
	for key, value := range reference(f) {
		f.Add(file(key, value))
	}
	f.Add([]byte("plugins { NodeAttestor \"a\" \"b\" { plugin_data = 1 } }"))
	f.Add([]byte("agent = [1, {a = 1}]\nplugins = [[{}], \"x\"]"))
	f.Add([]byte(`{"":{}}`))
	f.Add([]byte("a = <<E\nx\nE\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := agentconf.Translate(data, agentconf.Options{})
		if err != nil {
			return
		}
		// What the parser takes must say what it is.
		if r.Refused == nil && !strings.Contains(string(r.YAML), "trustDomain:") {
			t.Errorf("taken without a trust domain: %s", r.YAML)
		}
		for _, i := range r.Items {
			if i.Key == "" || i.Outcome == "" {
				t.Errorf("empty account: %+v", i)
			}
		}
	})
}
