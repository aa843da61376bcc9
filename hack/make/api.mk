PROTOC_GEN_GO := v1.36.12
PROTOC_GEN_GO_GRPC := v1.6.0
CONTROLLER_GEN := v0.23.0
BIN := $(CURDIR)/bin

.PHONY: generate-proto
generate-proto: ## Rebuild the Go side of api/mesh/v1/mesh.proto
	@mkdir -p $(BIN)
	GOBIN=$(BIN) GOFLAGS=-mod=mod go install google.golang.org/protobuf/cmd/protoc-gen-go@$(PROTOC_GEN_GO)
	GOBIN=$(BIN) GOFLAGS=-mod=mod go install google.golang.org/grpc/cmd/protoc-gen-go-grpc@$(PROTOC_GEN_GO_GRPC)
	PATH=$(BIN):$$PATH protoc -I . --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative api/mesh/v1/mesh.proto
