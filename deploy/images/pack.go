package main

import (
	"archive/tar"
	"bytes"
	"cmp"
	"debug/elf"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// pack writes an image for all platforms as an OCI archive and gives its digest
// and the archive's size in bytes.
func pack(img Image, o options, ref, out string) (string, int64, error) {
	dir, err := os.MkdirTemp(filepath.Dir(out), ".layout-")
	if err != nil {
		return "", 0, err
	}
	defer os.RemoveAll(dir)
	l, err := layout.Write(dir, empty.Index)
	if err != nil {
		return "", 0, err
	}
	// containerd takes the whole name, skopeo and podman the tag.
	names := layout.WithAnnotations(map[string]string{"io.containerd.image.name": ref, "org.opencontainers.image.ref.name": o.tag})
	var digest v1.Hash
	if len(o.platforms) == 1 {
		// An index of one would be a detour that some importers do not take.
		digest, err = appendOne(l, img, o, names)
	} else {
		digest, err = appendIndex(l, img, o, names)
	}
	if err != nil {
		return "", 0, err
	}
	size, err := archive(dir, out, o.created)
	return digest.String(), size, err
}

func appendOne(l layout.Path, img Image, o options, names layout.Option) (v1.Hash, error) {
	p := o.platforms[0]
	built, err := build(img, p, o)
	if err != nil {
		return v1.Hash{}, err
	}
	if err := l.AppendImage(built, names, layout.WithPlatform(v1.Platform{OS: p.OS, Architecture: p.Arch})); err != nil {
		return v1.Hash{}, err
	}
	return built.Digest()
}

func appendIndex(l layout.Path, img Image, o options, names layout.Option) (v1.Hash, error) {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, p := range o.platforms {
		built, err := build(img, p, o)
		if err != nil {
			return v1.Hash{}, err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        built,
			Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: p.OS, Architecture: p.Arch}},
		})
	}
	if err := l.AppendIndex(index, names); err != nil {
		return v1.Hash{}, err
	}
	return index.Digest()
}

// build makes the image of one platform.
func build(img Image, p Platform, o options) (v1.Image, error) {
	content, err := layerTar(img, p.dir(o.bin), o.created)
	if err != nil {
		return nil, err
	}
	layer, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(content)), nil },
		tarball.WithMediaType(types.OCILayer))
	if err != nil {
		return nil, err
	}
	base := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	out, err := mutate.Append(base, mutate.Addendum{Layer: layer, History: v1.History{Created: v1.Time{Time: o.created}, CreatedBy: "deploy/images"}})
	if err != nil {
		return nil, err
	}
	file, err := out.ConfigFile()
	if err != nil {
		return nil, err
	}
	file = file.DeepCopy()
	file.OS, file.Architecture, file.Created = p.OS, p.Arch, v1.Time{Time: o.created}
	file.Config = v1.Config{
		Entrypoint: []string{img.Entrypoint},
		User:       img.User,
		WorkingDir: cmp.Or(img.WorkingDir, "/"),
		Env:        append([]string{"PATH=/:/opt/spire/bin"}, img.Env...),
		Labels: map[string]string{
			"org.opencontainers.image.title":       img.Name,
			"org.opencontainers.image.description": img.Description,
			"org.opencontainers.image.version":     o.tag,
			"org.opencontainers.image.licenses":    "Apache-2.0",
		},
		ExposedPorts: map[string]struct{}{},
	}
	for _, port := range img.Ports {
		file.Config.ExposedPorts[port] = struct{}{}
	}
	return mutate.ConfigFile(out, file)
}

// layerTar is everything in the image, in the order of its paths.
func layerTar(img Image, bin string, mtime time.Time) ([]byte, error) {
	dirs := map[string]int64{}
	entries := map[string]tar.Header{}
	parents := func(name string) {
		for d := path.Dir(name); d != "/"; d = path.Dir(d) {
			if _, ok := dirs[d]; !ok {
				dirs[d] = 0o755
			}
		}
	}
	for d, mode := range img.Dirs {
		parents(d)
		dirs[d] = mode
	}
	for name, target := range img.Links {
		parents(name)
		entries[name] = tar.Header{Typeflag: tar.TypeSymlink, Linkname: target, Mode: 0o777}
	}
	data := map[string][]byte{}
	for name, file := range img.Binaries {
		parents(name)
		b, err := static(filepath.Join(bin, file))
		if err != nil {
			return nil, err
		}
		data[name] = b
		entries[name] = tar.Header{Typeflag: tar.TypeReg, Mode: 0o755, Size: int64(len(b))}
	}
	for d, mode := range dirs {
		entries[d+"/"] = tar.Header{Typeflag: tar.TypeDir, Mode: mode}
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		h := entries[name]
		h.Name, h.ModTime, h.Format = strings.TrimPrefix(name, "/"), mtime, tar.FormatUSTAR
		if err := w.WriteHeader(&h); err != nil {
			return nil, err
		}
		if _, err := w.Write(data[name]); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return buf.Bytes(), nil
}

// static reads a binary and refuses one that needs files an image from nothing
// does not have.
func static(file string) ([]byte, error) {
	b, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, fmt.Errorf("%s: %w", file, err)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			return nil, fmt.Errorf("%s is linked dynamically and would not run; build it with CGO_ENABLED=0", file)
		}
	}
	return b, nil
}

// archive packs a layout's directory, replaces out in one step, and gives its
// size in bytes.
func archive(dir, out string, mtime time.Time) (int64, error) {
	tmp, err := os.CreateTemp(filepath.Dir(out), ".archive-")
	if err != nil {
		return 0, err
	}
	defer os.Remove(tmp.Name())
	defer tmp.Close()
	w := tar.NewWriter(tmp)
	// WalkDir goes in the order of names.
	err = filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		rel, relErr := filepath.Rel(dir, file)
		if err := cmp.Or(err, relErr); err != nil || rel == "." {
			return err
		}
		h := &tar.Header{Name: filepath.ToSlash(rel), Mode: 0o644, Typeflag: tar.TypeReg, ModTime: mtime, Format: tar.FormatUSTAR}
		var b []byte
		if d.IsDir() {
			h.Name, h.Mode, h.Typeflag = h.Name+"/", 0o755, tar.TypeDir
		} else if b, err = os.ReadFile(file); err != nil { //nolint:gosec // the directory is this process's own
			return err
		}
		h.Size = int64(len(b))
		if err := w.WriteHeader(h); err != nil {
			return err
		}
		_, err = w.Write(b)
		return err
	})
	if err != nil {
		return 0, err
	}
	if err := w.Close(); err != nil {
		return 0, err
	}
	info, err := tmp.Stat()
	if err != nil {
		return 0, err
	}
	if err := tmp.Chmod(0o644); err != nil {
		return 0, err
	}
	return info.Size(), os.Rename(tmp.Name(), out)
}
