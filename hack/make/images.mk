IMAGES := $(CURDIR)/.out/images
ENVOY := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/weft/envoy/1.40.0/envoy
PACK := go run ./hack/image

.PHONY: images images-test images-other
images: build ## Build the images into .out/images (no Docker needed)
	@$(PACK) -o $(IMAGES)/controlplane.tar -ref weft.dev/controlplane:dev -user 15000 -file bin/controlplane=/usr/local/bin/controlplane -entrypoint /usr/local/bin/controlplane
	@$(PACK) -o $(IMAGES)/nodeproxy.tar -ref weft.dev/nodeproxy:dev -link /var/run=/run -dir /tmp -dir /run -dir /host -file bin/nodeproxy=/usr/local/bin/nodeproxy -file $(ENVOY)=/usr/local/bin/envoy,0111 -entrypoint /usr/local/bin/nodeproxy

# The same with another version of Envoy.
images-other: build $(CACHE)/envoy/$(ENVOY_OTHER)/envoy
	@mkdir -p $(IMAGES)/other
	@$(PACK) -o $(IMAGES)/other/nodeproxy.tar -ref weft.dev/nodeproxy:other -link /var/run=/run -dir /tmp -dir /run -dir /host -file bin/nodeproxy=/usr/local/bin/nodeproxy -file $(CACHE)/envoy/$(ENVOY_OTHER)/envoy=/usr/local/bin/envoy,0111 -entrypoint /usr/local/bin/nodeproxy

images-test: images ## Build the images of the example shop and of the tests
	@$(PACK) -o $(IMAGES)/shop.tar -ref weft.dev/shop:dev -user 10001 -file bin/shop=/usr/local/bin/shop -entrypoint /usr/local/bin/shop
	@$(PACK) -o $(IMAGES)/load.tar -ref weft.dev/test-load:dev -user 10001 -file bin/load=/usr/local/bin/load -entrypoint /usr/local/bin/load
	@$(PACK) -o $(IMAGES)/redis.tar -ref weft.dev/test-redis:dev -user 10001 -dir /tmp -dir /data -file /usr/bin/redis-server=/usr/local/bin/redis-server -file /usr/bin/redis-cli=/usr/local/bin/redis-cli -entrypoint /usr/local/bin/redis-server
	@$(PACK) -o $(IMAGES)/mariadb.tar -ref weft.dev/test-mariadb:dev -user 10001 -dir /tmp -dir /data -file /usr/sbin/mariadbd=/usr/local/bin/mariadbd -file /usr/bin/mariadb=/usr/local/bin/mariadb -file /usr/bin/sleep=/usr/local/bin/sleep -file /usr/share/mysql/english/errmsg.sys=/usr/share/mysql/english/errmsg.sys -file /usr/share/mysql/charsets/Index.xml=/usr/share/mysql/charsets/Index.xml -entrypoint /usr/local/bin/mariadbd
