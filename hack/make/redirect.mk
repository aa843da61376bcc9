# The kernel hooks: generated objects and their tests in network namespaces.

.PHONY: generate-bpf check-bpf test-netns
generate-bpf: ## Build the eBPF object and its Go side (clang; the result is committed)
	go generate ./redirect

check-bpf: generate-bpf ## Fail unless the committed eBPF object is what the sources make
	git diff --exit-code --stat -- redirect/weft_bpfel.go redirect/weft_bpfel.o

test-netns: ## Run the hooks in real network namespaces, with the race detector (root; RACE=0 without)
	@mkdir -p $(OUT)
	CGO_ENABLED=$(if $(filter 0,$(RACE)),0,1) $(TIER) $(OUT)/netns.log -name netns go test $(if $(filter 0,$(RACE)),,-race) -json -count=1 -timeout 20m ./redirect ./test/netns
