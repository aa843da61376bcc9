OUT := $(CURDIR)/.out
TIER := go run ./hack/tier -summary $(OUT)/tiers -log

# Packages whose tests need no root, no Envoy and no network namespace.
UNIT = $(shell go list ./... | grep -vE '/test/(netns|contract|datapath|e2e|kernels/selftest|cluster/e2e)|/nodeproxy/internal/(envoy|relay)$$')

.PHONY: build test test-unit lint
build: ## Build controlplane, nodeproxy, weft and the test programs into bin/
	@mkdir -p bin
	go build -trimpath -ldflags '-s -w' -o bin/ ./controlplane ./nodeproxy ./examples/shop ./test/load/cmd/load
	go build -trimpath -ldflags '-s -w' -o bin/weft ./cli

lint: check-generated ## go vet, gofmt, generated files
	@test -z "$$(gofmt -l $$(git ls-files '*.go'))" || { echo "not formatted:"; gofmt -l $$(git ls-files '*.go'); exit 1; }
	go vet ./...

test-unit: ## Unit and golden tests, with the race detector
	@mkdir -p $(OUT)
	CGO_ENABLED=1 $(TIER) $(OUT)/unit.log -name unit go test -race -json $(UNIT)

test: ## Everything: installs what it needs, builds, runs all tiers (minutes: see README)
	@hack/test.sh

.PHONY: test-e2e test-demo test-demo-small
test-e2e: demo-prepare ## weft on the embedded Kubernetes (E2E="-run TestCycles -cycles 600" narrows and widens it)
	@mkdir -p $(OUT)
	CGO_ENABLED=1 $(TIER) $(OUT)/e2e.log -name e2e go test -race -json -tags e2e -count=1 -parallel 32 -timeout 60m ./test/e2e $(E2E)

test-demo: ## The demo as a test, on a cluster of its own; the cluster is down afterwards
	@mkdir -p $(OUT)
	@code=0; $(TIER) $(OUT)/demo.log -name demo -steps $(MAKE) --no-print-directory demo || code=1; \
	$(CLUSTER) down || code=1; exit $$code

test-demo-small: ## The small demo as a test
	@mkdir -p $(OUT)
	@$(TIER) $(OUT)/demo-small.log -name demo-small -steps $(MAKE) --no-print-directory demo-small

.PHONY: test-fresh
test-fresh: ## make test in a fresh Debian 12 root with empty caches, to find install steps that are missing (FRESH="make demo")
	@hack/fresh.sh $(FRESH)

.PHONY: check-generated
check-generated: ## Fail unless every generated file is what its sources make
	@hack/generated.sh $(MAKE) --no-print-directory generate-proto generate-crds generate-bpf
