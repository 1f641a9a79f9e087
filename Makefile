# Everything starts here. Each target first sets up what it needs: a virtual environment with the
# versions pinned in docker/constraints.txt, and a Horovod wheel, which takes minutes to build once
# and is then kept for this user. Stamp files in the environment tell what has been done.

PYTHON ?= python3
VENV ?= .venv
FRAMEWORK ?= torch
DEMO_ARGS ?=
TEST_ARGS ?=
# Tests side by side, many of them jobs of two to four processes that wait for each other.
TEST_WORKERS ?= 3
ENTRIES ?=
GPU_BUNDLE ?= build/gpu-bundle
GPU_PYTHON ?= 3.12
GPU_ARGS ?=

BIN := $(VENV)/bin
DOCS := build/docs-venv
DONE := $(VENV)/.done
IN_VENV := PATH="$(abspath $(BIN)):$$PATH" $(BIN)/python
PIP := $(BIN)/python -m pip --disable-pip-version-check

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lint docs matrix venv wheel gpu-bundle gpu clean

# An environment is void if its Python is gone or another one, or if it was moved or copied here:
# its scripts still name the old place.
IDENTITY := echo "$(abspath $(VENV)) $$(readlink -e $(BIN)/python)"
$(shell [ "$$($(IDENTITY))" = "$$(cat $(DONE)/venv 2>/dev/null)" ] || rm -rf $(DONE))

help:
	@echo "make demo    train on handwritten digits: dense, layer-wise top-k, DLS"
	@echo "             (FRAMEWORK=torch or tensorflow, DEMO_ARGS=...)"
	@echo "make test    run all tests, three at a time (TEST_WORKERS=0 TEST_ARGS=...)"
	@echo "make lint    ruff and mypy"
	@echo "make docs    the documentation as a site, links checked: build/site"
	@echo "make matrix  the Docker test matrix, with docker, podman or buildah (ENTRIES=...)"
	@echo "make venv    only set up $(VENV)"
	@echo "make wheel   build and install Horovod's wheel, again after installing Open MPI"
	@echo "make gpu-bundle   gather what 'make gpu' needs where there is no network (GPU_PYTHON=3.12)"
	@echo "make gpu     build, test and measure on this machine's GPU, with its own Python (GPU_ARGS=...)"
	@echo "make clean   remove $(VENV) and all caches here (the Horovod wheel stays cached)"

demo: $(DONE)/horovod $(DONE)/package
	@$(IN_VENV) examples/demo.py --framework $(FRAMEWORK) $(DEMO_ARGS)

test: $(DONE)/horovod $(DONE)/package
	@$(IN_VENV) -m pytest -n $(TEST_WORKERS) --dist loadgroup --no-loadscope-reorder $(TEST_ARGS)

lint: $(DONE)/packages
	@$(IN_VENV) -m ruff check .
	@$(IN_VENV) -m ruff format --check .
	@$(IN_VENV) -m mypy

# Not --quiet: what mkdocs does not say, it does not count as a warning.
docs: $(DOCS)/.done
	@NO_MKDOCS_2_WARNING=1 $(DOCS)/bin/python -m mkdocs build --strict
	@echo "build/site/index.html is made; to search in it: python3 -m http.server --directory build/site"

matrix: $(DONE)/packages
	@$(IN_VENV) docker/matrix.py $(ENTRIES)

venv: $(DONE)/horovod $(DONE)/package
	@echo "$(VENV) is ready"

wheel: $(DONE)/packages
	@$(BIN)/python docker/horovod_wheel.py --install
	@touch $(DONE)/horovod

gpu-bundle: $(DONE)/packages
	@$(BIN)/python docker/gpu_bundle.py --out $(GPU_BUNDLE) --python $(GPU_PYTHON)

# The machine's own Python, which has torch with CUDA: nothing is set up, nothing downloaded.
gpu:
	@$(PYTHON) docker/gpu.py --bundle $(GPU_BUNDLE) $(GPU_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info .hypothesis .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What is missing on this machine is said before anything is downloaded. An environment that works
# is kept; one that was interrupted half-way, or is void, is made anew.
$(DONE)/venv:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
	  echo "error: '$(PYTHON)' is not a Python from 3.11 to 3.13 (the pinned TensorFlow needs one)."; \
	  echo "  Name another: make PYTHON=python3.12 ..."; exit 1; } >&2
	@$(PYTHON) docker/horovod_wheel.py --check
	@$(BIN)/pip --version 2>/dev/null | grep -qF '$(abspath $(VENV))/' || { \
	  echo "Creating the virtual environment $(VENV)"; $(PYTHON) -m venv --clear $(VENV); }
	@mkdir -p $(DONE)
	@$(IDENTITY) > $@

# The pins are complete, so they need no resolver. The second command adds what the CUDA build of
# torch wants besides; it finds nothing to do for the CPU build. Of what pip says, every tenth
# package is shown, each big download, and the long silence at the end.
$(DONE)/packages: docker/constraints.txt $(DONE)/venv
	@echo "Installing the pinned packages into $(VENV): about 700 MB, 2 to 5 minutes the first time"
	@[ -n "$${PIP_EXTRA_INDEX_URL:-}" ] || { \
	  echo "  If pip takes torch's CUDA build, that is several GB more. For the CPU build,"; \
	  echo "  set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels."; }
	@again=; [ ! -e $@.unfinished ] || again=--force-reinstall; touch $@.unfinished; \
	all=$$(grep -c == $<); n=0; \
	$(PIP) install --progress-bar off --no-deps $$again -r $< | while read -r verb what rest; do \
	  case $$verb in \
	    Collecting|Processing) n=$$((n + 1)); ((n % 10)) || echo "  $$n of $$all" ;; \
	    Downloading) [[ $$rest != *[0-9][0-9].*MB* ]] || echo "  downloading $$what $$rest" ;; \
	    Installing) echo "  unpacking: about a minute" ;; \
	  esac; done
	@$(PIP) install --quiet -c $< torch
	@mv $@.unfinished $@

# An environment of its own: what makes the site is no part of what trains and tests. The pins are
# complete here, too.
$(DOCS)/.done: docs/requirements.txt
	@echo "Installing what makes the documentation into $(DOCS): about 35 MB"
	@$(PYTHON) -m venv --clear $(DOCS)
	@$(DOCS)/bin/python -m pip --disable-pip-version-check install --quiet --no-deps -r $<
	@touch $@

$(DONE)/horovod: docker/horovod_wheel.py docker/horovod_edits.py $(DONE)/packages
	@$(BIN)/python $< --install >/dev/null
	@touch $@

$(DONE)/package: setup.cfg pyproject.toml $(DONE)/packages
	@echo "Installing hvd_dls itself into $(VENV)"
	@$(PIP) install --quiet --no-deps --no-build-isolation --editable .
	@touch $@
