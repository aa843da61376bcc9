# weft: `make` alone prints this help. Every area of the tree owns a .mk file beside its code.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
export GOTOOLCHAIN := local
export CGO_ENABLED ?= 0

AREAS := $(sort $(wildcard hack/make/*.mk))
include $(AREAS)

.PHONY: help
help: ## Print this help
	@grep -hE '^[a-zA-Z0-9_-]+:.*?## ' Makefile $(AREAS) | sort | awk -F':.*?## ' '{printf "  \033[1m%-18s\033[0m %s\n", $$1, $$2}'
