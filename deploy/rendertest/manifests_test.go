package rendertest_test

import (
	"flag"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write deploy/manifests instead of comparing them")

// manifests are the plain manifests and the values they are rendered from.
var manifests = map[string][]string{
	"spiffe-node.yaml":          variants["default"],
	"spiffe-node-one-node.yaml": variants["one node"],
}

const manifestHead = `# Rendered from deploy/helm/spiffe-node by make manifests; do not edit.
# The trust domain is example.org and the cluster example-cluster: replace both
# before you apply it. The CRDs (crds.yaml) come first.
apiVersion: v1
kind: Namespace
metadata:
  name: spire-server
  labels:
    # The DaemonSet has a privileged container; docs/kubernetes.md says why.
    pod-security.kubernetes.io/enforce: privileged
`

// TestManifests keeps deploy/manifests equal to the chart.
func TestManifests(t *testing.T) {
	for file, sets := range manifests {
		r := render(t, sets...)
		var b strings.Builder
		b.WriteString(manifestHead)
		for _, o := range r.files.sorted() {
			for doc := range strings.SplitSeq("\n"+o, "\n---\n") {
				if strings.TrimSpace(strings.ReplaceAll(doc, "---", "")) == "" {
					continue
				}
				b.WriteString("---\n" + strings.TrimSpace(doc) + "\n")
			}
		}
		text := strings.ReplaceAll(b.String(), "app.kubernetes.io/managed-by: Helm", "app.kubernetes.io/managed-by: kubectl")
		current(t, filepath.Join("../manifests", file), text)
	}
}

// TestManifestsCRDs renders the chart of the CRDs, which go first.
func TestManifestsCRDs(t *testing.T) {
	r, err := renderChart("../helm/spiffe-node-crds", map[string]any{})
	if err != nil {
		t.Fatal(err)
	}
	if n := len(r.kind("CustomResourceDefinition")); n != 3 {
		t.Errorf("%d CRDs", n)
	}
	text := "# Rendered from deploy/helm/spiffe-node-crds by make manifests; do not edit.\n"
	for _, o := range r.files.sorted() {
		text += strings.TrimSpace(o) + "\n"
	}
	current(t, "../manifests/crds.yaml", strings.ReplaceAll(text, "managed-by: Helm", "managed-by: kubectl"))
}

// current compares a file with what it should be, or writes it.
func current(t *testing.T, path, want string) {
	t.Helper()
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(want), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if got := readFile(t, path); got != want {
		t.Errorf("%s is out of date; run make manifests", path)
	}
}
