# `make demo` and `make test` each work alone on a fresh clone with Python 3.11 or newer and pip.

PYTHON ?= python3
VENV ?= .venv
# More options for pytest, for example: make test ARGS="--device cuda -k sigma"
ARGS ?=
WORKERS ?= 2
# By files and in the order of tests/conftest.py: what the tests of a file share is made once, and long files come first.
DISTRIBUTION := --dist loadfile --no-loadscope-reorder
# Of training time; none: as long as the default recipe says
MINUTES ?=
OUT ?= runs/demo

BIN := $(VENV)/bin
# Through the constraints whatever is installed: they pin torch, and with it the choice of a CPU build where one is found.
# No byte code: compiling all of torch takes longer than what the first import of the needed part costs.
INSTALL := $(BIN)/python -m pip install --quiet --no-compile --disable-pip-version-check -c constraints.txt
RECIPE_INPUTS := pyproject.toml constraints.txt

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test lint oldest docs benchmark clean

help:  ## Show this list.
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "  make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(VENV)/gan.stamp  ## Train on the built-in images for a few minutes and write a report.
	$(BIN)/spectralnorm train --out $(OUT) $(if $(MINUTES),--minutes $(MINUTES))
	@echo
	@echo "Open the report: $(abspath $(OUT))/report.html"

test: lint  ## Lint, types, import contracts, tests and doctests.
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) $(DISTRIBUTION) $(ARGS)

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports --no-logo

# It asks for a Triton and a sympy of its own, and a newer numpy is more than the interpreter of that Triton knows.
OLDEST := torch==2.6.0 numpy==2.2.6

oldest:  ## The tests with the oldest torch that is supported, in .venv-oldest (a download of gigabytes).
	$(PYTHON) -m venv .venv-oldest
	{ grep -Ev '^(torch|triton|sympy|numpy)==' constraints.txt; printf '%s\n' $(OLDEST); } > .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --disable-pip-version-check -c .venv-oldest/constraints.txt -e ".[gan,dev]"
	OMP_NUM_THREADS=1 .venv-oldest/bin/python -m pytest -n $(WORKERS) $(DISTRIBUTION) $(ARGS)

docs: $(VENV)/docs.stamp  ## Build the documentation into site/.
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Every other number has its script in benchmarks/ too, named where the number stands.
benchmark: $(VENV)/dev.stamp  ## Measure here what README claims of speed and samples (half an hour or more).
	$(BIN)/python benchmarks/normalization.py
	$(BIN)/python benchmarks/trainer.py --parts speed --rounds 3
	$(BIN)/python benchmarks/default_recipe.py

clean:  ## Remove the environment and everything built; run folders stay.
	rm -rf $(VENV) dist site .pytest_cache .ruff_cache .hypothesis .import_linter_cache

$(VENV)/pyvenv.cfg:
	@command -v $(PYTHON) >/dev/null || { echo "There is no $(PYTHON); install Python 3.11 or newer, or name it: make PYTHON=/path/to/python3"; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is needed, but $(PYTHON) is $$($(PYTHON) -V 2>&1); name another: make PYTHON=python3.11"; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "$(PYTHON) cannot make environments: install its venv package (Debian: apt install python3-venv)"; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Each stamp is younger than what it was made from, so an unchanged environment is left alone.
$(VENV)/gan.stamp: $(VENV)/pyvenv.cfg $(RECIPE_INPUTS)
	$(INSTALL) -e ".[gan]"
	@touch $@

$(VENV)/dev.stamp: $(VENV)/pyvenv.cfg $(RECIPE_INPUTS)
	$(INSTALL) -e ".[gan,dev]"
	@touch $@ $(VENV)/gan.stamp

$(VENV)/docs.stamp: $(VENV)/pyvenv.cfg $(RECIPE_INPUTS)
	$(INSTALL) -e ".[gan,docs]"
	@touch $@
