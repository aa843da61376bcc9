# Envoy's configuration: golden files, the real Envoy on them, and the whole data path without Kubernetes.

.PHONY: golden test-contract test-datapath demo-small
golden: ## Rewrite the golden files and remove orphans
	go test -count=1 ./nodeproxy/internal/lds ./nodeproxy/internal/envoy ./controlplane/internal/xds -run '^(TestListeners|TestBootstrap|TestResources)$$' -update

test-contract: ## Load every generated configuration into the real Envoy, and run the data path (root, make envoy)
	@mkdir -p $(OUT)
	CGO_ENABLED=1 $(TIER) $(OUT)/contract.log -name contract go test -race -json -count=1 -p 1 -timeout 20m ./test/contract/... ./test/datapath/...

test-datapath: ## Real hooks and real Envoys on two nodes made of namespaces (root, make envoy)
	go test -count=1 -timeout 5m ./test/datapath/...

demo-small: small-preflight envoy ## The first taste: two pods as namespaces, real hooks, real Envoy, mTLS and one policy (root, under a minute)
	@go run ./test/datapath/demo

.PHONY: small-preflight
small-preflight:
	@hack/preflight.sh 1024 3072 envoy
