package main

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

// binaries builds a small static program under the names of all commands.
func binaries(t *testing.T, dir string, arches ...string) string {
	t.Helper()
	src := filepath.Join(t.TempDir(), "main.go")
	if err := os.WriteFile(src, []byte("package main\n\nfunc main() { println(\"ran\") }\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, arch := range arches {
		out := filepath.Join(dir, "linux-"+arch)
		if err := os.MkdirAll(out, 0o755); err != nil {
			t.Fatal(err)
		}
		first := ""
		for _, name := range []string{"csi-driver", "sds-agent", "authority", "kubectl-spiffe"} {
			path := filepath.Join(out, name)
			if first != "" {
				if err := os.Link(first, path); err != nil {
					t.Fatal(err)
				}
				continue
			}
			first = path
			cmd := exec.CommandContext(t.Context(), "go", "build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w -buildid=", "-o", path, src)
			cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux", "GOARCH="+arch)
			if text, err := cmd.CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, text)
			}
		}
	}
	return dir
}

func pack1(t *testing.T, bin, out string, args ...string) string {
	t.Helper()
	var stdout bytes.Buffer
	args = append([]string{"-bin", bin, "-out", out, "-prefix", "registry.example/a/b", "-tag", "1.2.3"}, args...)
	if err := run(args, func(string) string { return "" }, &stdout, t.Output()); err != nil {
		t.Fatal(err)
	}
	return stdout.String()
}

// open unpacks an archive and gives its only entry.
func open(t *testing.T, archive string) (layout.Path, v1.Descriptor) {
	t.Helper()
	dir := t.TempDir()
	f, err := os.Open(archive)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, h.Name)
		if h.Typeflag == tar.TypeDir {
			if err := os.MkdirAll(path, 0o755); err != nil {
				t.Fatal(err)
			}
			continue
		}
		b, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	l, err := layout.FromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	index, err := l.ImageIndex()
	if err != nil {
		t.Fatal(err)
	}
	m, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Manifests) != 1 {
		t.Fatalf("%d entries in the archive", len(m.Manifests))
	}
	return l, m.Manifests[0]
}

func TestImage(t *testing.T) {
	out := t.TempDir()
	pack1(t, binaries(t, t.TempDir(), "amd64"), out)
	for _, want := range Images() {
		t.Run(want.Name, func(t *testing.T) {
			l, d := open(t, filepath.Join(out, want.Name+".tar"))
			if got := d.Annotations["io.containerd.image.name"]; got != "registry.example/a/b/"+want.Name+":1.2.3" {
				t.Errorf("name %q", got)
			}
			img, err := l.Image(d.Digest)
			if err != nil {
				t.Fatal(err)
			}
			if err := validate.Image(img); err != nil {
				t.Fatal(err)
			}
			cfg, err := img.ConfigFile()
			if err != nil {
				t.Fatal(err)
			}
			if cfg.OS != "linux" || cfg.Architecture != "amd64" || cfg.Config.User != want.User || len(cfg.Config.Entrypoint) != 1 {
				t.Errorf("configuration %+v", cfg)
			}
			files := map[string]*tar.Header{}
			r := tar.NewReader(mutate.Extract(img))
			for {
				h, err := r.Next()
				if errors.Is(err, io.EOF) {
					break
				}
				if err != nil {
					t.Fatal(err)
				}
				if h.Uid != 0 || h.Gid != 0 || h.ModTime.Unix() != 0 {
					t.Errorf("%s: owner %d:%d, time %s", h.Name, h.Uid, h.Gid, h.ModTime)
				}
				files["/"+strings.TrimSuffix(h.Name, "/")] = h
			}
			entry := files[cfg.Config.Entrypoint[0]]
			if entry == nil || entry.Mode != 0o755 || entry.Typeflag != tar.TypeReg {
				t.Errorf("entry point %v: %+v", cfg.Config.Entrypoint, entry)
			}
			for name, target := range want.Links {
				if h := files[name]; h == nil || h.Typeflag != tar.TypeSymlink || h.Linkname != target {
					t.Errorf("link %s: %+v", name, h)
				}
			}
			for name := range want.Dirs {
				if h := files[name]; h == nil || h.Typeflag != tar.TypeDir {
					t.Errorf("directory %s: %+v", name, h)
				}
			}
		})
	}
}

// TestReproducible: archives made at other times, in other places and from
// binaries built again have the same bytes.
func TestReproducible(t *testing.T) {
	a, b := t.TempDir(), t.TempDir()
	said := pack1(t, binaries(t, t.TempDir(), "amd64", "arm64"), a, "-platforms", "linux/amd64,linux/arm64")
	again := pack1(t, binaries(t, t.TempDir(), "amd64", "arm64"), b, "-platforms", "linux/amd64,linux/arm64")
	if got := strings.ReplaceAll(again, b, a); got != said {
		t.Errorf("digests differ:\n%s%s", said, got)
	}
	for _, img := range Images() {
		one, err := os.ReadFile(filepath.Join(a, img.Name+".tar"))
		if err != nil {
			t.Fatal(err)
		}
		two, err := os.ReadFile(filepath.Join(b, img.Name+".tar"))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(one, two) {
			t.Errorf("%s: archives differ", img.Name)
		}
		l, d := open(t, filepath.Join(a, img.Name+".tar"))
		top, err := l.ImageIndex()
		if err != nil {
			t.Fatal(err)
		}
		index, err := top.ImageIndex(d.Digest)
		if err != nil {
			t.Fatal(err)
		}
		if err := validate.Index(index); err != nil {
			t.Errorf("%s: %v", img.Name, err)
		}
		m, err := index.IndexManifest()
		if err != nil {
			t.Fatal(err)
		}
		if len(m.Manifests) != 2 || m.Manifests[1].Platform.Architecture != "arm64" {
			t.Errorf("%s: platforms %+v", img.Name, m.Manifests)
		}
	}
	if left, _ := filepath.Glob(filepath.Join(a, ".*")); len(left) > 0 {
		t.Errorf("left over: %q", left)
	}
}

// TestMissing: what cannot be packed is named, the rest is packed.
func TestMissing(t *testing.T) {
	bin, out := binaries(t, t.TempDir(), "amd64"), t.TempDir()
	if err := os.Remove(filepath.Join(bin, "linux-amd64", "authority")); err != nil {
		t.Fatal(err)
	}
	var stderr bytes.Buffer
	if err := run([]string{"-bin", bin, "-out", out}, os.Getenv, io.Discard, &stderr); err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(stderr.String(), "no authority image") {
		t.Errorf("said %q", stderr.String())
	}
	if _, err := os.Stat(filepath.Join(out, "sds-agent.tar")); err != nil {
		t.Error(err)
	}
	if err := run([]string{"-bin", t.TempDir(), "-out", out}, os.Getenv, io.Discard, io.Discard); err == nil {
		t.Error("packed nothing and said so with success")
	}
}

func TestRefused(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "linux-amd64")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	sh, err := filepath.EvalSymlinks("/bin/sh")
	if err != nil {
		t.Skip("no /bin/sh to take for a dynamic binary")
	}
	b, err := os.ReadFile(sh)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "csi-driver"), b, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"-bin", filepath.Dir(dir), "-out", t.TempDir()},
		{"-platforms", "windows/amd64"},
		{"-platforms", "linux"},
		{"stray"},
	} {
		if err := run(args, func(string) string { return "" }, io.Discard, io.Discard); err == nil {
			t.Errorf("%q was taken", args)
		} else {
			t.Log(err)
		}
	}
	if err := run(nil, func(string) string { return "yesterday" }, io.Discard, io.Discard); err == nil {
		t.Error("SOURCE_DATE_EPOCH=yesterday was taken")
	}
}

// TestDockerfile: who prefers a Dockerfile gets the same images from it.
func TestDockerfile(t *testing.T) {
	b, err := os.ReadFile("Dockerfile")
	if err != nil {
		t.Fatal(err)
	}
	stages := map[string]string{}
	for stage := range strings.SplitSeq(string(b), "\nFROM ") {
		head, _, _ := strings.Cut(stage, "\n")
		if i := strings.LastIndex(head, " AS "); i >= 0 {
			stages[head[i+4:]] = stage
		}
	}
	for _, img := range Images() {
		stage := stages[img.Name]
		for _, want := range append([]string{"ENTRYPOINT [\"" + img.Entrypoint + "\"]", "USER " + img.User}, img.Env...) {
			if !strings.Contains(stage, want) {
				t.Errorf("stage %s has no %s:\n%s", img.Name, want, stage)
			}
		}
		for name := range img.Binaries {
			if !strings.Contains(stage, " "+name+"\n") {
				t.Errorf("stage %s has no %s", img.Name, name)
			}
		}
		for name := range img.Links {
			if !strings.Contains(string(b), name) {
				t.Errorf("no %s in the Dockerfile", name)
			}
		}
	}
}

// TestContainerd imports an archive where ctr and a containerd are at hand.
func TestContainerd(t *testing.T) {
	address := os.Getenv("CONTAINERD_ADDRESS")
	if address == "" {
		t.Skip("CONTAINERD_ADDRESS is not set: no containerd to import into")
	}
	out := t.TempDir()
	pack1(t, binaries(t, t.TempDir(), "amd64"), out)
	ctr := func(args ...string) string {
		cmd := exec.CommandContext(context.WithoutCancel(t.Context()), "ctr", append([]string{"--address", address, "-n", "spiffe-node-test"}, args...)...)
		text, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("ctr %q: %v\n%s", args, err, text)
		}
		return string(text)
	}
	for _, img := range Images() {
		ctr("images", "import", filepath.Join(out, img.Name+".tar"))
		ref := "registry.example/a/b/" + img.Name + ":1.2.3"
		defer ctr("images", "rm", ref)
		if list := ctr("images", "ls", "-q"); !strings.Contains(list, ref) {
			t.Errorf("imported, but not as %s: %s", ref, list)
		}
	}
}
