# make demo and make test do all the set-up: they need Python 3.11 (or newer) and make.
#   VENV=DIR     the virtual environment to make and use (default .venv)
#   PYTHON=FILE  the Python to make it with (default: python3.11, else python3)
#   CONSTRAINTS=FILE  the versions to install (default constraints.txt)
#   ARGS=...     more arguments for pytest or the demo: make test ARGS="-k metrics -x"
SHELL := /bin/sh
VENV ?= .venv
PYTHON ?=
CONSTRAINTS ?= constraints.txt
ARGS ?=

BIN = $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PY = "$(BIN)/python"

.PHONY: help demo test test-slow test-gpu test-browser lint audit docs bench venv clean
.DEFAULT_GOAL := help

help:  ## show this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' Makefile

demo: venv  ## train, predict and evaluate on embedded data; prints where the pictures are
	@$(PY) scripts/demo.py $(ARGS)

test: venv  ## run the tests (ISBI2012_DIR, MNIST_DIR and NUCLEI_DIR, when set, name folders of real data)
	@$(PY) -m pytest -n auto --dist worksteal $(ARGS)

test-slow: venv  ## run the tests marked slow, the notebooks among them
	@$(PY) -m pip install -qq --disable-pip-version-check -c "$(CONSTRAINTS)" -e ".[notebooks]"
	@$(PY) -m pytest -m slow $(ARGS)

test-gpu: venv  ## run the tests that need a GPU; UNET_GPU_TESTS=cpu rehearses them without
	@$(PY) -m pytest -m gpu tests/gpu $(ARGS)

test-browser: venv  ## run the tests of the page (they need a Chromium: found, or named by CHROMIUM)
	@$(PY) -m pip install -qq --disable-pip-version-check -c "$(CONSTRAINTS)" -e ".[app,browser]"
	@$(PY) -m pytest -m browser tests/browser $(ARGS)

lint: venv  ## ruff check, ruff format --check, mypy
	@$(PY) -m ruff check .
	@$(PY) -m ruff format --check .
	@$(PY) -m mypy

# A release with known holes is asked about first: a mirror without the database finds none in any.
AUDIT = $(PY) -m pip_audit --progress-spinner off --disable-pip --no-deps --strict -r

audit: venv  ## known holes of constraints.txt (Error 3: the database cannot be reached)
	@$(PY) -m pip install -qq --disable-pip-version-check -c "$(CONSTRAINTS)" -e ".[audit]"
	@echo "pillow==8.0.0" > "$(VENV)/.known"; \
	if ! $(AUDIT) "$(VENV)/.known" 2>/dev/null | grep -q "PYSEC\|GHSA\|CVE"; then \
		echo "not audited: the database cannot be reached" >&2; exit 3; \
	fi
	@$(AUDIT) constraints.txt

docs: venv  ## build the pages of docs/ into site/, which opens from the disk
	@$(PY) -m pip install -qq --disable-pip-version-check -c "$(CONSTRAINTS)" -e ".[docs]"
	@export NO_MKDOCS_2_WARNING=1 DISABLE_MKDOCS_2_WARNING=true; \
	said=$$($(PY) -m mkdocs build --strict 2>&1) || { echo "$$said" >&2; exit 1; }
	@echo "pages: site/index.html"

bench: venv  ## measure this code beside others; ARGS="--rows sd-v1", docs/benchmarks.md
	@$(PY) -m pip install -qq --disable-pip-version-check -c "$(CONSTRAINTS)" -e ".[bench]"
	@$(PY) benchmarks/bench.py $(ARGS)

# The stamp holds the place of the tree (an editable install points at it) and the checksum of the
# two files that say what to install: while both are unchanged there is nothing to do.
venv:  ## make or refresh the virtual environment
	@set -eu; \
	venv="$(VENV)"; \
	stamp="$$(pwd) $$(cat pyproject.toml "$(CONSTRAINTS)" | cksum)"; \
	if [ "$$(cat "$$venv/.stamp" 2>/dev/null)" = "$$stamp" ] && [ -x "$(BIN)/python" ]; then \
		exit 0; \
	fi; \
	if [ ! -x "$(BIN)/python" ]; then \
		python=; \
		for candidate in $(if $(PYTHON),"$(PYTHON)",python3.11 python3); do \
			if "$$candidate" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))' \
				2>/dev/null; then python="$$candidate"; break; fi; \
		done; \
		if [ -z "$$python" ]; then \
			echo "error: no Python 3.11 or newer with its venv module was found as" \
				"$(or $(PYTHON),python3.11 or python3): install one (on Debian: apt install" \
				"python3.11 python3.11-venv) or name it with make PYTHON=/path/to/python3.11" >&2; \
			exit 2; \
		fi; \
		echo "making $$venv with $$("$$python" --version)"; \
		"$$python" -m venv "$$venv"; \
	fi; \
	rm -f "$$venv/.stamp"; \
	echo "installing the packages of constraints.txt into $$venv (a few minutes, once)"; \
	"$(BIN)/python" -m pip install -qq --disable-pip-version-check \
		-c "$(CONSTRAINTS)" -e ".[test,lint]"; \
	printf '%s' "$$stamp" > "$$venv/.stamp"

clean:  ## remove the virtual environment and the caches, never a run
	@if [ -f "$(VENV)/pyvenv.cfg" ]; then rm -rf "$(VENV)"; fi
	@rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis build dist site
	@find unet diffusion segmentation unet_diffusion scripts tests benchmarks -name __pycache__ -prune \
		-exec rm -rf {} + 2>/dev/null || true
