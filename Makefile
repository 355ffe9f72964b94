# Every target does all of its own set-up. `make help` lists them.
SHELL := /bin/bash
.DEFAULT_GOAL := help

HOST := $(shell rustc -vV 2>/dev/null | sed -n 's/^host: //p')
TARGET_DIR := $(or $(CARGO_TARGET_DIR),target)
BIN := $(TARGET_DIR)/release/vmkit
AGENT := $(TARGET_DIR)/$(HOST)/agent/vmkit-agent
export VMKIT_AGENT = $(abspath $(AGENT))
CARGO_FLAGS := --locked

.PHONY: help setup build agent run demo test check bench image clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | column -t -s "$$(printf '\t')"

setup: ## install what vmkit needs (QEMU and the tools that make images); does nothing the second time
	@scripts/setup.sh

agent: ## build the guest agent, static and small
	@CARGO_TARGET_DIR="$(TARGET_DIR)" RUSTFLAGS="-C target-feature=+crt-static" \
	  cargo build $(CARGO_FLAGS) --quiet --profile agent -p vmkit-agent --bin vmkit-agent --target $(HOST)

build: agent ## build vmkit
	@cargo build $(CARGO_FLAGS) --quiet --release -p vmkit-cli
	@ln -f "$(AGENT)" "$(TARGET_DIR)/release/vmkit-agent" 2>/dev/null || cp -f "$(AGENT)" "$(TARGET_DIR)/release/vmkit-agent"

run: setup build ## run a command in a throw-away VM: make run CMD='uname -a'
	@$(BIN) run -- $(or $(CMD),uname -a)

demo: setup build ## set up, build, run the main job in a real VM, show what it took
	@scripts/demo.sh $(BIN)

test: setup build ## set up and run every test, real VMs included
	@scripts/test.sh

check: setup build ## what CI runs: format, lints, docs, every test, dependencies
	@scripts/check.sh

bench: setup build ## our figures beside bare QEMU's, from the same run
	@$(BIN) bench $(BENCH_FLAGS)

clean: ## remove what was built
	@cargo clean --quiet
