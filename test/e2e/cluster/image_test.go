package cluster_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/spiffe-node/spiffe-node/test/e2e/cluster"
)

func TestWriteImage(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "program")
	if err := os.WriteFile(program, []byte("#!"), 0o600); err != nil {
		t.Fatal(err)
	}
	img := cluster.Image{
		Name: "example.test/x:1", Entrypoint: []string{"/opt/bin/x"}, User: "1337:1337",
		Files: map[string]string{"/opt/bin/x": program, "/opt/bin/y": program}, Links: map[string]string{"/bin/x": "/opt/bin/x"},
	}
	var archives [][]byte
	for _, name := range []string{"a.tar", "b.tar"} {
		file := filepath.Join(dir, name)
		if err := cluster.WriteImage(file, img); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		archives = append(archives, data)
	}
	if !bytes.Equal(archives[0], archives[1]) {
		t.Error("the same image was written differently the second time")
	}
	files := untar(t, archives[0])
	if got, want := names(t, files["layer.tar"]), []string{"opt/", "opt/bin/", "opt/bin/x", "opt/bin/y", "bin/", "bin/x"}; !slices.Equal(got, want) {
		t.Errorf("layer has %q, want %q", got, want)
	}
	if !bytes.Contains(files["manifest.json"], []byte(img.Name)) {
		t.Errorf("manifest does not name the image: %s", files["manifest.json"])
	}
}

func untar(t *testing.T, data []byte) map[string][]byte {
	t.Helper()
	files := map[string][]byte{}
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files
		}
		if err != nil {
			t.Fatal(err)
		}
		if files[h.Name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
}

func names(t *testing.T, data []byte) []string {
	t.Helper()
	var out []string
	for r := tar.NewReader(bytes.NewReader(data)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, h.Name)
	}
}
