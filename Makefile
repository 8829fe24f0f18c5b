# `make` alone lists the targets. Everything is installed into $(VENV); nothing outside is changed.
#
#   make setup TORCH=2.11.0 TORCHREC=1.6.1      another supported pair (1.7.0 belongs to 2.12.0)
#   make setup CUDA=1                           the CUDA build of fbgemm, for a machine with a GPU
#   make setup PYTHON=python3.12                another Python

# Tried by running it, because a version manager's stub exists and fails.
PYTHON ?= $(shell for python in python3.11 python3; do \
	$$python -c '' 2>/dev/null && echo $$python && break; done)
VENV ?= .venv
TORCH ?= 2.13.0
TORCHREC ?= 1.8.0
CUDA ?= 0

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check
# fbgemm has torchrec's number, but not its patch releases: 1.6 of 1.6.1.
FBGEMM := $(basename $(TORCHREC))
# One stamp per choice of versions, so another choice installs again.
STAMP := $(VENV)/.installed-torch$(TORCH)-torchrec$(TORCHREC)-cuda$(CUDA)

.PHONY: help setup demo test lint types bench clean

help:
	@echo 'make setup   install everything into $(VENV)'
	@echo 'make demo    set up, then train, prune and continue on synthetic clicks'
	@echo 'make test    set up, then run the tests'
	@echo 'make lint    set up, then ruff'
	@echo 'make types   set up, then mypy'
	@echo 'make bench   set up, then every script of benchmarks/'
	@echo 'make clean   remove $(VENV), caches and build products; runs/ stays'

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
	$(BIN)/python -m pytest

lint: setup
	$(BIN)/ruff check .

types: setup
	$(BIN)/mypy

bench: setup
	@for script in benchmarks/*.py; do echo "$$script"; $(BIN)/python "$$script" || exit 1; done

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .hypothesis .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
