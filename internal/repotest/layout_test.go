package repotest_test

import (
	"bytes"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const (
	module = "github.com/spiffe-node/spiffe-node"
	root   = "../.."
)

// bans say which packages must not be reachable from which, and why.
var bans = []struct {
	from []string
	ban  []string
	why  string
}{
	{
		from: []string{"pkg/attest", "pkg/entry", "pkg/svid"},
		ban:  []string{"google.golang.org/grpc", "github.com/envoyproxy/go-control-plane/envoy/service/secret/v3", "k8s.io/client-go", module + "/internal/spirewire"},
		why:  "the domain knows no transport, no Envoy, no Kubernetes client",
	},
	{
		from: []string{"pkg/authority"},
		ban:  []string{module + "/pkg/svid", module + "/pkg/entry", module + "/pkg/sds"},
		why:  "the seam depends on neither side",
	},
	{
		from: []string{"pkg/authority/embedded"},
		ban:  []string{module + "/pkg/svid", module + "/pkg/sds", "google.golang.org/grpc"},
		why:  "the authority must be usable without a node or a network",
	},
	{
		from: []string{"internal/adminapi", "pkg/authority/nodeattest/jointoken", "pkg/authority/embedded"},
		ban:  []string{"k8s.io/client-go", module + "/pkg/registration"},
		why:  "node attestors bring their own clients; an agent with an authority in it has none",
	},
	{
		from: []string{"pkg/sds", "pkg/workloadapi"},
		ban:  []string{module + "/pkg/authority/embedded", module + "/internal/adminapi", "k8s.io/client-go"},
		why:  "serving identities must not depend on where they come from",
	},
	{
		from: []string{"pkg/workloadapi", "cmd/csi-driver", "cmd/kubectl-spiffe"},
		ban:  []string{"github.com/envoyproxy/go-control-plane/envoy/service/secret/v3"},
		why:  "Envoy's types stay in pkg/sds",
	},
	{
		from: []string{"cmd/csi-driver", "pkg/csi"},
		ban:  []string{module + "/pkg/svid", module + "/pkg/entry", "go.etcd.io/bbolt"},
		why:  "the driver mounts; it knows nothing of identities",
	},
	{
		from: []string{"internal/inspecttls", "internal/adminapi"},
		ban:  []string{"k8s.io/client-go", "k8s.io/api"},
		why:  "who may ask is decided behind an interface; internal/inspecttls/kubereview asks the API server",
	},
	{
		from: []string{"cmd/kubectl-spiffe"},
		ban:  []string{"k8s.io/client-go/kubernetes", "sigs.k8s.io/controller-runtime", module + "/pkg/svid"},
		why:  "clients for all of Kubernetes' API would triple the command",
	},
	{
		from: []string{"cmd/kubectl-spiffe"},
		ban:  []string{module + "/internal/procfs", module + "/pkg/attest"},
		why:  "it runs on people's own machines, which are not all Linux",
	},
}

func goList(t *testing.T, args ...string) []string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", append([]string{"list"}, args...)...)
	cmd.Dir = root
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list %s: %v\n%s", strings.Join(args, " "), err, stderr.String())
	}
	return strings.Fields(string(out))
}

func TestImports(t *testing.T) {
	for _, b := range bans {
		for _, from := range b.from {
			deps := goList(t, "-deps", "./"+from)
			for _, ban := range b.ban {
				for _, dep := range deps {
					if dep == ban || strings.HasPrefix(dep, ban+"/") {
						t.Errorf("%s reaches %s: %s", from, dep, b.why)
						break
					}
				}
			}
		}
	}
}

// Small programs stay small only if somebody counts.
func TestDriverIsLean(t *testing.T) {
	if n := len(goList(t, "-deps", "./cmd/csi-driver")); n > 420 {
		t.Errorf("cmd/csi-driver links %d packages; what has come in?", n)
	}
}

func TestFiles(t *testing.T) {
	const longest = 600
	packages := map[string]bool{} // directory -> has a package comment
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name := d.Name()
		if d.IsDir() && path != root && (strings.HasPrefix(name, ".") || slices.Contains([]string{"bin", "testdata"}, name)) {
			return fs.SkipDir
		}
		if filepath.Ext(name) != ".go" || strings.HasSuffix(name, ".pb.go") {
			return nil
		}
		data, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if lines := bytes.Count(data, []byte("\n")); lines > longest {
			t.Errorf("%s has %d lines, more than %d; is there a natural seam?", path, lines, longest)
		}
		if strings.HasSuffix(name, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, data, parser.ParseComments)
		if err != nil {
			return err
		}
		dir := filepath.Dir(path)
		packages[dir] = packages[dir] || f.Doc != nil
		for _, decl := range f.Decls {
			if fn, ok := decl.(*ast.FuncDecl); ok && fn.Recv == nil && fn.Name.Name == "init" {
				t.Errorf("%s has an init function: importing must have no effects", path)
			}
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for dir, documented := range packages {
		if !documented {
			t.Errorf("package %s has no comment that says what it promises", dir)
		}
	}
}
