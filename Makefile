# One line of truth per task. `make help` lists them.
SHELL       := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VERSION  ?= $(shell git describe --tags --always --dirty 2>/dev/null || echo dev)
BIN      := $(CURDIR)/bin
TOOLS    := $(CURDIR)/.bin
COMMANDS := csi-driver sds-agent kubectl-spiffe
LDFLAGS  := -s -w -X main.version=$(VERSION)
# Without request tracing, grpc carries no template engine: 3 MB less in memory.
BUILD    := CGO_ENABLED=0 go build -trimpath -tags grpcnotrace
GOLANGCI := v2.15.0
comma    := ,
# The race detector needs a C compiler; without one the tests run, but say so.
RACE     := $(shell command -v cc >/dev/null 2>&1 && echo -race)

.PHONY: help all build demo test unit sanity node-test e2e fuzz-short lint fmt generate generate-check bench tools clean images deploy-test manifests

help: ## this list
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## /{printf "  %-16s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

all: build lint test ## everything a change must pass

build: ## static binaries in bin/
	@mkdir -p $(BIN)
	$(BUILD) -ldflags '$(LDFLAGS)' -o $(BIN)/ $(addprefix ./cmd/,$(COMMANDS))

demo: build ## the whole product on this machine in under a minute, nothing left behind
	@mkdir -p $(BIN)
	@$(BUILD) -o $(BIN)/ ./test/demo
	@$(BIN)/demo -bin $(BIN)

test: unit sanity deploy-test node-test ## all tests; as root the mount tests are real, and so is the kubelet

unit: ## tests of the product and its interoperation, with the race detector
	go vet ./...
	@[ -n "$(RACE)" ] || echo "NOTE: no C compiler found: the tests run without the race detector"
	go test $(RACE) -timeout 20m $$(go list ./... | grep -v /test/)
	go test $(RACE) -timeout 20m -count=1 ./test/... # these build and run the commands: no result may be cached

sanity: ## csi-sanity against the real driver
	cd test/sanity && go test $(RACE) -count=1 -timeout 10m -v ./...

node-test: ## the main path on a real kubelet in a few minutes (root; else says that it was not run)
	./test/e2e/run.sh -if-possible -short -run '^TestCI$$'

e2e: ## a real Kubernetes node on this machine (root; builds Kubernetes once, installs containerd)
	./test/e2e/run.sh $(ARGS)

fuzz-short: ## every fuzz target for ten seconds
	@for pkg in $$(grep -rl --include='*_test.go' '^func Fuzz' . | xargs -n1 dirname | sort -u); do \
	  for f in $$(grep -h -o '^func Fuzz[A-Za-z0-9_]*' $$pkg/*_test.go | sed 's/func //'); do \
	    echo "== $$pkg $$f"; go test -run '^$$' -fuzz "^$$f$$" -fuzztime 10s $$pkg; done; done

lint: $(TOOLS)/golangci-lint ## golangci-lint, all modules
	$(TOOLS)/golangci-lint run ./...
	cd test/sanity && $(TOOLS)/golangci-lint run --config ../../.golangci.yml ./...
	cd deploy/rendertest && $(TOOLS)/golangci-lint run --config ../../.golangci.yml ./...
	cd deploy/images && $(TOOLS)/golangci-lint run --config ../../.golangci.yml ./...
	cd deploy/istio/injecttest && $(TOOLS)/golangci-lint run --config ../../../.golangci.yml ./...

fmt: $(TOOLS)/golangci-lint ## format
	$(TOOLS)/golangci-lint fmt ./...

generate: ## regenerate protobuf code (needs protoc; installs the Go plugins)
	go generate ./internal/spirewire/... ./internal/adminapi/...

generate-check: generate ## fail if generated code is stale
	git diff --exit-code -- internal/spirewire internal/adminapi internal/watchpb

# Images are for linux; each platform has its own binaries, of all commands there are.
PLATFORMS    ?= linux/amd64
IMAGE_PREFIX ?= ghcr.io/spiffe-node
IMAGE_TAG    ?= $(VERSION)
IMAGE_BIN    := $(CURDIR)/dist/bin

images: ## OCI archives in dist/, without Docker; the same source gives the same bytes
	@for p in $(subst $(comma), ,$(PLATFORMS)); do \
	  dir=$(IMAGE_BIN)/$${p%/*}-$${p#*/}; mkdir -p "$$dir"; \
	  CGO_ENABLED=0 GOOS=$${p%/*} GOARCH=$${p#*/} go build -trimpath -buildvcs=false -ldflags '$(LDFLAGS)' -o "$$dir/" ./cmd/...; done
	@cd deploy/images && go run . -bin $(IMAGE_BIN) -out $(CURDIR)/dist -prefix $(IMAGE_PREFIX) -tag $(IMAGE_TAG) -platforms $(PLATFORMS)

deploy-test: ## chart, manifests, images and Istio files
	cd deploy/rendertest && go vet ./... && go test -count=1 ./...
	cd deploy/images && go vet ./... && go test -count=1 ./...
	cd deploy/istio/injecttest && go vet ./... && go test -count=1 ./...

manifests: ## render deploy/manifests from the charts
	cd deploy/rendertest && go test -count=1 -run TestManifests . -update

bench: build ## figures: Go benchmarks, then the load tool against the agent
	./test/load/bench.sh

tools: $(TOOLS)/golangci-lint ## developer tools, pinned, into .bin/

$(TOOLS)/golangci-lint: Makefile
	GOBIN=$(TOOLS) go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI)

clean: ## remove what was built
	rm -rf $(BIN)
