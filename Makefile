# make demo, make test: each sets up .venv from nothing first. Nothing outside this folder is changed.
PYTHON ?= python3
VENV   ?= .venv
# More options for pip, for example where to find a CPU build of torch.
PIP_FLAGS ?=
# More options for pytest, for example: make test PYTEST_FLAGS='-m "" -k kronecker'
PYTEST_FLAGS ?=
DEMO_FLAGS ?=
# For table1: where the data sets are, and more options, for example ARGS='--quick'.
DATA ?=
ARGS ?=
WORKERS ?= 2

BIN   := $(VENV)/bin
STAMP := $(VENV)/.installed
TORCH := $(shell grep -E '^torch==' constraints.txt)

.PHONY: help setup test test-all lint format types docs pictures demo bench table1 clean
.DEFAULT_GOAL := help

help:  ## list the targets
	@grep -E '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# torch goes first and alone, at the pinned version, so that no other package decides which build is taken.
$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -c 'import sys; sys.version_info >= (3, 11, 5) or \
	  sys.exit("constraints.txt needs Python 3.11.5 or newer, found %d.%d.%d; set PYTHON=" % sys.version_info[:3])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) $(TORCH)
	$(BIN)/python -m pip install --quiet $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	touch $(STAMP)

setup: $(STAMP)  ## make the virtual environment

test: $(STAMP)  ## run the test suite (two processes)
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_FLAGS)

test-all: $(STAMP)  ## run it with the slow tests
	$(BIN)/python -m pytest -n $(WORKERS) -m '' $(PYTEST_FLAGS)

lint: $(STAMP)  ## ruff: rules and formatting
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)  ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)  ## mypy --strict over src/
	$(BIN)/mypy

docs: $(STAMP)  ## check its tables, run its code, build it with warnings as errors
	$(BIN)/python docs/hooks/tables.py --check
	$(BIN)/python -W ignore docs/hooks/run_snippets.py README.md $$(find docs -name '*.md' | sort)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

pictures: $(STAMP)  ## draw the pictures of the tutorials again
	$(BIN)/python -W ignore docs/hooks/run_snippets.py --pictures docs/assets/tutorials docs/tutorials/*.md

demo: $(STAMP)  ## train, fit several posteriors, print a table, write pictures to demo_out/
	$(BIN)/python examples/demo.py $(DEMO_FLAGS)

bench: $(STAMP)  ## every script in benchmarks/
	set -e; for script in benchmarks/*.py; do case $$script in */_*) continue;; esac; \
	  echo "== $$script"; $(BIN)/python $$script; done

table1: $(STAMP)  ## the results table of the ScaLLA paper: make table1 DATA=DIR [ARGS='--quick']
	@test -n "$(DATA)" || { echo "table1 needs DATA=DIR, a folder with fashion-mnist/, mnist/ and kmnist/"; exit 2; }
	$(BIN)/python -W ignore benchmarks/table1/run.py --data-dir $(DATA) $(ARGS)

clean:  ## remove what the other targets made
	rm -rf $(VENV) site demo_out build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis
