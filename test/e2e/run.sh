#!/usr/bin/env bash
# Runs the end-to-end tests on a real Kubernetes node made on this machine.
# Installs the Debian packages that are missing, builds Kubernetes once into
# the cache (minutes), then runs `go test` with the given arguments.
#   test/e2e/run.sh                         everything
#   test/e2e/run.sh -run TestProduct        one test
#   E2E_KEEP=10m test/e2e/run.sh            look around afterwards
#   test/e2e/run.sh -if-possible ...        where it cannot run, say so and succeed
#   E2E_ARTIFACTS=DIR                       where failures leave the cluster's state
set -euo pipefail
cd "$(dirname "$0")"

optional=
if [ "${1-}" = -if-possible ]; then
  optional=yes
  shift
fi

# unable ends the run for a reason that lies in the machine.
unable() {
  if [ -n "$optional" ]; then
    printf '\nNOTE: the tests on a real kubelet WERE NOT RUN: %s\n\n' "$1" >&2
    exit 0
  fi
  echo "test/e2e: $1" >&2
  exit 1
}

if [ "$(id -u)" != 0 ]; then
  unable "they need root (kubelet and containerd do); try sudo -E $0"
fi
command -v unshare >/dev/null && unshare --mount --pid --net --uts --ipc --fork true 2>/dev/null ||
  unable "this machine does not permit new namespaces, as in a container without privileges"
[ -w /sys/fs/cgroup ] || unable "/sys/fs/cgroup is not writable"

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
  command -v apt-get >/dev/null || unable "${missing[*]} are missing, and there is no apt-get to install them"
  echo "test/e2e: installing ${missing[*]}" >&2
  export DEBIAN_FRONTEND=noninteractive
  apt-get install -y --no-install-recommends "${missing[@]}" >/dev/null 2>&1 || {
    apt-get update >/dev/null || true
    apt-get install -y --no-install-recommends "${missing[@]}" >/dev/null ||
      unable "${missing[*]} could not be installed"
  }
fi

go vet ./...
go test ./cluster ./probe
exec go test -count=1 -timeout 40m -v "$@" .
