# Portolan. `make up` runs a whole local fleet, `make test` everything a merge needs.
SHELL := /bin/bash
.DEFAULT_GOAL := build

GO ?= go
BIN := bin
TOOLS := $(CURDIR)/.tools
BUF_VERSION := 1.75.0
GOLANGCI_VERSION := v2.15.0
BENCHSTAT_VERSION := v0.0.0-20260908200009-22c9c6c9d4da
# Statically linked, so that the same files run inside namespaces and images.
export CGO_ENABLED ?= 0
COMMANDS := portolan portolan-federation portolan-cluster portolan-node
# Packages with unit, scenario, property and in-process tests; e2e/live has a target of its own.
UNIT = $(shell $(GO) list ./... | grep -v -e /e2e/live)
# Which benchmarks, and how often each: benchstat wants six for an interval.
BENCH ?= T[0-9]+
BENCH_COUNT ?= 6
# Random cases of every property, and events over the model cluster; SEED replays
# what a failure names.
SIM_CASES ?= 100000
SIM_EVENTS ?= 1000000
SIM = ./federation/place ./cluster/schedule ./cluster/reconcile ./cluster/autoscale
RUN_ENV = PATH="$(TOOLS)/bin:$$PATH"

.PHONY: plots build images up down test unit e2e check fmt proto proto-check lint sim bench charts fuzz tools clean help

help: ## Show the targets
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

build: ## Build the binaries into bin/
	@mkdir -p $(BIN)
	$(GO) build -trimpath -o $(BIN)/ ./federation/cmd/... ./cluster/cmd/... ./nodeagent/cmd/...

images: ## Build the sample's container images into bin/images
	@$(GO) run ./e2e/storefront/images -out $(BIN)/images

tools: ## Install what is missing: containerd, runc, PostgreSQL, nftables, iproute2, Envoy
	@e2e/tools/install.sh

up: tools build images ## Run a whole local fleet with a sample application
	@$(RUN_ENV) $(BIN)/portolan up --detach --fleet e2e/fleet.yaml

down: ## Stop the local fleet (its data stays; `bin/portolan down --purge` deletes it)
	@$(BIN)/portolan down

test: tools unit e2e ## Everything a merge needs: race, invariants, shuffle, real parts

unit: ## Unit, scenario, property and in-process tests
	CGO_ENABLED=1 $(RUN_ENV) $(GO) test -race -tags invariants -shuffle on -timeout 20m $(UNIT)

e2e: tools build images ## Live tests on a real local fleet
	$(RUN_ENV) $(GO) test -count 1 -timeout 40m -v ./e2e/live/...

check: fmt lint proto-check ## Format, vet, lint, architecture table, generated code, protos; runs no tests
	$(GO) vet -tags invariants ./...
	cd e2e/peers && $(GO) vet ./...

fmt:
	@out=$$($(GO) run mvdan.cc/gofumpt -l .); test -z "$$out" || { echo "not gofumpt-formatted:"; echo "$$out"; exit 1; }

lint:
	$(GO) run github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$(GOLANGCI_VERSION) run --build-tags invariants ./...

proto: $(TOOLS)/buf-$(BUF_VERSION) ## Generate Go from the protos
	cd federation/api && $(TOOLS)/buf-$(BUF_VERSION) generate

proto-check: $(TOOLS)/buf-$(BUF_VERSION)
	cd federation/api && $(TOOLS)/buf-$(BUF_VERSION) lint
	@if git rev-parse -q --verify origin/main >/dev/null && git cat-file -e origin/main:federation/api/buf.yaml 2>/dev/null; then \
	  cd federation/api && $(TOOLS)/buf-$(BUF_VERSION) breaking --against "../../.git#branch=origin/main,subdir=federation/api"; fi
	cd federation/api && $(TOOLS)/buf-$(BUF_VERSION) generate && git diff --exit-code -- '*.pb.go'

$(TOOLS)/buf-$(BUF_VERSION):
	@e2e/tools/install.sh buf $(BUF_VERSION)

sim: ## Random cases of every property against brute force, and a million events over a model cluster (SEED= replays)
	SIM_CASES=$(SIM_CASES) SIM_EVENTS=$(SIM_EVENTS) SEED=$(SEED) $(GO) test -tags invariants -count 1 -timeout 3h $(SIM) $(if $(SEED),-rapid.seed=$(SEED))
	SIM_EVENTS=$(SIM_EVENTS) SEED=$(SEED) $(GO) test -tags invariants -count 1 -timeout 3h ./e2e/sim

bench: ## Benchmarks of docs/benchmarks.md in benchstat form, peers beside them (about 20 minutes; BENCH=T8 runs one)
	@mkdir -p $(BIN)
	set -o pipefail; $(RUN_ENV) $(GO) test -run '^$$' -bench 'Benchmark$(BENCH)_' -benchtime 500ms -count $(BENCH_COUNT) -timeout 30m \
	  $$(grep -rlE --include=*_test.go 'func Benchmark$(BENCH)_' federation cluster nodeagent xds policy identity e2e | grep -v ^e2e/peers/ | xargs -n1 dirname | sort -u | sed 's|^|./|') | tee $(BIN)/bench.txt
	set -o pipefail; cd e2e/peers && $(GO) test -run '^$$' -bench 'Benchmark$(BENCH)_' -benchtime 500ms -count $(BENCH_COUNT) -timeout 30m . | tee -a $(CURDIR)/$(BIN)/bench.txt
	$(GO) run golang.org/x/perf/cmd/benchstat@$(BENCHSTAT_VERSION) $(BIN)/bench.txt

charts: ## Lint the Helm charts strictly and compare the rendered goldens
	charts/check.sh

fuzz: ## Each fuzz target for FUZZTIME (30s)
	@for p in $$($(GO) list ./...); do d=$$($(GO) list -f '{{.Dir}}' $$p); for f in $$(grep -ohE '^func Fuzz[A-Za-z0-9_]+' $$d/*_test.go 2>/dev/null | sed 's/func //'); do \
	  echo "$$p $$f"; $(GO) test -run '^$$' -fuzz "^$$f\$$" -fuzztime $${FUZZTIME:-30s} $$p || exit 1; done; done

plots: ## Draw docs/figures from their tables
	cd e2e/plots && $(GO) vet ./... && $(GO) run . ../../docs/figures

clean: ## Remove built files
	rm -rf $(BIN)
