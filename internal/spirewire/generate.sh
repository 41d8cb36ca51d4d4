#!/bin/sh
# Regenerates the committed Go code of every .proto in this module.
# Needs protoc (Debian: protobuf-compiler 3.21 or later); the two plugins are
# installed here at the versions the committed code was made with.
set -eu

cd "$(dirname "$0")/../.."
bin="${PLUGIN_BIN:-$PWD/.bin}"
module=github.com/spiffe-node/spiffe-node

if [ ! -x "$bin/protoc-gen-go" ]; then
	GOBIN="$bin" go install google.golang.org/protobuf/cmd/protoc-gen-go@v1.36.12
fi
if [ ! -x "$bin/protoc-gen-go-grpc" ]; then
	GOBIN="$bin" go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@v1.6.2
fi

PATH="$bin:$PATH" protoc -I . \
	--go_out=. --go_opt=module="$module" \
	--go-grpc_out=. --go-grpc_opt=module="$module" \
	internal/spirewire/*pb/*.proto internal/adminapi/*pb/*.proto internal/watchpb/*.proto
