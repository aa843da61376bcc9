# The hooks on other kernels: Debian's 6.1 and 6.12 under qemu. Kernels are cached for all clones.

.PHONY: test-kernels
test-kernels: ## Run the hooks' tests on Debian's kernels 6.1 and 6.12 under qemu (no KVM needed)
	@mkdir -p $(OUT)
	$(TIER) $(OUT)/kernels.log -name kernels go test -json -count=1 -timeout 30m ./test/kernels/selftest -logs $(OUT)

.PHONY: kernels-clean
cache-clean: kernels-clean
kernels-clean: ## Delete the cached kernels, so that the next test fetches the newest
	rm -rf $(CACHE)/kernels
