# Measurements. Nothing here asserts a time: the machines are shared, figures go to docs/benchmarks.

.PHONY: bench soak
bench: demo-prepare ## Measure enrolment, propagation and memory on the embedded Kubernetes; JSON in .out/bench.json
	go run ./test/bench -root . -out $(OUT)/bench.json

soak: demo-prepare ## The long forms of the e2e tests: 600 cycles, 300 policy changes, 10,000 updates, 50 rolling restarts, 200 pods that come and go, a change of root (hours)
	$(MAKE) --no-print-directory test-e2e E2E="-run 'TestCycles|TestPolicyChanges|TestHammer|TestRollingRestarts|TestPodsComeAndGo|TestAgentKilled|TestEnvoyKilledUnderLoad|TestControllersAwayForLong|TestRootRotation' -rotate -rollouts 10 -pods 200 -kills 100 -crashes 100 -away 10m -cycles 600 -changes 300 -updates 10000 -timeout 300m"
