package e2e_test

import (
	"os"
	"strings"
	"testing"
	"time"
)

// manifests are the installation of deploy/manifests, which are rendered from
// the charts: what TestChart has, without helm.
func manifests() installation {
	in := charts()
	in.known = 4
	return in
}

// TestCI is what every change is tested with: the shipped manifests, a pod
// registered by itself and one by hand, kubelet, agent and driver started again,
// pods deleted, nothing left over. The other tests are longer, not stricter.
func TestCI(t *testing.T) {
	if rigOnly() {
		t.Skip("E2E_RIG_ONLY is set: the product was not built")
	}
	diagnoseOnFailure(t)
	on = manifests()
	crds, product := manifest(t, "crds.yaml"), manifest(t, "spiffe-node-one-node.yaml")
	begun := time.Now()
	for _, text := range []string{crds, product} {
		if err := node.Apply(within(t, 2*time.Minute), text); err != nil {
			t.Fatal(err)
		}
	}
	newProductPod(t)
	t.Logf("manifests applied -> Ready: %s", time.Since(begun).Round(time.Millisecond))
	runParts(t, []part{
		{"automatic", testFallback},
		{"known", testKnownByLabel},
		{"plugin", testPlugin},
		{"manual", testManual},
		{"kubelet restart", testKubeletRestart},
		{"agent restart", testAgentRestart},
		{"driver restart", testDriverRestart},
		{"product pod deleted", testProductDeleted},
		{"nothing left", testNothingLeft},
	})
	for _, text := range []string{product, crds} {
		if err := node.Delete(within(t, 2*time.Minute), text); err != nil {
			t.Fatal(err)
		}
	}
	testUninstalled(t)
}

// testKnownByLabel is testKnown with the resource of Istio's guide instead of
// the one that gives every pod an identity, which parts after this would meet.
func testKnownByLabel(t *testing.T) {
	t.Helper()
	if err := node.Apply(within(t, time.Minute), managed); err != nil {
		t.Fatal(err)
	}
	kubectl(t, "delete", "clusterspiffeid", chartSpace+"-default")
	testKnown(t)
}

// manifest is a file of deploy/manifests with the images that were imported.
func manifest(t *testing.T, name string) string {
	t.Helper()
	raw, err := os.ReadFile("../../deploy/manifests/" + name)
	if err != nil {
		t.Fatal(err)
	}
	var out strings.Builder
	for line := range strings.Lines(string(raw)) {
		if before, image, ok := strings.Cut(line, "image: ghcr.io/spiffe-node/"); ok {
			program, _, _ := strings.Cut(image, ":")
			line = before + "image: ghcr.io/spiffe-node/" + program + ":" + chartTag + "\n"
		}
		out.WriteString(line)
	}
	return out.String()
}
