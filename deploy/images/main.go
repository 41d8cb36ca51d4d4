// Command images packs the static binaries of this repository into OCI
// archives, without a Docker daemon and without a registry.
//
// It promises that the same binaries, names and time give the same bytes on
// every machine: what an archive holds is written in a fixed order with fixed
// owners, modes and times. Images are made from nothing: no shell, no package,
// no file that is not listed in Images.
package main

import (
	"flag"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"
)

// version is the images' tag when none is given.
const version = "dev"

func main() {
	if err := run(os.Args[1:], os.Getenv, os.Stdout, os.Stderr); err != nil {
		fmt.Fprintln(os.Stderr, "images:", err)
		os.Exit(1) //nolint:forbidigo // main exits
	}
}

// options is the command line.
type options struct {
	bin, out  string
	prefix    string
	tag       string
	platforms []Platform
	created   time.Time
}

func parse(args []string, getenv func(string) string, stderr io.Writer) (options, error) {
	var o options
	var platforms string
	fs := flag.NewFlagSet("images", flag.ContinueOnError)
	fs.SetOutput(stderr)
	fs.StringVar(&o.bin, "bin", "bin", "directory with a directory of static binaries per platform: linux-amd64, ...")
	fs.StringVar(&o.out, "out", "dist", "directory for the archives, made if it is missing")
	fs.StringVar(&o.prefix, "prefix", "ghcr.io/spiffe-node", "what stands before the images' names")
	fs.StringVar(&o.tag, "tag", version, "the images' tag")
	fs.StringVar(&platforms, "platforms", "linux/amd64", "platforms, with commas between")
	if err := fs.Parse(args); err != nil {
		return o, err
	}
	if fs.NArg() > 0 {
		return o, fmt.Errorf("unexpected argument %q", fs.Arg(0))
	}
	for p := range strings.SplitSeq(platforms, ",") {
		goos, arch, ok := strings.Cut(strings.TrimSpace(p), "/")
		if !ok || goos != "linux" || arch == "" {
			return o, fmt.Errorf("-platforms: %q is not linux/ARCH", p)
		}
		o.platforms = append(o.platforms, Platform{goos, arch})
	}
	o.created = time.Unix(0, 0).UTC()
	if s := getenv("SOURCE_DATE_EPOCH"); s != "" {
		n, err := strconv.ParseInt(s, 10, 64)
		if err != nil || n < 0 {
			return o, fmt.Errorf("SOURCE_DATE_EPOCH %q is not a number of seconds", s)
		}
		o.created = time.Unix(n, 0).UTC()
	}
	return o, nil
}

// run packs every image whose binaries are there and says what it made.
func run(args []string, getenv func(string) string, stdout, stderr io.Writer) error {
	o, err := parse(args, getenv, stderr)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(o.out, 0o755); err != nil { //nolint:gosec // archives are for everybody
		return err
	}
	made := 0
	for _, img := range Images() {
		if missing := img.missing(o.bin, o.platforms); missing != "" {
			fmt.Fprintf(stderr, "images: no %s image: there is no %s\n", img.Name, missing)
			continue
		}
		ref := o.prefix + "/" + img.Name + ":" + o.tag
		path := filepath.Join(o.out, img.Name+".tar")
		digest, size, err := pack(img, o, ref, path)
		if err != nil {
			return fmt.Errorf("%s: %w", img.Name, err)
		}
		fmt.Fprintf(stdout, "%s %s %s %.1f MB\n", ref, digest, path, float64(size)/1e6)
		made++
	}
	if made == 0 {
		return fmt.Errorf("no binaries in %s; run make images, which builds them", o.bin)
	}
	return nil
}
