# Ravelin's front door. `make` lists what there is; every target sets up what it needs.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup build run build-x86 run-x86 test test-host test-virt test-raspi4b test-x86 test-boards bench bench-boot bench-target bench-host image doc lint clean

# Settings of `make run` and `make image`; RUST_ROUTE is for every target.
BOARD ?= virt
HOST ?= shim
SMP ?= 4
CPU ?= cortex-a76
GIC ?= 3
MEM ?= 1G
ARGS ?=
GUEST ?= linux
INITRD ?=
DISK ?=
CMDLINE ?=
VCPUS ?= 1
GUEST_MEM ?= 256M
VMS ?= 1
LOCK ?= 1
NONCOHERENT ?= 0
PROTECTED ?= 0
IOMMU ?= 0
LOG ?= info
RUST_ROUTE ?= auto
FILTER ?=
SOAK ?= 600
export RUST_ROUTE

RAVELIN := scripts/ravelin.sh

help: ## this list
	@echo 'Ravelin: a pKVM-style hypervisor for arm64. Two commands: make run, make test.'
	@echo
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo
	@echo 'Settings of make run, with their defaults:'
	@echo '  the machine  BOARD=virt (or raspi4b) CPU=cortex-a76 (cortex-a72, neoverse-v1, neoverse-n2, max) GIC=3 (2) SMP=4 MEM=1G'
	@echo '               IOMMU=0 (1: an SMMUv3, and a PCI disk behind it: the first VM has it, or Linux as host)'
	@echo '  the host     HOST=shim (or linux) LOG=info (off, error, warn, debug, trace) ARGS="..."'
	@echo '  the guests   GUEST=linux (demo, or the path of an arm64 Image or raw binary for QEMU virt) INITRD=path DISK=file'
	@echo '               CMDLINE="..." VCPUS=1 GUEST_MEM=256M VMS=1 LOCK=1 (0: mapped on demand) NONCOHERENT=0 (1)'
	@echo '               PROTECTED=0 (1: the host can not see their memory)'
	@echo '  at the console: Ctrl-A c opens the monitor (try help), Ctrl-A N gives the input to VM N, Ctrl-T x ends the emulator'
	@echo 'Others: make test-virt FILTER=word; RUST_ROUTE=rustup|debian'

setup: ## install and fetch what is missing (quick when nothing is)
	@scripts/setup.sh

build: setup ## the EL2 image with the host inside: build/ravelin.img
	@scripts/build-guests.sh
	@scripts/build.sh

run: build ## boot Linux in a VM on the emulator, to a shell; its poweroff ends the run
	@$(RAVELIN) run --board $(BOARD) --host $(HOST) --smp $(SMP) --cpu $(CPU) --gic $(GIC) --memory $(MEM) --log $(LOG) \
		--arguments '$(ARGS)' --guest '$(GUEST)' $(if $(INITRD),--initrd '$(INITRD)') $(if $(DISK),--disk '$(DISK)') --cmdline '$(CMDLINE)' --vcpus $(VCPUS) \
		--guest-memory $(GUEST_MEM) --vms $(VMS) --lock $(LOCK) --noncoherent $(NONCOHERENT) --protected $(PROTECTED) --iommu $(IOMMU)

build-x86: setup ## the x86 hypervisor's disk image: build/ravelin-x86.img
	@scripts/setup-x86.sh
	@scripts/setup-x86-payload.sh
	@scripts/build-x86.sh

run-x86: build-x86 ## boot Linux in a VM of the x86 hypervisor on Bochs, to a shell; its `poweroff -f` ends the run
	@$(RAVELIN) x86-run --smp $(if $(filter command% environment%,$(origin SMP)),$(SMP),1)

test: test-host test-emulator test-x86 ## everything: the host's tests, then the emulators'

test-host: setup ## tests that need no machine: unit, property, loom, miri
	@scripts/test-host.sh

.PHONY: test-emulator
test-emulator: build
	@$(RAVELIN) test all --filter '$(FILTER)'

test-virt: build ## boot every combination of CPU and GIC on QEMU's virt
	@$(RAVELIN) test virt --filter '$(FILTER)'

test-raspi4b: build ## boot QEMU's raspi4b with Debian's Pi 4 device tree
	@$(RAVELIN) test raspi4b --filter '$(FILTER)'

test-x86: build-x86 ## the x86 hypervisor on Bochs: exits, memory types, shoot-down, CPUs that lack something
	@$(RAVELIN) test x86 --filter '$(FILTER)'

.PHONY: soak
soak: build ## what takes long: fuzzing for SOAK=600 seconds, then attacks from every core on the emulator
	@SOAK='$(SOAK)' scripts/soak.sh

test-boards: setup ## what EL2 reads in the real Pi 4 and Pi 5 device trees
	@scripts/test-boards.sh

bench: bench-boot bench-target bench-disk bench-host ## every benchmark

bench-host: setup ## page tables and memory slots beside their peers, on this machine
	@. scripts/lib.sh && load_env && "$$CARGO" bench --quiet -p ravelin-tests --bench stage2 -- "$(CURDIR)/docs/benchmarks"
	@. scripts/lib.sh && load_env && "$$CARGO" bench --quiet -p ravelin-tests --bench memslot -- --write "$(CURDIR)/docs/benchmarks"
	@. scripts/lib.sh && load_env && "$$CARGO" bench --quiet -p ravelin-tests --bench memslot_zap -- --write "$(CURDIR)/docs/benchmarks"

bench-boot: build ## instructions from reset to Linux's userland, bare and under the hypervisor
	@$(RAVELIN) bench-boot

bench-target: build ## instructions of a guest's operations beside the peers', and a Linux guest's boot
	@$(RAVELIN) bench-target

.PHONY: bench-disk
bench-disk: build ## a disk's speed with and without an SMMU, for Linux bare, as host, and as a guest
	@$(RAVELIN) bench-disk

image: build ## the SD card's folder: make image BOARD=rpi4|rpi5
	@$(RAVELIN) sdcard --board $(if $(filter command% environment%,$(origin BOARD)),$(BOARD),rpi4)

doc: setup ## the crates' documentation, in target/doc
	@. scripts/lib.sh && load_env && "$$CARGO" doc --workspace --no-deps

.PHONY: tcb
tcb: build ## how much code runs at EL2, and every unsafe in it: docs/tcb.md, docs/unsafe.md
	@$(RAVELIN) tcb

lint: build ## formatting, clippy and documentation with warnings denied
	@scripts/lint.sh

clean: ## remove what was built; downloads stay (rm -rf build removes them, too)
	@rm -rf target build/logs build/work build/sdcard-* build/*.img build/*.elf
