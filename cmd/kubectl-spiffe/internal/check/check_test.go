package check_test

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/spiffe-node/spiffe-node/cmd/kubectl-spiffe/internal/check"
)

// Each file says in comments what is to be found in it.
func TestFiles(t *testing.T) {
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(files) == 0 {
		t.Fatal(files, err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			objects, err := check.Parse(file, bytes.NewReader(data))
			if err != nil {
				t.Fatal(err)
			}
			in := check.Input{Objects: objects}
			var want, got []string
			for line := range strings.Lines(string(data)) {
				line = strings.TrimSpace(line)
				in.Istio = in.Istio || line == "# istio"
				if td, ok := strings.CutPrefix(line, "# domain: "); ok {
					in.TrustDomain = td
				}
				if w, ok := strings.CutPrefix(line, "# want: "); ok {
					want = append(want, w)
				}
			}
			for _, f := range check.Run(in) {
				got = append(got, fmt.Sprintf("%s %s %s", f.Severity, f.Rule, f.Where))
				if f.What == "" || f.Fix == "" || !strings.HasPrefix(f.Source, file+":") {
					t.Errorf("incomplete: %+v", f)
				}
			}
			slices.Sort(want)
			slices.Sort(got)
			if diff := cmp.Diff(want, got); diff != "" {
				t.Errorf("-want +got:\n%s", diff)
			}
		})
	}
}

func TestParse(t *testing.T) {
	objects, err := check.Parse("f", strings.NewReader("# only words\n---\n\n---\nkind: Pod\nmetadata: {name: a}\n"))
	if err != nil || len(objects) != 1 || objects[0].String() != "Pod a" || objects[0].Source != "f:5" {
		t.Errorf("%+v, %v", objects, err)
	}
	for name, text := range map[string]string{
		"no YAML": "a: [",
		"list":    "- a\n",
	} {
		if objects, err := check.Parse("f", strings.NewReader(text)); err == nil || !strings.HasPrefix(err.Error(), "f:") {
			t.Errorf("%s: %v, %v", name, objects, err)
		}
	}
	laughs := "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
	for c := 'b'; c <= 'i'; c++ {
		laughs += fmt.Sprintf("%c: &%c [%s]\n", c, c, strings.TrimSuffix(strings.Repeat(fmt.Sprintf("*%c,", c-1), 10), ","))
	}
	if _, err := check.Parse("f", strings.NewReader(laughs)); err == nil {
		t.Error("a small file may become any size")
	}
	if _, err := check.Parse("f", strings.NewReader(strings.Repeat(" ", 33<<20))); err == nil {
		t.Error("any length is taken")
	}
}

func pod(name, node string, more string) string {
	return "{kind: Pod, metadata: {name: " + name + ", namespace: shop}, spec: {nodeName: " + node + ", containers: [{name: a, volumeMounts: [{name: s, mountPath: /s}]}], " +
		"volumes: [{name: s, csi: {driver: csi.spiffe.io, readOnly: true}}]}, status: {phase: Running}" + more + "}\n---\n"
}

// In a cluster, what is missing is missing, and the agents say who was served.
func TestCluster(t *testing.T) {
	objects, err := check.Parse("f", strings.NewReader(pod("served", "n1", "")+pod("late", "n1", "")+pod("denied", "n1", "")+pod("silent", "n1", "")+pod("elsewhere", "n2", "")))
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range check.Run(check.Input{
		Objects: objects, Cluster: true, Unread: map[string]string{"CSINodes": "you may not"},
		Identities: map[string]check.Identity{"shop/served": {Served: true}, "shop/late": {}, "shop/denied": {Denied: "cgroup and ledger disagree"}},
		Asked:      map[string]bool{"n1": true},
	}) {
		got = append(got, fmt.Sprintf("%s %s %s", f.Severity, f.Rule, f.Where))
	}
	want := []string{
		"error csidriver-missing Pod shop/served", "error denied Pod shop/denied", "error no-identity Pod shop/late",
		"warning not-connected Pod shop/silent", "note not-checked ",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}

// FuzzCheck: any file is read or refused, and what is read is judged.
func FuzzCheck(f *testing.F) {
	files, err := filepath.Glob("testdata/*.yaml")
	if err != nil {
		f.Fatal(err)
	}
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(data)
	}
	f.Add([]byte("a: &a [*a]\n"))
	f.Add([]byte("kind: List\nitems: [{kind: List, items: [{kind: PodList, items: [{}]}]}]\n"))
	f.Add([]byte("metadata: []\nkind: Deployment\nspec: {template: {spec: {volumes: [{csi: null}]}}}\n"))
	f.Add([]byte("sidecarInjectorWebhook: {templates: {spire: \"{{}}: {{\\n\"}}\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		objects, _ := check.Parse("f", bytes.NewReader(data))
		for _, in := range []check.Input{{Objects: objects, Istio: true}, {Objects: objects, Istio: true, Cluster: true, TrustDomain: "td"}} {
			for _, finding := range check.Run(in) {
				if finding.What == "" || finding.Fix == "" || finding.Rule == "" {
					t.Errorf("incomplete: %+v", finding)
				}
			}
		}
	})
}

func TestNotRunningSaysWhy(t *testing.T) {
	f, err := os.Open("testdata/own.yaml")
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	objects, err := check.Parse("own.yaml", f)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, finding := range check.Run(check.Input{Objects: objects}) {
		got = append(got, finding.What)
	}
	want := []string{
		"container sds-agent ends again and again, 4 times so far, with exit code 1: sds-agent: agent: attest: mount the host's /sys/fs/cgroup (node n1)",
		"container spire-server waits: ImagePullBackOff: no such image (node n1)",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
}
