# Everything here works on a machine that has python3 (3.11 or later, with venv) and make.
.DEFAULT_GOAL := help
PYTHON ?= python3
BIN := .venv/bin
# Nothing of a run goes anywhere but to this machine.
export DO_NOT_TRACK := 1

.PHONY: help install run test test-slow lint types format viz ui demo notebook bench requirements clean

help:  ## Show what there is to make
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | awk -F':.*## ' '{printf "  make %-13s %s\n", $$1, $$2}'

# uv stands apart from what it installs, so that it can keep .venv exactly as pinned.
.venv/uv/bin/uv:
	$(PYTHON) -m venv .venv
	$(PYTHON) -m venv .venv/uv
	.venv/uv/bin/python -m pip install --quiet --disable-pip-version-check uv

.venv/.installed: requirements.txt pyproject.toml .venv/uv/bin/uv
	.venv/uv/bin/uv pip sync --quiet --python $(BIN)/python --require-hashes requirements.txt
	.venv/uv/bin/uv pip install --quiet --python $(BIN)/python --no-deps --editable .
	@touch $@

install: .venv/.installed  ## Set up the pinned environment in .venv

run: install  ## Answer the question on MNIST in minutes: phase 1, debug size, seven arms, three seeds
	$(BIN)/kedro run --pipeline phase1 --env debug

test: install  ## Run the fast tests with coverage
	$(BIN)/pytest --cov --cov-report=term:skip-covered

test-slow: install  ## Run the tests of whole runs, and of the demo in a browser
	$(BIN)/pytest -m slow

lint: install types  ## Check style, import directions and types
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/lint-imports

types: install  ## Check types
	$(BIN)/mypy

format: install  ## Format the code and mend what can be mended
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

viz: install  ## Show the pipeline with its figures in a browser
	$(BIN)/kedro viz run

ui: install  ## Show the tracked runs in a browser
	$(BIN)/kedro mlflow ui

demo: install  ## Serve the best checkpoint: drop an image in a browser, see what it is
	$(BIN)/kedro run --pipeline demo

# JupyterLab is laid over .venv, which stays as pinned, and finds the kernel and Plotly's extension there.
notebook: install  ## Open the notebook about phase 1 in a browser; fetches JupyterLab the first time
	JUPYTER_PATH=$(CURDIR)/.venv/share/jupyter .venv/uv/bin/uv run --no-project --python $(BIN)/python --with jupyterlab \
		jupyter lab notebooks/phase1_analysis.ipynb

bench: install  ## Measure speed on this machine, each script one table
	@for script in training overhead matching start_up; do $(BIN)/python benchmarks/$$script.py && echo || exit 1; done

requirements: .venv/uv/bin/uv  ## Pin the environment anew from pyproject.toml
	.venv/uv/bin/uv pip compile pyproject.toml --all-extras --universal --python-version 3.11 --generate-hashes \
		--no-emit-index-url --no-header --upgrade --quiet --output-file requirements.txt

clean:  ## Remove the environment, caches and everything that runs left, but no raw data
	rm -rf .venv .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .coverage htmlcov build .viz \
		mlflow.db* mlruns data/05_model_input data/06_models data/07_model_output data/08_reporting
