# `make demo` and `make test` do all set-up themselves: they make a virtual
# environment in .venv and install the package with what it needs.
# Another interpreter: make test PYTHON=python3.12

PYTHON ?= python3
VENV ?= .venv
# Test processes; each loads TensorFlow (about 1 GB of memory).
JOBS ?= 2
# More arguments for pytest: make test ARGS="tests/heads -k poisson"
ARGS ?=
# Arguments of the benchmark, see python -m benchmarks.run --help
BENCHMARK ?= --task diabetes --methods kfac adam --seconds 10 \
	--out build/benchmark.json

BIN := $(VENV)/bin
TEST_STAMP := $(VENV)/.installed-tests
DEV_STAMP := $(VENV)/.installed-dev
DOCS_STAMP := $(VENV)/.installed-docs

export KERAS_BACKEND := tensorflow
export TF_CPP_MIN_LOG_LEVEL ?= 3
export MPLBACKEND ?= Agg
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.DEFAULT_GOAL := help
.PHONY: help demo test slow lint format docs benchmark clean

help: ## Show the targets
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "  make %-10s %s\n", $$1, $$2}' \
		$(firstword $(MAKEFILE_LIST))

demo: $(TEST_STAMP) ## Train an autoencoder of small digits with K-FAC
	$(BIN)/python examples/mnist_autoencoder.py

test: $(TEST_STAMP) ## Run the tests, except the slow ones
	$(BIN)/python -m pytest -n $(JOBS) $(ARGS)

slow: $(TEST_STAMP) ## Run the slow tests
	$(BIN)/python -m pytest -n $(JOBS) -m slow $(ARGS)

lint: $(DEV_STAMP) ## Check format, style, types, imports and lists
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -q tests/lint

format: $(DEV_STAMP) ## Format the code and sort the imports
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(DOCS_STAMP) ## Build the documentation site into build/site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

benchmark: $(TEST_STAMP) ## Race K-FAC against Adam (BENCHMARK="--task ...")
	@mkdir -p build
	$(BIN)/python -m benchmarks.run $(BENCHMARK)

clean: ## Remove the environment, caches and build outputs
	rm -rf $(VENV) build dist *.egg-info examples/output
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find keras_natgrad tests examples benchmarks -name __pycache__ \
		-prune -exec rm -rf {} + 2>/dev/null || true

$(BIN)/python:
	$(PYTHON) -m venv $(VENV) || { rm -rf $(VENV); exit 1; }

# The stamps make an installation happen once, and again when setup.py changes.
# An existing interpreter is never a reason to install again.
$(TEST_STAMP): setup.py | $(BIN)/python
	$(BIN)/python -m pip install -e ".[plots,tests]"
	@touch $@

$(DEV_STAMP): setup.py | $(BIN)/python
	$(BIN)/python -m pip install -e ".[plots,dev]"
	@touch $(TEST_STAMP) $@

$(DOCS_STAMP): setup.py | $(BIN)/python
	$(BIN)/python -m pip install -e ".[docs]"
	@touch $@
