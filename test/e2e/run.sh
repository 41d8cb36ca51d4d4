#!/usr/bin/env bash
# Runs the end-to-end tests on a real Kubernetes node made on this machine.
# Installs the Debian packages that are missing, builds Kubernetes once into
# the cache (minutes), then runs `go test` with the given arguments.
#   test/e2e/run.sh                         everything
#   test/e2e/run.sh -run TestProduct        one test
#   E2E_KEEP=10m test/e2e/run.sh            look around afterwards
#   E2E_ARTIFACTS=DIR                       where failures leave the cluster's state
set -euo pipefail
cd "$(dirname "$0")"

if [ "$(id -u)" != 0 ]; then
  echo "test/e2e: needs root (kubelet and containerd do); try sudo -E $0" >&2
  exit 1
fi

missing=()
have() { command -v "$1" >/dev/null || missing+=("$2"); }
have containerd containerd
have runc runc
have etcd etcd-server
have ip iproute2
have iptables iptables
have nsenter util-linux
[ -x /usr/lib/cni/bridge ] || missing+=(containernetworking-plugins)
if [ ${#missing[@]} -gt 0 ]; then
  echo "test/e2e: installing ${missing[*]}" >&2
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1 || {
    apt-get update >/dev/null
    apt-get install -y --no-install-recommends "${missing[@]}" >/dev/null
  }
fi

go vet ./...
go test ./cluster ./probe
exec go test -count=1 -timeout 40m -v "$@" .
