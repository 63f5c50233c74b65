# Everything that is done with this repository. `make` alone lists the targets.
#
# All targets but `image`, `release` and `bench` use one cargo profile, so that
# the C core of gRPC is compiled once for a checkout.

CARGO ?= cargo
CARGO_FLAGS ?= --locked
IMAGE ?= meridio-proxy
VERSION ?= $(shell git describe --tags --always --dirty 2>/dev/null)

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: deps
deps: ## Install what building and testing needs, or say what is missing
	@scripts/install-deps.sh

.PHONY: build
build: deps ## Build the daemon, the lab and all tests
	$(CARGO) build $(CARGO_FLAGS) --workspace --all-targets

.PHONY: test
test: build ## Run every test; fails where network namespaces are denied
	scripts/check-compat.sh scripts/netns-run.sh $(CARGO) test $(CARGO_FLAGS) --workspace

.PHONY: mutate
mutate: deps ## Break the code for ten MUSTs of docs/compat.md; their tests must fail
	CARGO="$(CARGO)" CARGO_FLAGS="$(CARGO_FLAGS)" scripts/mutate.sh

.PHONY: demo
demo: deps ## Bring up targets, load balancers and the daemon, send traffic, report
	$(CARGO) build $(CARGO_FLAGS) --workspace --bins
	scripts/netns-run.sh target/debug/demo

.PHONY: interop
interop: deps ## The daemon in a mesh of the NSM SDK's own chains; needs Go; 10 minutes
	CARGO_BUILD_FLAGS="$(CARGO_BUILD_FLAGS)" scripts/interop.sh

.PHONY: interop-full
interop-full: deps ## The same with all SDK versions, SPIRE and long refresh; half an hour
	CARGO_BUILD_FLAGS="$(CARGO_BUILD_FLAGS)" scripts/interop.sh full

.PHONY: bench
bench: release ## Measure the optimised daemon in the lab; fails when an aim is missed
	$(CARGO) build $(CARGO_FLAGS) --package meridio-lab --bin bench
	MERIDIO_PROXY_BINARY=$(CURDIR)/target/release/proxy scripts/netns-run.sh target/debug/bench $(BENCH)

.PHONY: fmt
fmt: ## Format the code
	$(CARGO) fmt --all

.PHONY: lint
lint: deps ## Formatting and lints, warnings as errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(CARGO_FLAGS) --workspace --all-targets -- -D warnings

.PHONY: doc
doc: deps ## The API documentation, warnings as errors
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc $(CARGO_FLAGS) --no-deps --workspace

.PHONY: deny
deny: ## Dependency bans, licences, sources and, where the database is, advisories
	@scripts/deny.sh

.PHONY: check
check: lint doc test demo interop deny ## What CI runs

.PHONY: release
release: deps ## The optimised daemon: target/release/proxy
	MERIDIO_PROXY_VERSION="$(VERSION)" $(CARGO) build $(CARGO_FLAGS) --release --bin proxy

.PHONY: image
image: ## The container image
	docker build --build-arg VERSION="$(VERSION)" --tag "$(IMAGE):$(or $(VERSION),latest)" .

.PHONY: clean
clean: ## Remove what was built
	$(CARGO) clean
