# `make` alone lists the targets. Everything is installed into $(VENV); nothing outside is changed.
#
#   make setup TORCH=2.14.1 TORCHREC=1.9.2      another supported pair; 1.7.0 belongs to 2.12.0, and
#                                               1.6.1 to 2.11.0
#   make setup CUDA=1                           the CUDA build of fbgemm, for a machine with a GPU
#   make setup PYTHON=python3.12                another Python

# Tried by running it, because a version manager's stub exists and fails.
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c '' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
TORCH ?= 2.13.0
TORCHREC ?= 1.8.0
CUDA ?= 0
# The oldest and the newest supported pair of torch and torchrec, and what `test-versions` runs.
VERSIONS ?= 2.11.0+1.6.1 2.14.1+1.9.2
CORE := tests/embeddings tests/gates tests/surgery tests/reshard tests/planning tests/pruning \
	tests/models tests/run/test_pipeline.py tests/cli/test_doctor.py

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
# Half of the time goes into waiting for ranks, so that two processes pay on two cores.
PYTEST := -m pytest -n 2 --dist loadfile
# fbgemm has torchrec's number, but not its patch releases: 1.6 of 1.6.1.
FBGEMM := $(basename $(TORCHREC))
# One stamp per choice of versions, so another choice installs again.
STAMP := $(VENV)/.installed-torch$(TORCH)-torchrec$(TORCHREC)-cuda$(CUDA)

.PHONY: help setup demo test test-slow test-versions lint types bench clean

help:
	@echo 'make setup          install everything into $(VENV)'
	@echo 'make demo           set up, then train, prune and continue on synthetic clicks'
	@echo 'make test           set up, then run the tests'
	@echo 'make test-slow      set up, then run the second tier of tests'
	@echo 'make test-versions  the core of the tests on $(VERSIONS), each in its own environment'
	@echo 'make lint           set up, then ruff, and import-linter on the direction of imports'
	@echo 'make types          set up, then mypy'
	@echo 'make bench          set up, then every script of benchmarks/'
	@echo 'make clean          remove $(VENV), caches and build products; runs/ stays'

setup: $(STAMP)

$(STAMP): pyproject.toml
	@$(or $(PYTHON),false) -c 'import sys; sys.exit(not (3, 10) <= sys.version_info < (3, 13))' || { \
		echo "This needs Python 3.10 to 3.12, but '$(PYTHON)' is none." \
			"Install one (Debian, Ubuntu: apt-get install python3 python3-venv)" \
			"or name one: make setup PYTHON=python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { \
		echo "$(PYTHON) cannot make a virtual environment." \
			"Debian, Ubuntu: apt-get install $$($(PYTHON) -c \
			'import sys; print("python%d.%d-venv" % sys.version_info[:2])')" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	rm -f $(VENV)/.installed-*
ifeq ($(CUDA),1)
	$(PIP) torch==$(TORCH) torchrec==$(TORCHREC) 'fbgemm-gpu==$(FBGEMM).*' -e '.[launch,dev]'
else
	@! command -v nvidia-smi >/dev/null || echo 'A GPU is present: `make setup CUDA=1` would use it.'
	$(PIP) torch==$(TORCH)
	$(PIP) torch==$(TORCH) 'fbgemm-gpu-cpu==$(FBGEMM).*' -e '.[cpu,launch,dev]'
	# Without its dependencies: they include the CUDA build of fbgemm, over the same files.
	$(PIP) --no-deps torchrec==$(TORCHREC)
endif
	touch $@

demo: setup
	$(BIN)/torchrec-fmp run configs/demo.yaml --out runs/demo-$$(date +%Y%m%d-%H%M%S)

test: setup
	$(BIN)/python $(PYTEST) -m 'not slow'

test-slow: setup
	$(BIN)/python $(PYTEST) -m slow

test-versions:
	@for pair in $(VERSIONS); do \
		torch=$${pair%+*} torchrec=$${pair#*+} venv=$(VENV)-torchrec$${pair#*+}; \
		$(MAKE) --no-print-directory setup TORCH=$$torch TORCHREC=$$torchrec VENV=$$venv && \
		$$venv/bin/python $(PYTEST) $(CORE) || exit 1; \
	done

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports

types: setup
	$(BIN)/mypy

bench: setup
	@for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

clean:
	rm -rf $(VENV) $(VENV)-torchrec* build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
