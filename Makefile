# What people and CI call. Each target installs what it needs on a Debian host (as root) and says so; the guest kernel, the
# lab's QEMU and the Debian roots are built once into $HUSK_CACHE (/var/cache/husk) by the scripts named below.

PREFIX ?= /usr/local
DESTDIR ?=
HUSK_CACHE ?= /var/cache/husk
export HUSK_CACHE

CARGO := $(CURDIR)/deploy/cargo
TARGET := $(or $(CARGO_TARGET_DIR),$(CURDIR)/target)
RELEASE := $(TARGET)/x86_64-unknown-linux-gnu/release
LAB := CARGO=$(CARGO) $(TARGET)/x86_64-unknown-linux-gnu/debug/husk-lab

# Two targets at once would both install packages; cargo and the kernel's build use all processors anyway.
.NOTPARALLEL:
.PHONY: all build binaries kernel initrd lab demo test test-long unit fuzz lint bench install clean husk-lab husk-bench

all: build

## build: husk's binaries, the guest kernel and the initrd
build: binaries kernel initrd

binaries:
	@deploy/prepare-host build
	$(CARGO) build --release --locked $(foreach p,husk-shim husk-vmm husk-agent,-p $(p))

## kernel: the guest kernel (deploy/kernel), cached
kernel:
	@deploy/prepare-host build
	@mkdir -p $(TARGET)/guest
	@kernel=$$(deploy/kernel/build) && cp --reflink=auto $$kernel/vmlinux $(TARGET)/guest/vmlinux && \
	    echo "kernel: $$kernel/vmlinux ($$(cat $$kernel/release))"

## initrd: the guest's initrd, which is the agent
initrd: binaries
	@deploy/initrd/build $(RELEASE)/husk-agent $(TARGET)/guest/initrd.img

husk-lab:
	@deploy/prepare-host lab
	$(CARGO) build --quiet --locked -p husk-tests --bins

# The benchmark's programs must not be slowed by what they measure with.
husk-bench: husk-lab
	$(CARGO) build --quiet --locked --release -p husk-tests --bins

## lab: a shell in the lab, with whatever is built
lab: husk-lab
	$(LAB) shell $(addprefix --containerd ,$(CONTAINERD))

## demo: boots the lab and runs a container in a microVM
demo:
	@deploy/prepare-host demo
	@$(MAKE) --no-print-directory build
	$(CARGO) build --quiet --locked -p husk-tests --bins
	@$(LAB) demo

## test: everything that must pass; TESTS="exec:: run::uname" chooses end-to-end tests, CONTAINERD=1.7|2.1 one containerd for all
test: lint unit build husk-lab
	$(LAB) test $(addprefix --containerd ,$(CONTAINERD)) $(TESTS)

unit:
	@deploy/prepare-host test
	$(CARGO) test --locked --workspace --tests

lint:
	@deploy/prepare-host build
	$(CARGO) fmt --all --check
	$(CARGO) clippy --locked --workspace --all-targets --all-features -- -D warnings

## test-long: the tests that take longer than `make test` may, about an hour in software
test-long: build husk-lab
	@deploy/prepare-host test
	$(CARGO) test --locked --workspace --tests -- --ignored
	$(LAB) test --ignored --limit 3600 --timeout 10800 $(addprefix --containerd ,$(CONTAINERD)) $(TESTS)

## fuzz: each fuzz target for a minute, or FUZZ_SECONDS (`make test` runs their corpora)
FUZZ_SECONDS ?= 60
fuzz:
	@deploy/prepare-host fuzz
	@deploy/fuzz --seconds $(FUZZ_SECONDS) $(FUZZ)

## bench: husk beside runc in virtual time, into target/bench/report.json
bench: build husk-bench
	CARGO=$(CARGO) $(RELEASE)/husk-lab bench

## install: into $(DESTDIR)$(PREFIX)
install: build
	install -d $(DESTDIR)$(PREFIX)/bin $(DESTDIR)$(PREFIX)/lib/husk
	install -m 755 $(RELEASE)/containerd-shim-husk-v2 $(RELEASE)/husk $(DESTDIR)$(PREFIX)/bin/
	install -m 755 $(RELEASE)/husk-vmm $(DESTDIR)$(PREFIX)/lib/husk/
	install -m 644 $(TARGET)/guest/vmlinux $(TARGET)/guest/initrd.img $(DESTDIR)$(PREFIX)/lib/husk/

## clean: everything this work tree has built; what is cached in $(HUSK_CACHE) stays
clean:
	rm -rf $(TARGET)
