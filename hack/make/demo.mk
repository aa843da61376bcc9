GATEWAY_API = $(shell go list -m -f '{{.Dir}}' sigs.k8s.io/gateway-api)/config/crd/standard

.PHONY: demo demo-prepare
demo: demo-prepare ## Bring a running shop into the mesh on the embedded Kubernetes, step by step
	@go run ./test/demo -root .

# Everything that demo, e2e tests and benchmarks need in the cluster.
demo-prepare: preflight deps cluster-up images-test
	@echo "loading images onto the nodes"
	@$(CLUSTER) load $(IMAGES)/*.tar >/dev/null
	@.cluster/kubectl apply -f $(GATEWAY_API) >/dev/null
