# Co-DETR: `make help` lists the targets.
#
# Variables: VENV (environment, default .venv), PYTHON (makes it, default python3),
# OPTS (config overrides for the quick start), OUTPUT (where the quick start writes),
# TEST_JOBS (processes that share the test files, default 2).
# The extension's build switches (FORCE_CUDA, ...) are read from the environment by setup.py.

VENV ?= .venv
PYTHON ?= python3
OUTPUT ?= output/quickstart
OPTS ?=
TEST_JOBS ?= 2

RUN := $(VENV)/bin/python

# Waiting OpenMP threads spin for long by default, which stalls both sides on a shared machine.
export GOMP_SPINCOUNT ?= 10000

.DEFAULT_GOAL := help
.PHONY: help setup quickstart test test-core lint docs clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

setup: ## make the environment, install everything, build the extension (once)
	@VENV="$(VENV)" PYTHON="$(PYTHON)" bash scripts/setup.sh

quickstart: setup ## make the digits data set, train a small Co-DETR on it, evaluate, plot
	$(RUN) tools/make_digits.py --out datasets/digits
	$(RUN) train_net.py --config-file configs/quickstart.py train.output_dir=$(OUTPUT) $(OPTS)
	$(RUN) tools/plot_results.py $(OUTPUT)

test-core: setup ## run the quick tests of the core
	$(RUN) -m pytest -q -m "not tools and not slow" -n $(TEST_JOBS) --dist loadfile

test: setup ## run all tests
	$(RUN) -m pytest -q -n $(TEST_JOBS) --dist loadfile

lint: setup ## check style and formatting
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

docs: setup ## build the pages of docs/ as a site in site/ (a dead link fails)
	$(RUN) -m pip install -q --disable-pip-version-check -r requirements-docs.txt
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict

clean: ## remove build products (keeps the environment, data and results)
	rm -rf build site *.egg-info .pytest_cache .ruff_cache
	find co_detr configs tests tools -type d -name __pycache__ -prune -exec rm -rf {} +
	find co_detr -name '*.so' -delete
