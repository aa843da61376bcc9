# The embedded Kubernetes (test/cluster).
CLUSTER := .cluster/bin/cluster
NODES ?= 2
SLOT ?= 0

# MiB of free memory and disk: while a cluster runs; to start one; to build its programs first.
CLUSTER_NEEDS = $(if $(wildcard .cluster/cluster.json),512 1024,$(if $(wildcard $(CACHE)/kubernetes-*/bin/helm),2048 3072,3072 9216))

.PHONY: preflight
preflight: # What make itself needs; cluster-check, a Go program, looks at the rest.
	@hack/preflight.sh $(CLUSTER_NEEDS)

.PHONY: cluster-program
cluster-program:
	@go build -trimpath -o $(CLUSTER) ./test/cluster/cmd/cluster

.PHONY: cluster-up
cluster-up: preflight cluster-program ## Start the embedded Kubernetes: NODES=1..4 (2), SLOT=0..7 (0: address ranges)
	@$(CLUSTER) up --nodes $(NODES) --slot $(SLOT)

.PHONY: cluster-down
cluster-down: cluster-program ## End the embedded Kubernetes; only its logs stay
	@$(CLUSTER) down

.PHONY: cluster-build
cluster-build: cluster-program ## Build the embedded Kubernetes into the cache without starting it
	@$(CLUSTER) build

.PHONY: cluster-check
cluster-check: preflight cluster-program ## List everything this machine lacks for the embedded Kubernetes
	@$(CLUSTER) check --nodes $(NODES) --slot $(SLOT)

.PHONY: cluster-load
cluster-load: cluster-program ## Put image tarballs on all nodes: IMAGE="file.tar ..."
	@$(if $(IMAGE),,echo 'cluster-load: name the tarballs: make cluster-load IMAGE=file.tar' >&2; exit 1;) $(CLUSTER) load $(IMAGE)

.PHONY: cluster-require
cluster-require: cluster-program ## Let the nodes make no container while weft's agent is away (after helm install); PLUGINS= undoes it
	@$(CLUSTER) require $(PLUGINS)
PLUGINS ?= weft

.PHONY: cluster-status
cluster-status: cluster-program ## Show the cluster's machines and how to enter them
	@$(CLUSTER) status

.PHONY: node-stop
node-stop: cluster-program ## End node N=1 as a shutdown does; HARD=1 as a power cut
	@$(CLUSTER) node-stop --n $(or $(N),0) $(if $(HARD),--hard)

.PHONY: node-start
node-start: cluster-program ## Start the stopped node N=1 with a new boot id
	@$(CLUSTER) node-start --n $(or $(N),0)

.PHONY: cache-clean
cache-clean: cluster-program ## Delete the built programs of the embedded Kubernetes, all versions
	@$(CLUSTER) cache-clean

.PHONY: test-cluster
test-cluster: cluster-program ## Test the embedded Kubernetes itself; it must be down, and is down afterwards
	@mkdir -p $(OUT)
	@SLOT=$(SLOT) $(TIER) $(OUT)/cluster.log -name cluster go test -json -count=1 -timeout 30m -tags e2e -run TestCluster ./test/cluster
