package cluster

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"os"
	"path"
	"runtime"
	"slices"
	"strings"
	"time"
)

// Image is a container image of one layer made from files of this machine.
type Image struct {
	// Name with its tag, as manifests refer to it.
	Name string
	// Files maps paths in the image to paths on this machine; they get mode 0755.
	Files map[string]string
	// Links maps paths in the image to what they are symbolic links to.
	Links map[string]string
	// Entrypoint, and User as "uid:gid" or empty for root.
	Entrypoint []string
	User       string
}

// WriteImage writes the archive that `ctr images import` and `docker load`
// take. Equal content gives equal bytes.
func WriteImage(file string, img Image) error {
	layer, err := img.layer()
	if err != nil {
		return fmt.Errorf("building a layer for image %s: %w", img.Name, err)
	}
	config, err := json.Marshal(map[string]any{
		"architecture": runtime.GOARCH,
		"os":           "linux",
		"config":       map[string]any{"Entrypoint": img.Entrypoint, "User": img.User, "WorkingDir": "/", "Env": []string{"PATH=/usr/local/bin:/usr/bin:/bin:/"}},
		"rootfs":       map[string]any{"type": "layers", "diff_ids": []string{"sha256:" + digest(layer)}},
	})
	if err != nil {
		return fmt.Errorf("encoding the configuration of image %s: %w", img.Name, err)
	}
	manifest, err := json.Marshal([]map[string]any{{"Config": digest(config) + ".json", "RepoTags": []string{img.Name}, "Layers": []string{"layer.tar"}}})
	if err != nil {
		return fmt.Errorf("encoding the manifest of image %s: %w", img.Name, err)
	}
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	for _, f := range []struct {
		name string
		data []byte
	}{{digest(config) + ".json", config}, {"layer.tar", layer}, {"manifest.json", manifest}} {
		if err := addFile(w, f.name, 0o644, f.data); err != nil {
			return fmt.Errorf("writing image %s: %w", img.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		return fmt.Errorf("writing image %s: %w", img.Name, err)
	}
	if err := os.WriteFile(file, out.Bytes(), 0o644); err != nil {
		return fmt.Errorf("writing image %s: %w", img.Name, err)
	}
	return nil
}

func (img Image) layer() ([]byte, error) {
	var out bytes.Buffer
	w := tar.NewWriter(&out)
	made := map[string]bool{}
	parents := func(name string) error {
		var need []string
		for d := path.Dir(name); d != "." && d != "/" && !made[d]; d = path.Dir(d) {
			made[d] = true
			need = append(need, d)
		}
		for _, d := range slices.Backward(need) {
			if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: d + "/", Mode: 0o755, ModTime: time.Unix(0, 0)}); err != nil {
				return err
			}
		}
		return nil
	}
	for _, name := range sortedKeys(img.Files) {
		data, err := os.ReadFile(img.Files[name])
		if err != nil {
			return nil, err
		}
		name = strings.TrimPrefix(name, "/")
		if err := parents(name); err != nil {
			return nil, err
		}
		if err := addFile(w, name, 0o755, data); err != nil {
			return nil, err
		}
	}
	for _, name := range sortedKeys(img.Links) {
		target := img.Links[name]
		name = strings.TrimPrefix(name, "/")
		if err := parents(name); err != nil {
			return nil, err
		}
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeSymlink, Name: name, Linkname: target, Mode: 0o777, ModTime: time.Unix(0, 0)}); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return out.Bytes(), nil
}

func addFile(w *tar.Writer, name string, mode int64, data []byte) error {
	if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: mode, Size: int64(len(data)), ModTime: time.Unix(0, 0)}); err != nil {
		return err
	}
	_, err := w.Write(data)
	return err
}

func digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

func sortedKeys(m map[string]string) []string {
	keys := make([]string, 0, len(m))
	for k := range m {
		keys = append(keys, k)
	}
	slices.Sort(keys)
	return keys
}
