# `make demo` and `make test` each do all the set-up they need, in .venv.
PYTHON ?= python3.11
# Where to take torch from instead of the default index, say a CPU-only one; empty: the default.
TORCH_INDEX ?=
# Processes that tests run in, each with one thread of arithmetic: for networks this small more threads gain nothing.
WORKERS ?= 2
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

.PHONY: demo test test-slow check clean

demo: $(STAMP)
	$(BIN)/compress run recipes/int8.yaml --runs runs

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist worksteal -m "not slow"

test-slow: $(STAMP)
	$(BIN)/pytest -q -m slow

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# torch first and by its exact version: asked for as a range, a package index may answer with a newer and larger build.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[reference,bitsandbytes,openvino,dashboard,gguf,dev]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
