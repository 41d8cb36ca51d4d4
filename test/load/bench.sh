#!/usr/bin/env bash
# Figures of this machine: Go benchmarks of the hot paths, then the load tool
# against a fresh agent. Point the load tool at another agent's socket to
# compare; see docs/figures.md.
set -euo pipefail
cd "$(dirname "$0")/../.."

go test -run '^$' -bench 'Match/|SignX509|Subscribe|Encode|Bind$|Publish' -benchtime 300ms \
  ./pkg/attest ./pkg/authority/embedded ./pkg/csi ./pkg/entry ./pkg/sds ./pkg/svid | grep -E '^(Benchmark|pkg:)'

dir=$(mktemp -d /dev/shm/spiffe-node-bench-XXXXXX)
chmod 755 "$dir" # workloads of other users connect too
go build -o "$dir/load" ./test/load
cat > "$dir/agent.yaml" <<C
apiVersion: config.spiffe-node.io/v1alpha1
kind: AgentConfiguration
trustDomain: example.org
node: {name: bench}
socket: {directory: $dir/public}
admin: {socketPath: $dir/admin/api.sock}
authority: {embedded: {statePath: $dir/authority/authority.db}}
identity: {stateDirectory: $dir/state}
limits: {connections: 9000, connectionsPerUID: 9000, connectionsPerPod: 9000, parkedPerPod: 9000}
health: {address: "127.0.0.1:29984"}
C
bin/sds-agent --config "$dir/agent.yaml" 2> "$dir/log" &
agent=$!
trap 'kill $agent 2>/dev/null; wait $agent 2>/dev/null || true; rm -rf "$dir"' EXIT
until curl -fs -o "$dir/ready" http://127.0.0.1:29984/readyz; do sleep 0.05; done

parent=spiffe://example.org/spire/agent/local/bench
cli() { bin/kubectl-spiffe "$@" -socketPath "$dir/admin/api.sock"; }
id=$(cli entry create -parentID $parent -spiffeID spiffe://example.org/bench -selector "unix:uid:$(id -u)" | sed -n 's/^Entry ID *: //p')

"$dir/load" steady -server-pid $agent -duration 3s
"$dir/load" streams -socket "$dir/public/socket" -n 1000 -server-pid $agent -metrics http://127.0.0.1:29984/metrics
"$dir/load" fetch -socket "$dir/public/socket" -clients 8 -duration 5s -server-pid $agent
"$dir/load" fanout -socket "$dir/public/socket" -n 1000 -rounds 8 -server-pid $agent \
  -cmd "bin/kubectl-spiffe entry update -socketPath $dir/admin/api.sock -entryID $id -parentID $parent -spiffeID spiffe://example.org/bench -selector unix:uid:$(id -u) -x509SVIDTTL \$((3600 + {round}))"
as=(); [ "$(id -u)" = 0 ] || as=(-as id)
"$dir/load" create -socket "$dir/public/socket" -admin "$dir/admin/api.sock" -parent $parent -count 100 -parallel 10 -server-pid $agent "${as[@]}"
