.PHONY: generate-crds
generate-crds: ## Rebuild deep copies and CRDs of api/v1alpha1
	@mkdir -p $(BIN)
	@test -x $(BIN)/controller-gen || GOBIN=$(BIN) go install sigs.k8s.io/controller-tools/cmd/controller-gen@$(CONTROLLER_GEN)
	$(BIN)/controller-gen object paths=./api/v1alpha1 crd paths=./api/v1alpha1 output:crd:dir=charts/weft-crds/templates
