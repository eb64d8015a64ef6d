# Coffer. `make` builds everything into bin/; CI runs these same targets (.ci/run).

# Debian packages that building and the demo need, and what tests need besides;
# `make deps` installs those that are missing.
DEPS := gcc libc6-dev pkg-config libseccomp-dev debian-archive-keyring qemu-system-x86 qemu-utils e2fsprogs erofs-utils
TEST_DEPS := cryptsetup-bin nftables busybox-static mmdebstrap shellcheck skopeo jq nfs-ganesha nfs-ganesha-mem xmlsec1
FUZZTIME ?= 20s

# sudo and cron often know no PATH to a Go that is not Debian's.
export PATH := $(PATH):/usr/local/go/bin:/usr/lib/go/bin
GO ?= go
ifeq ($(shell PATH="$(PATH)" $(GO) env GOVERSION 2>/dev/null),)
$(error No usable Go: `$(GO) env` fails or `$(GO)` is not in PATH nor in /usr/local/go/bin. Install Go 1.21 or newer; it fetches the version that go.mod asks for by itself)
endif

# What the guest runs must not depend on where or by whom it was built.
CGO_BUILD := GOFLAGS= GOOS=linux GOARCH=amd64 GOAMD64=v1 $(GO) build -trimpath -buildvcs=false
BUILD := CGO_ENABLED=0 $(CGO_BUILD)
VERSION := 0.1.0
LDFLAGS := -s -w -buildid= -X main.version=$(VERSION)
# Without it, whatever speaks gRPC holds a page of its requests for a browser, and what draws it.
TAGS := grpcnotrace
MAINS := $(addprefix bin/,hostbuild init agent snpguest kbs-client simplatform demo bench manuals)
GUEST := $(addprefix bin/,containerd containerd-shim-runc-v2 runc)
BASES := build/base/snp/base.json build/base/simulated/base.json
SOURCES := go.mod go.sum $(shell find agent cmd hostbuild images initramfs internal kbsclient test -type f ! -name '*_test.go' ! -path '*/testdata/*')

PREFIX ?= /usr/local

.PHONY: all deps base install deb test-deb test test-guest test-gpu test-nvidia test-e2e test-oracles bench demo regorus fuzz lint clean \
	test-nvflare test-nvflare-e2e test-nvflare-boot test-trustee soak test-gpu-hw
.DELETE_ON_ERROR:

all: $(MAINS) $(GUEST) bin/init-simulated bin/agent-simulated bin/snpguest-simulated bin/cvm_build bin/demo-workload bin/bench-idle bin/gpu-helper

$(MAINS) &: $(SOURCES)
	$(BUILD) -tags $(TAGS) -ldflags "$(LDFLAGS)" -o bin/ ./cmd/hostbuild ./cmd/init ./cmd/agent ./cmd/snpguest ./cmd/kbs-client ./cmd/manuals ./test/simplatform ./test/demo ./test/bench
	@touch $(MAINS)
bin/%-simulated: $(SOURCES)
	$(BUILD) -tags simulated,$(TAGS) -ldflags "$(LDFLAGS)" -o $@ ./cmd/$*
bin/demo-workload: test/demo/workload/main.go
	$(BUILD) -ldflags "$(LDFLAGS)" -o $@ ./$(<D)
bin/bench-idle: test/bench/idle/main.go
	$(BUILD) -ldflags "$(LDFLAGS)" -o $@ ./$(<D)
bin/cvm_build: bin/hostbuild # the name that NVFlare's guide uses
	ln -sf hostbuild $@
bin/containerd: go.mod go.sum $(wildcard cmd/containerd/*.go)
	$(BUILD) -tags $(TAGS) -ldflags "$(LDFLAGS)" -o $@ ./cmd/containerd
bin/containerd-shim-runc-v2: bin/containerd # it looks at the name it is called by
	ln -f $< $@
bin/runc: go.mod go.sum | deps # C inside: static, with libseccomp
	CGO_ENABLED=1 $(CGO_BUILD) -tags "seccomp urfave_cli_no_docs netgo osusergo" \
	-ldflags "$(LDFLAGS) -extldflags -static -X main.version=$$($(GO) list -m -f '{{.Version}}' github.com/opencontainers/runc | cut -c2-)" \
	-o $@ github.com/opencontainers/runc

bin/gpu-helper: $(SOURCES) | deps # NVML is loaded at run time: dynamic, and without bindnow
	CGO_ENABLED=1 CGO_CFLAGS=-Wno-deprecated-declarations $(CGO_BUILD) -ldflags "$(LDFLAGS)" -o $@ ./cmd/gpu-helper

deps:
	@for p in $(DEPS); do dpkg-query -W -f '$${db:Status-Status}' $$p 2>/dev/null | grep -q '^installed' || missing="$$missing $$p"; done; \
	test -z "$$missing" && test -n "$$(apt-get indextargets)" && exit; \
	test $$(id -u) = 0 || sudo=sudo; \
	echo "deps: apt-get update; apt-get install$$missing"; \
	$$sudo apt-get -qq update && $$sudo env DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends $$missing

# The packages of a base stay those of its first build until `make clean`;
# both bases are made of the same.
base: $(BASES)
build/base/%/base.json: bin/hostbuild bin/init bin/agent bin/snpguest bin/init-simulated bin/agent-simulated bin/snpguest-simulated $(GUEST) | deps
	bin/hostbuild base build --platform $* --programs bin --out build/base/$* --cache build/cache \
	$$(ls build/base/*/base.lock 2>/dev/null | head -n 1 | sed 's/^/--locked /')
build/base/simulated/base.json: build/base/snp/base.json

# `make all base` first, as a user; then this, which builds nothing any more.
SHARE = $(DESTDIR)$(PREFIX)/share
install: bin/hostbuild bin/kbs-client bin/manuals build/base/snp/base.json
	install -D -t $(DESTDIR)$(PREFIX)/bin bin/hostbuild bin/kbs-client
	ln -sf hostbuild $(DESTDIR)$(PREFIX)/bin/cvm_build
	install -D -m 644 -t $(SHARE)/coffer docs/config.schema.json docs/settings.schema.json
	install -D -m 644 -t $(SHARE)/doc/coffer README.md
	install -D -m 644 -t $(SHARE)/doc/coffer/docs docs/*.md docs/*.yaml docs/*.json
	bin/manuals $(SHARE) $(VERSION)
	rm -rf $(DESTDIR)$(PREFIX)/lib/coffer/base/snp
	install -d $(DESTDIR)$(PREFIX)/lib/coffer/base
	cp -r --preserve=mode,timestamps build/base/snp $(DESTDIR)$(PREFIX)/lib/coffer/base/snp

# Debian 12 and 13, Ubuntu 24.04 and newer: hostbuild needs e2fsprogs alone.
DEB := build/coffer_$(VERSION)_amd64.deb
deb: export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct)
deb:
	rm -rf build/deb
	$(MAKE) install DESTDIR=$(CURDIR)/build/deb PREFIX=/usr
	cd build/deb/usr/share && mkdir zsh/vendor-completions && mv zsh/site-functions/_hostbuild zsh/vendor-completions && rmdir zsh/site-functions && gzip -9n man/man1/*.1
	$(GO) run ./cmd/copyright build/base/snp build/cache $(addprefix bin/,hostbuild kbs-client init agent snpguest containerd runc) >build/deb/usr/share/doc/coffer/copyright
	install -d build/deb/DEBIAN
	printf '%s\n' 'Package: coffer' 'Version: $(VERSION)' 'Architecture: amd64' 'Section: admin' 'Priority: optional' \
	'Maintainer: Coffer developers <coffer@localhost>' "Installed-Size: $$(du -sk build/deb/usr | cut -f 1)" \
	'Depends: e2fsprogs (>= 1.46)' 'Suggests: erofs-utils, debian-archive-keyring, qemu-system-x86, bash-completion' \
	'Description: builder of confidential VM bundles for AMD SEV-SNP' \
	' hostbuild makes a confidential VM out of a docker archive and a YAML file,' \
	' gives its key and its rule to a Trustee KBS, and can be that KBS itself.' \
	' The guest base (kernel, firmware, guest programs) is part of the package.' >build/deb/DEBIAN/control
	chmod -R u+rwX,go+rX,go-w build/deb
	dpkg-deb --root-owner-group -Zzstd -b build/deb $(DEB)
# What is in the package, and that it works in a fresh root of SUITE: of this machine's
# archive, or of SOURCE, a line of sources.list (for Ubuntu, with ubuntu-keyring installed).
SUITE ?= bookworm
SOURCE ?=
test-deb: DEPS += mmdebstrap
test-deb: deb | deps
	COFFER_DEB=$(CURDIR)/$(DEB) COFFER_SUITE=$(SUITE) COFFER_SOURCE='$(SOURCE)' $(GO) test -count=1 -timeout 10m -v ./test/install

test test-gpu test-nvidia test-e2e bench: DEPS += $(TEST_DEPS)

# Units first; then the scenarios alone, since they time what QEMU does.
test: all base deps
	COFFER_TEST_OVMF=$(CURDIR)/build/base/snp/OVMF.amdsev.fd $(GO) test $$($(GO) list ./... | grep -v -e /test/scenarios -e /test/e2e -e /test/nvflare -e /test/federation -e /test/trustee -e /test/install)
	$(GO) test -count=1 -timeout 40m -v -skip '^Test(Guest|GPUs)' ./test/scenarios
	env -u KBS_URL $(GO) test -count=1 -timeout 20m -v ./test/trustee
# What a running guest withstands: its workload, its host, its network, its KBS.
test-guest: all base deps
	$(GO) test -count=1 -timeout 40m -v -run ^TestGuest ./test/scenarios
test-gpu: all base deps
	$(GO) test -count=1 -timeout 40m -v -run ^TestGPUs ./test/scenarios
# NVIDIA's kernel modules, built and loaded; downloads 190 MB once, builds for minutes.
test-nvidia: all base deps
	COFFER_TEST_NVIDIA=1 $(GO) test -count=1 -timeout 90m -v -run ^TestNVIDIA ./test/scenarios
test-e2e: all base deps
	$(GO) test -count=1 -timeout 30m -v ./test/e2e
# Against a Trustee of one's own that takes sample evidence: KBS_URL, KBS_CA,
# KBS_ADMIN_KEY, and if need be DIALECT, KBS_GUEST_URL, KBS_ADMIN_ISSUER,
# KBS_ADMIN_AUDIENCE and REPLACE_POLICY=yes. Without KBS_URL: the embedded KBS.
test-trustee: all base deps
	$(GO) test -count=1 -timeout 20m -v ./test/trustee
# The embedded KBS under load, killed once and started again.
SOAK ?= 10m
soak: bin/hostbuild bin/simplatform
	$(GO) run ./test/soak -for $(SOAK)
# What others compute of the same inputs: sev-snp-measure of PyPI, and snpguest, which
# takes cargo 6 minutes of CPU time; what that answers to us lies in internal/snpguest/testdata, too.
test-oracles: deps
	@test -x build/oracles/bin/sev-snp-measure || { python3 -m venv build/oracles && build/oracles/bin/pip install -q sev-snp-measure==0.0.13; }
	@test -x build/oracles/bin/snpguest || cargo install --debug -q snpguest --version 0.9.2 --locked --root build/oracles || echo "test-oracles: SKIPPED: snpguest: no cargo, or no crate index"
	PATH=$(CURDIR)/build/oracles/bin:$$PATH COFFER_TEST_OVMF=$(wildcard $(CURDIR)/build/base/snp/OVMF.amdsev.fd) \
	COFFER_SNPGUEST_ORACLE=$(CURDIR)/build/oracles/bin/snpguest $(GO) test -count=1 -v -run Oracle ./internal/measure ./internal/snp/idblock
	@test ! -x build/oracles/bin/snpguest || COFFER_SNPGUEST_ORACLE=$(CURDIR)/build/oracles/bin/snpguest $(GO) test -count=1 ./internal/snpguest
# The real NVFlare from PyPI calls our cvm_build.
NVFLARE := 2.9.0 2.7.3
test-nvflare test-oracles: DEPS += $(shell python3 -c 'import ensurepip' 2>/dev/null || echo python3-venv)
test-nvflare: all base deps $(NVFLARE:%=build/nvflare/%/installed)
	COFFER_NVFLARE_VENV=$(CURDIR)/build/nvflare/$(firstword $(NVFLARE)) $(GO) test -count=1 -v -run NVFlare ./agent/api
	$(GO) test -count=1 -timeout 20m -v ./test/nvflare
build/nvflare/%/installed: | deps
	python3 -m venv --clear $(@D)
	$(@D)/bin/pip install -q nvflare==$* filelock # which SNPAuthorizer imports and nvflare does not require
	@touch $@
# docs/nvflare.md, command by command: a server, its sites and an admin; or up to the sites' join.
test-nvflare-e2e test-nvflare-boot: all base deps build/nvflare/2.9.0/installed build/images/nvflare.tar.gz
	$(GO) test -count=1 -timeout 40m -v -run '^Test$(if $(filter %-boot,$@),Boot,Federation)$$' ./test/federation
build/images/nvflare.tar.gz: DEPS += mmdebstrap
build/images/nvflare.tar.gz: build/nvflare/2.9.0/installed | deps
	$(GO) run ./test/debimage/nvflare-image build/nvflare/2.9.0/bin/python3 $(@D)
	@touch $@
bench: all base deps
	bin/bench
	$(GO) test -run '^$$' -bench Idle -benchtime 1x ./agent # needs root
demo: all base deps
	bin/demo
# Both of Trustee's policy engines judge the generated policy anew; needs cargo.
regorus:
	cargo build --release --locked --manifest-path test/regorus/Cargo.toml --target-dir build/regorus
	$(GO) test -count=1 ./hostbuild/policy -run '^TestRegorus$$' -regorus $(CURDIR)/build/regorus/release/regorus-oracle
test-gpu-hw: # on a machine with an NVIDIA GPU; reads only
	@lib=$$(/sbin/ldconfig -p | sed -n 's|.*libnvidia-ml.so.1 (libc6,x86-64).*=> ||p' | head -n 1); \
	test -n "$$lib" || { echo "test-gpu-hw: no libnvidia-ml.so.1: no NVIDIA driver is installed"; exit 1; }; \
	COFFER_GPU_LIBRARY=$$lib $(GO) test -count=1 -v -run '^TestHardware$$' ./internal/gpu/helper
FUZZ ?= .
# Go's fuzzer sometimes reports its own end, "context deadline exceeded", as a failure
# without an input that failed: then once more.
fuzz: # FUZZTIME for each target below the folders FUZZ, one on each core
	@grep -roE '^func Fuzz[A-Za-z0-9_]+' --include='*_test.go' $(FUZZ) | sed 's|/[^/]*:func | |' | sort | xargs -P "$$(nproc)" -L 1 sh -c \
	'for try in 1 2; do \
	if out=$$($(GO) test -run "^$$" -fuzz "^$$1\$$" -fuzztime $(FUZZTIME) -fuzzminimizetime 20x -parallel 1 "./$$0" 2>&1); then echo "fuzz: $$0 $$1: $$(echo "$$out" | sed -n "s/.*\(execs: [0-9]*\).*/\1/p" | tail -n 1)"; exit; fi; \
	echo "$$out"; case $$out in *"Failing input"*) break;; *"context deadline exceeded"*) ;; *) break;; esac; done; echo "fuzz: $$0 $$1: FAILED"; exit 255'
lint:
	@test -z "$$(git ls-files "*.go" | xargs gofmt -l | tee /dev/stderr)" || { echo "lint: run gofmt -w on these files"; exit 1; }
	$(GO) vet ./...
	$(GO) vet -tags simulated ./...
clean:
	rm -rf bin build
