# Measurements. Nothing here asserts a time: the machines are shared, figures go to docs/benchmarks.

BENCH ?= -docs docs/benchmarks

.PHONY: bench bench-datapath bench-kubernetes soak
bench: bench-datapath bench-kubernetes ## Measure everything: the data path first, while no cluster runs (about 25 and 20 minutes)

bench-datapath: envoy fortio ## Measure traffic with weft, two sidecars and no mesh, and the mesh's size, into docs/benchmarks (root; BENCH=-quick: two minutes, writes nothing)
	@hack/deps.sh bench
	go build -trimpath -o bin/bench-datapath ./test/bench/datapath
	bin/bench-datapath -root . -fortio $(FORTIO) -out $(OUT)/datapath.json $(BENCH)

bench-kubernetes: demo-prepare ## Measure enrolment, propagation and memory on the embedded Kubernetes; JSON in .out/bench.json
	go run ./test/bench -root . -out $(OUT)/bench.json
	go run ./test/bench/shortcut -root . -out $(OUT)/bench-shortcut.json

soak: demo-prepare images-other ## The long forms of the e2e tests, all (hours) or some (SOAK="chaos upgrades"), into docs/benchmarks/soak.md
	@$(CLUSTER) load $(IMAGES)/other/*.tar >/dev/null
	go run ./test/bench/soak -root . -logs $(OUT)/soak -parts "$(SOAK)"
