# The supervisor and the relay against the real Envoy, without Kubernetes and without the hooks.

.PHONY: test-envoy
test-envoy: ## The supervisor and the relay on the real Envoy (root, make envoy)
	@mkdir -p $(OUT)
	CGO_ENABLED=1 $(TIER) $(OUT)/envoy.log -name envoy go test -race -json -count=1 -timeout 20m ./nodeproxy/internal/envoy/... ./nodeproxy/internal/relay/...
