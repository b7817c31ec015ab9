# Every target sets up what it needs: python3 and make are enough, and nothing has to be activated.
#   make study    the main job, its report in $(OUT)     make test       all tests
#   make lint     ruff and mypy                          make test-unit  the tests of one process
#   make format   rewrite the sources as ruff wants      make test-fast  of these, the fast ones: under a minute
#   make docs     the web site, in build/docs            make clean      remove the environment and all caches
#   make dist     the sdist and the wheel, checked, in dist
#   make experiments      the literature's experiments, their pages below $(EXPERIMENTS)
#   make test-faults      the rows of docs/faults.md: kills, signals, hangs, damaged files, full disks (root may mount these)
#   make test-cluster     the tests on two nodes of this machine, on Slurm and of the image; root gets what they need from apt
#   make test-cluster-fast   of these, the fast ones
#   make test-layers TORCH=2.11.0   the tests of the layers with that version of torch, in an environment of its own
#   make test-ecosystem   the tests with other frameworks and of the notebook; it installs these first
PYTHON ?= python3
OUT ?= runs/quickstart
# The version of torch for test-layers
TORCH ?= 2.11.0
EXPERIMENTS ?= runs/experiments
# Further arguments of pytest, e.g. make test ARGS='-k ghost -x'
ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
ECOSYSTEM := $(VENV)/.installed-ecosystem
DIST := $(VENV)/.installed-dist
# Compiled by the installation.
KERNELS := $(wildcard $(addprefix syncbn/kernels/cpu/*.,cpp h py))
LAYERS := $(patsubst %,tests/unit/test_%.py,layers convert functional layer_gradients)
# Debian's names; without these packages the tests are skipped.
CLUSTER := buildah debootstrap iproute2 munge procps slurm-client slurmctld slurmd util-linux
# Two runs of make at once: the second waits, then finds the stamp (without flock they are not kept apart).
LOCK := $(if $(shell command -v flock 2>/dev/null),flock .venv.lock)

.DEFAULT_GOAL := help
.PHONY: help setup study experiments test test-unit test-fast test-faults test-cluster test-cluster-fast test-layers test-ecosystem docs dist lint format clean

help:
	@sed -n 's/^#   /  /p' Makefile

setup:
	@$(LOCK) $(MAKE) --silent --no-print-directory $(STAMP)

# Written last, so that a failed installation leaves no stamp and is tried again.
$(STAMP): pyproject.toml constraints.txt hatch_build.py $(KERNELS)
	echo "setting up $(VENV) (once; a few minutes)"
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	$(BIN)/python -m syncbn.kernels.cpu.build > /dev/null || true  # without a compiler torch's own operations serve
	touch $@

$(ECOSYSTEM): $(STAMP)
	echo "adding the frameworks of tests/ecosystem (once)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[ecosystem]'
	touch $@

$(DIST): $(STAMP)
	echo "adding what builds and checks the distributions (once)"
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dist]'
	touch $@

study: setup
	$(BIN)/syncbn study run --config quickstart --out $(OUT)

experiments: setup
	for name in $(basename $(notdir $(sort $(wildcard configs/experiments/*.yaml)))); do \
	  $(BIN)/syncbn experiment $$name --out $(EXPERIMENTS)/$$name || exit 1; done

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(ARGS)

test-unit: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit $(ARGS)

test-fast: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit -m "not slow" $(ARGS)

test-faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/unit tests/distributed tests/faults -m fault $(ARGS)

test-cluster: setup
	@[ "$$(id -u)" != 0 ] || command -v slurmctld slurmd munged ip buildah debootstrap | wc -l | grep -qx 6 \
	  || (apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $(CLUSTER)) || true
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/cluster $(ARGS)

test-cluster-fast:
	@$(MAKE) --no-print-directory test-cluster ARGS='-m "not slow" $(ARGS)'

test-layers:
	$(PYTHON) -m venv $(VENV)-torch$(TORCH)
	$(VENV)-torch$(TORCH)/bin/python -m pip install --quiet --disable-pip-version-check 'torch==$(TORCH)' hypothesis numpy pytest pytest-timeout -e .
	OMP_NUM_THREADS=1 $(VENV)-torch$(TORCH)/bin/python -m pytest $(LAYERS) $(ARGS)

test-ecosystem: setup
	@$(LOCK) $(MAKE) --silent --no-print-directory $(ECOSYSTEM)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/ecosystem $(ARGS)

docs: setup
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -b html docs build/docs
	@echo "the site begins at build/docs/index.html"

# torch brings libgomp: a second copy in the wheel would double the threads. A wheel without kernels has no tag to get.
dist: setup
	@$(LOCK) $(MAKE) --silent --no-print-directory $(DIST)
	rm -rf dist build/wheel
	$(BIN)/python -m build --no-isolation --outdir dist
	for wheel in dist/*-linux_*.whl; do [ ! -e "$$wheel" ] || { \
	  PATH="$(abspath $(BIN)):$$PATH" auditwheel repair --exclude libgomp.so.1 -w dist "$$wheel" && rm "$$wheel"; } || exit 1; done
	$(BIN)/python -m twine check --strict dist/*
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target build/wheel dist/*.whl
	cd build/wheel && PYTHONPATH="$$PWD" $(abspath $(BIN))/python ../../examples/ghost.py && PYTHONPATH="$$PWD" $(abspath $(BIN))/python -m syncbn env
	@ls -l dist

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) $(VENV)-torch* .venv.lock build dist .mypy_cache .ruff_cache .pytest_cache
	rm -rf syncbn/kernels/cpu/*.so syncbn/kernels/cpu/.build-* syncbn/kernels/cpu/.operators.lock
	find configs docs examples launch syncbn tests -name __pycache__ -type d -prune -exec rm -rf {} +
