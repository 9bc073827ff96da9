# `make demo` and `make test` each do all the set-up they need, in .venv.
# The newest Python from 3.13 to 3.11 that runs here; PYTHON=... names another. Each is tried, because a launcher may exist without
# the version behind it.
PYTHON := $(or $(PYTHON),$(shell for version in 3.13 3.12 3.11; do \
	if python$$version -c "" >/dev/null 2>&1; then echo python$$version; break; fi; done))
# Where to take torch from instead of the default index, say a CPU-only one; empty: the default.
TORCH_INDEX ?=
# Processes that tests run in, each with one thread of arithmetic: for networks this small more threads gain nothing.
WORKERS ?= 2
# How long `make torture` may take.
TORTURE_SECONDS ?= 1500
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DOCS_VENV := .venv-docs
DOCS_STAMP := $(DOCS_VENV)/.installed

# The clear word where no Python was found.
define need_python
@test -n "$(PYTHON)" || { echo "no python3.11, python3.12 or python3.13 runs here: install one, or name it: make PYTHON=/path/to/python3.12" >&2; exit 1; }
endef

.PHONY: demo test test-slow test-models test-stores torture check docs clean

# Two runs, their table, their page and what to do next. int4-onnx runs on every CPU; int8-onnx and int8-openvino, which are faster
# where they run, are refused on CPUs without VNNI.
demo: $(STAMP)
	$(BIN)/compress run recipes/int8.yaml --runs runs
	$(BIN)/compress run recipes/int4-onnx.yaml --runs runs
	$(BIN)/compress compare runs
	$(BIN)/compress dashboard runs --to runs/report.html
	$(BIN)/python examples/what_next.py runs runs/report.html

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist worksteal -m "not slow and not models and not torture"

test-slow: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist worksteal -m "slow and not models and not torture"

test-models: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -q -n $(WORKERS) --dist worksteal tests/layouts
	$(BIN)/python tests/layouts/matrix.py --write

# Vector stores are 350 MB, so `make test` leaves those out that are not installed.
test-stores: $(STAMP)
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[stores]"
	OMP_NUM_THREADS=1 $(BIN)/pytest -q tests/stores

# Bounded in time; a failure names the moment and the seed. TORTURE_SEED=... repeats a day's draws.
torture: $(STAMP)
	OMP_NUM_THREADS=1 timeout $(TORTURE_SECONDS) $(BIN)/pytest -q -s -n $(WORKERS) --dist loadgroup tests/torture

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python docs/measured.py --check
	$(BIN)/python docs/gallery.py --check

# The site, in build/site; a broken link stops it.
docs: $(DOCS_STAMP)
	$(DOCS_VENV)/bin/python docs/make_site.py

# torch first and by its exact version: asked for as a range, a package index may answer with a newer and larger build.
$(STAMP): pyproject.toml constraints.txt
	$(need_python)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) -c constraints.txt torch
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[reference,bitsandbytes,openvino,dashboard,gguf,model2vec,serve,ray,sweep,dev]"
	touch $@

# The generator alone: the pages need no torch.
$(DOCS_STAMP): constraints.txt
	$(need_python)
	$(PYTHON) -m venv $(DOCS_VENV)
	$(DOCS_VENV)/bin/python -m pip install -q -c constraints.txt zensical
	touch $@

clean:
	rm -rf $(VENV) $(DOCS_VENV) build *.egg-info
