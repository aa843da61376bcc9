# weft's own processes built with the race detector, on the embedded Kubernetes. The e2e tests' cluster serves.
RACE_TESTS ?= ^(TestIdentities|TestDrift|TestHTTPRoute|TestCycles)$$

.PHONY: images-race test-race
images-race: envoy
	@mkdir -p bin/race $(IMAGES)/race
	CGO_ENABLED=1 go build -race -o bin/race/ ./controlplane ./nodeproxy
	@$(PACK) -o $(IMAGES)/race/controlplane.tar -ref weft.dev/controlplane:race -user 15000 -file bin/race/controlplane=/usr/local/bin/controlplane -entrypoint /usr/local/bin/controlplane
	@$(PACK) -o $(IMAGES)/race/nodeproxy.tar -ref weft.dev/nodeproxy:race -link /var/run=/run -dir /tmp -dir /run -dir /host -file bin/race/nodeproxy=/usr/local/bin/nodeproxy -file $(ENVOY)=/usr/local/bin/envoy,0111 -entrypoint /usr/local/bin/nodeproxy

test-race: demo-prepare images-race ## A short e2e with controller, agent and supervisor under the race detector
	@mkdir -p $(OUT)
	@$(CLUSTER) load $(IMAGES)/race/*.tar >/dev/null
	CGO_ENABLED=1 $(TIER) $(OUT)/race.log -name race go test -race -json -tags e2e -count=1 -parallel 8 -timeout 20m ./test/e2e -images race -run '$(RACE_TESTS)' -cycles 4
