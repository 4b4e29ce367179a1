# `make demo` shows the whole thing on this machine, `make test` runs the tests, `make check` runs ruff and mypy. Each
# makes the environment first where it is missing or older than pyproject.toml.

VENV      := .venv
STAMP     := $(VENV)/.made
TORCH     := torch==2.13.0
PYTHONS   := python3.11 python3.12 python3.13 python3
FIT       := import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
HEADERS   := import os, sys, sysconfig; sys.exit(not os.path.exists(sysconfig.get_path("include") + "/Python.h"))
PIP       := $(VENV)/bin/python -m pip install -qq --disable-pip-version-check
# The kernels' build finds ninja, and the demo finds deepspeed, on PATH.
INSIDE    := PATH="$(CURDIR)/$(VENV)/bin:$$PATH"

.PHONY: demo test check lint types environment
.DEFAULT_GOAL := demo

demo: $(STAMP)
	@$(INSIDE) python -m bench.demo

# Tests take turns on as many processes as there are cores, up to four, each with one thread for its products: threads of
# several processes would wait for each other's cores.
test: $(STAMP)
	@$(INSIDE) OMP_NUM_THREADS=1 pytest --numprocesses logical --maxprocesses 4 --dist worksteal $(ARGS)

check: lint types

lint: $(STAMP)
	@$(INSIDE) ruff check --quiet .

types: $(STAMP)
	@$(INSIDE) mypy

environment: $(STAMP)

# What pip cannot bring comes first: a compiler and Python's headers for the processor's kernels, and mpirun for one way
# to launch. None is a must: torch's own operations stand in for the kernels, and tests that need mpirun skip. Then
# torch, alone: pip takes the build that lies nearest, and what follows is content with it.
$(STAMP): pyproject.toml
	@for python in $(VENV)/bin/python $(PYTHONS) none; do "$$python" -c '$(FIT)' 2>/dev/null && break; done; \
	if [ "$$python" = none ]; then \
	    echo "error: Python 3.11 or later with its venv module is needed; looked for $(PYTHONS)" >&2; \
	    echo "       (on Debian and Ubuntu: apt-get install python3 python3-venv)" >&2; exit 1; \
	fi; \
	missing=; \
	command -v g++ >/dev/null || missing="$$missing g++"; \
	command -v mpirun >/dev/null || missing="$$missing openmpi-bin"; \
	"$$python" -c '$(HEADERS)' || missing="$$missing python3-dev"; \
	if [ -n "$$missing" ] && [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	    echo "environment: apt-get install$$missing"; \
	    { apt-get -qq update && DEBIAN_FRONTEND=noninteractive \
	      apt-get -qq install -y --no-install-recommends $$missing; } </dev/null >/dev/null 2>&1 \
	    || echo "environment: apt-get failed; going on without$$missing"; \
	fi; \
	if [ "$$python" != $(VENV)/bin/python ]; then \
	    echo "environment: $(VENV) with $$("$$python" --version)"; \
	    "$$python" -m venv --clear $(VENV); \
	fi
	@echo "environment: $(TORCH)"
	@$(PIP) $(TORCH)
	@echo "environment: this package, what it needs and what its tests need"
	@$(PIP) --editable ".[test]"
	@touch $@
