#!/bin/bash
# Builds kubectl spiffe for every platform of the Krew manifest, packs it the
# same way every time, and fills in the manifest.
#
#   deploy/krew/release.sh v0.2.0 dist [platform...]
#
# With platforms (linux/amd64) only those are built and named in the manifest: for
# trying it out with
#   kubectl krew install --manifest=dist/spiffe.yaml --archive=dist/kubectl-spiffe_v0.2.0_linux_amd64.tar.gz
set -euo pipefail

[[ $# -ge 2 && $1 =~ ^v[0-9]+\.[0-9]+\.[0-9]+ ]] || { echo "usage: $0 vX.Y.Z directory [os/arch...]" >&2; exit 2; }
version=$1
mkdir -p "$2"
dist=$(cd "$2" && pwd)
shift 2
cd "$(dirname "$0")/../.."
base=${BASE_URL:-https://github.com/spiffe-node/spiffe-node/releases/download/$version}
platforms=("$@")
[[ ${#platforms[@]} -gt 0 ]] || platforms=(linux/amd64 linux/arm64 darwin/amd64 darwin/arm64 windows/amd64)

fill=(-e "s|@VERSION@|$version|g" -e "s|@BASE@|$base|g")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
for platform in "${platforms[@]}"; do
  os=${platform%/*} arch=${platform#*/} bin=kubectl-spiffe
  [[ $os != windows ]] || bin=kubectl-spiffe.exe
  rm -rf "${work:?}/"*
  CGO_ENABLED=0 GOOS=$os GOARCH=$arch go build -trimpath -tags grpcnotrace -ldflags "-s -w -X main.version=$version" -o "$work/$bin" ./cmd/kubectl-spiffe
  cp LICENSE "$work/"
  archive=$dist/kubectl-spiffe_${version}_${os}_${arch}.tar.gz
  tar --sort=name --mtime=@0 --owner=0 --group=0 --numeric-owner --mode=u=rwX,go=rX -C "$work" -cf - "$bin" LICENSE | gzip -n9 > "$archive"
  sum=$(sha256sum "$archive" | cut -d' ' -f1)
  fill+=(-e "s|@SHA256_${os}_${arch}@|$sum|")
  echo "$sum  ${archive##*/}"
done
# A platform that was not built has no checksum and is left out; so are the
# template's own comments.
sed "${fill[@]}" deploy/krew/spiffe.yaml.tmpl | awk '
  /^#/ { next }
  /^  - selector:/ { if (block !~ /@SHA256/) printf "%s", block; block = "" ; inside = 1 }
  inside { block = block $0 "\n"; next }
  { print }
  END { if (block !~ /@SHA256/) printf "%s", block }' > "$dist/spiffe.yaml"
