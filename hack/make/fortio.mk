# fortio makes the load of the data path's benchmark. It is a program of its own, not linked into weft.
FORTIO_VERSION := 1.66.5
FORTIO := $(CACHE)/fortio/$(FORTIO_VERSION)/fortio

.PHONY: fortio
fortio: $(FORTIO) ## Build fortio, the benchmark's generator, into the cache
$(FORTIO):
	GOBIN=$(dir $@) go install -trimpath fortio.org/fortio@v$(FORTIO_VERSION)
