package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestFederationSameAsSpireServer has both programs change relationships on a
// server of our own each, step by step, and compares what they print.
func TestFederationSameAsSpireServer(t *testing.T) {
	bin := os.Getenv(spireServer)
	if bin == "" {
		t.Skip("no " + spireServer + " to compare with")
	}
	ofTheirs, ofOurs := serveForReal(t), serveForReal(t)
	theirs := func(args ...string) outcome {
		var out, errs bytes.Buffer
		cmd := exec.CommandContext(t.Context(), bin, append(args, "-socketPath", ofTheirs)...)
		cmd.Stdout, cmd.Stderr = &out, &errs
		err := cmd.Run()
		if _, exited := errors.AsType[*exec.ExitError](err); err != nil && !exited {
			t.Fatal(err)
		}
		return outcome{out.String(), errs.String(), err != nil}
	}
	ours := func(args ...string) outcome {
		var out, errs bytes.Buffer
		code := run(context.WithoutCancel(t.Context()), append(args, "-socketPath", ofOurs), system{
			stdin: strings.NewReader(""), stdout: &out, stderr: &errs, getenv: func(string) string { return "" },
		})
		return outcome{out.String(), errs.String(), code != 0}
	}
	dir := t.TempDir()
	pem := filepath.Join(dir, "b.pem")
	doc := filepath.Join(dir, "b.json")
	data := filepath.Join(dir, "data.json")
	spiffe := ours("bundle", "show", "-format", "spiffe").Stdout
	for path, text := range map[string]string{
		pem: ours("bundle", "show").Stdout, doc: spiffe,
		data: `{"federationRelationships":[
			{"trustDomain":"d1","bundleEndpointURL":"https://127.0.0.1:1","bundleEndpointProfile":"https_web"},
			{"trustDomain":"d2","bundleEndpointURL":"https://127.0.0.1:1/d2","bundleEndpointProfile":"https_spiffe","endpointSPIFFEID":"spiffe://d2/spire/server","trustDomainBundleFormat":"spiffe","trustDomainBundle":` + spiffe + `}]}`,
	} {
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for line := range strings.Lines(`
federation create -trustDomain a.org -bundleEndpointURL https://127.0.0.1:1 -bundleEndpointProfile https_web
federation create -trustDomain b.org -bundleEndpointURL https://127.0.0.1:1/b -bundleEndpointProfile https_spiffe -endpointSpiffeID spiffe://b.org/spire/server -trustDomainBundlePath PEM
federation create -trustDomain c.org -bundleEndpointURL https://127.0.0.1:1/c -bundleEndpointProfile https_web -trustDomainBundlePath DOC -trustDomainBundleFormat spiffe -output json
federation create -data DATA
federation create -data DATA
federation create -data DATA -output json
federation list
federation list -output json
federation show -trustDomain b.org -output json
bundle list
federation update -trustDomain b.org -bundleEndpointURL https://127.0.0.1:1/new -bundleEndpointProfile https_web
federation update -trustDomain a.org -bundleEndpointURL https://127.0.0.1:1/new -bundleEndpointProfile https_spiffe -endpointSpiffeID spiffe://a.org/x -trustDomainBundlePath PEM -output json
federation update -data DATA
federation list -output json
federation delete -id a.org
federation delete -id spiffe://b.org -output json
federation delete -id a.org
federation delete -id a.org -output json
federation list
bundle list -id b.org
`) {
		if line = strings.TrimSpace(line); line == "" {
			continue
		}
		args := strings.Fields(strings.NewReplacer("PEM", pem, "DOC", doc, "DATA", data).Replace(line))
		if diff := cmp.Diff(theirs(args...), ours(args...)); diff != "" {
			t.Errorf("%s (-spire-server +kubectl-spiffe):\n%s", line, diff)
		}
	}
}
