package e2e_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
	"time"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
)

// spireTag is that of the images made of SPIRE's programs.
const spireTag = "e2e"

// spireDir is the directory with SPIRE's own programs, linked statically, and
// its charts: spire-server, spire-agent, spire-controller-manager,
// spiffe-csi-driver, csi-node-driver-registrar, charts/spire, charts/spire-crds.
// They are no part of this repository and cannot be built by its tests.
func spireDir(t *testing.T) string {
	t.Helper()
	dir := os.Getenv("E2E_SPIRE")
	if dir == "" {
		t.Skip("E2E_SPIRE names no directory with SPIRE's programs and charts (README.md): nothing is moved from SPIRE")
	}
	return dir
}

// importSPIRE makes images of SPIRE's programs, by the names that its charts
// give them, and brings them to the nodes.
func importSPIRE(t *testing.T, dir string, nodes ...*cluster.Cluster) {
	t.Helper()
	bash := cluster.Image{Name: "cgr.dev/chainguard/bash:" + spireTag, Files: map[string]string{}, Links: map[string]string{"/bin": "usr/bin", "/lib": "usr/lib", "/lib64": "usr/lib64"}}
	for _, program := range []string{"bash", "ln", "readlink", "rm", "chown"} {
		withLibraries(t, "/usr/bin/"+program, bash.Files)
	}
	images := []cluster.Image{
		bash,
		{Name: "ghcr.io/spiffe/spire-server:" + spireTag, Files: map[string]string{"/opt/spire/bin/spire-server": "spire-server"}, Entrypoint: []string{"/opt/spire/bin/spire-server", "run"}},
		{Name: "ghcr.io/spiffe/spire-agent:" + spireTag, Files: map[string]string{"/opt/spire/bin/spire-agent": "spire-agent"}, Entrypoint: []string{"/opt/spire/bin/spire-agent", "run"}},
		{Name: "ghcr.io/spiffe/spire-controller-manager:" + spireTag, Files: map[string]string{"/spire-controller-manager": "spire-controller-manager"}, Entrypoint: []string{"/spire-controller-manager"}},
		{Name: "ghcr.io/spiffe/spiffe-csi-driver:" + spireTag, Files: map[string]string{"/spiffe-csi-driver": "spiffe-csi-driver"}, Entrypoint: []string{"/spiffe-csi-driver"}},
		{Name: "registry.k8s.io/sig-storage/csi-node-driver-registrar:" + spireTag, Files: map[string]string{"/csi-node-driver-registrar": "csi-node-driver-registrar"}, Entrypoint: []string{"/csi-node-driver-registrar"}},
	}
	for _, img := range images {
		for to, from := range img.Files {
			if !filepath.IsAbs(from) {
				img.Files[to] = filepath.Join(dir, from)
			}
		}
		file := filepath.Join(t.TempDir(), "image.tar")
		if err := cluster.WriteImage(file, img); err != nil {
			t.Fatal(err)
		}
		for _, n := range nodes {
			if err := n.ImportImage(within(t, time.Minute), file); err != nil {
				t.Fatal(err)
			}
		}
	}
}

// withLibraries adds a program of this machine and what it is linked with.
func withLibraries(t *testing.T, program string, files map[string]string) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "ldd", program).Output()
	if err != nil {
		t.Fatalf("ldd %s: %v", program, err)
	}
	files[program] = program
	for _, lib := range regexp.MustCompile(`/\S+`).FindAllString(string(out), -1) {
		// Debian's /lib and /lib64 are links into /usr.
		files["/usr"+regexp.MustCompile(`^/usr`).ReplaceAllString(lib, "")] = lib
	}
}

// spireValues are what SPIRE's chart needs on this rig: the images that were
// imported, no volumes, no programs beside its own. Everything else is the
// chart's default.
var spireValues = []string{
	"global.spire.trustDomain=" + trustDomain,
	"global.installAndUpgradeHooks.enabled=false",
	"global.deleteHooks.enabled=false",
	"spiffe-oidc-discovery-provider.enabled=false",
	"spire-server.persistence.type=hostPath",
	"spire-server.persistence.hostPath=/var/lib/spire-server",
	"spire-server.podSecurityContext.runAsUser=0", // else busybox is needed to give it its directory
	"spire-server.image.tag=" + spireTag,
	"spire-server.controllerManager.image.tag=" + spireTag,
	"spire-agent.image.tag=" + spireTag,
	"spire-agent.socketAlternate.image.tag=" + spireTag,
	"spiffe-csi-driver.image.tag=" + spireTag,
	"spiffe-csi-driver.nodeDriverRegistrar.image.tag=" + spireTag,
}

// besideSPIRE makes ready for a test of the chart beside SPIRE's programs on the
// first node: their images are there, and the resources' kinds. It returns
// spireDir.
func besideSPIRE(t *testing.T) (dir string) {
	t.Helper()
	if rigOnly() {
		t.Skip("E2E_RIG_ONLY is set: the product was not built")
	}
	dir = spireDir(t)
	diagnoseOnFailure(t)
	on = charts()
	importSPIRE(t, dir, node)
	if err := node.BuildHelm(within(t, 15*time.Minute), "."); err != nil {
		t.Fatal(err)
	}
	helmCRDs(t)
	return dir
}

// helmSPIRE installs or upgrades SPIRE's chart with more values.
func helmSPIRE(t *testing.T, dir, space string, more ...string) {
	t.Helper()
	args := []string{
		"upgrade", "--install", "-n", space, "spire", filepath.Join(dir, "charts", "spire"), "--wait",
		"--set", `spire-server.nodeSelector.kubernetes\.io/hostname=` + node.NodeName(),
	} // where its directory is
	for _, v := range slices.Concat(spireValues, more) {
		args = append(args, "--set", v)
	}
	helm(t, args...)
}

// spireSpace is the namespace of SPIRE's release.
const spireSpace = "spire"
