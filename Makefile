# SPDX-License-Identifier: Apache-2.0
# `make demo` and `make test` each make what they need, from a fresh clone on.

PYTHON ?= $(firstword $(foreach p,python3.11 python3.12 python3.13 python3,\
	$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	>/dev/null 2>&1 && echo $(p))))
VENV := .venv
BIN := $(VENV)/bin
PIP_OPTIONS := --quiet --disable-pip-version-check --constraint requirements/ci.txt
INSTALL := $(BIN)/python -m pip install $(PIP_OPTIONS)
DEMO_OUT ?= demo
# A file of tests is run by one process; each takes about 3 GB.
TEST_PROCESSES ?= 2
# Not the files of many tests first: those of few take the longest.
PYTEST := $(BIN)/python -m pytest --numprocesses=$(TEST_PROCESSES) --dist=loadfile \
	--no-loadscope-reorder
EXACT_TESTS := $(foreach name,codec codec_inputs codec_programs entropy_coding golden \
	integer_networks,tests/test_$(name).py)
NOTEBOOKS_VENV := .venv-notebooks
NOTEBOOKS_OUT ?= executed
TFC_VENV := .venv-tfc

.PHONY: demo test test-tfc notebooks format lint types unit clean

demo: $(VENV)/.core  ## compress the packaged photograph and show the result
	$(BIN)/semlic demo --model base --out $(DEMO_OUT) --force $(if $(IMAGE),"$(IMAGE)")

test: lint types unit  ## everything that continuous integration runs

# TensorFlow's import warns of what it uses itself.
test-tfc: $(TFC_VENV)/.done  ## the codec with both coders, under the JAX that tfc allows
	$(TFC_VENV)/bin/python -m pytest -W ignore::DeprecationWarning \
		tests/test_tfc_coding.py tests/test_codec.py tests/test_codec_inputs.py \
		tests/test_codec_programs.py tests/test_golden.py

# In an environment of their own, which has just what their extra names.
notebooks: export JAX_DISABLE_MOST_OPTIMIZATIONS = 1
notebooks: export SEMLIC_NOTEBOOK_QUICK = 1
notebooks: $(NOTEBOOKS_VENV)/.done  ## run the notebooks from start to end, shortened
	rm -rf $(NOTEBOOKS_OUT)
	mkdir -p $(NOTEBOOKS_OUT)
	cp colab/*.ipynb $(NOTEBOOKS_OUT)
	cd $(NOTEBOOKS_OUT) && for notebook in *.ipynb; do \
		$(CURDIR)/$(NOTEBOOKS_VENV)/bin/jupyter-execute \
			--inplace --timeout=1800 $$notebook || exit 1; \
	done

lint: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .

types: $(VENV)/.dev
	$(BIN)/mypy

# What decides whether files decode is compiled as users compile it. Most of the time of
# the others is compilation, so for them LLVM optimises little, as for the notebooks.
unit: $(VENV)/.dev
	$(PYTEST) $(PYTEST_ARGS) $(EXACT_TESTS)
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(PYTEST) $(PYTEST_ARGS) \
		$(addprefix --ignore=,$(EXACT_TESTS))

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.core: pyproject.toml requirements/ci.txt | $(BIN)/python
	$(INSTALL) --editable .
	touch $@

$(VENV)/.dev: pyproject.toml requirements/ci.txt | $(BIN)/python
	$(INSTALL) --editable ".[dev]"
	touch $@ $(VENV)/.core

$(NOTEBOOKS_VENV)/.done: pyproject.toml requirements/ci.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer is needed" >&2; exit 1; }
	$(PYTHON) -m venv $(NOTEBOOKS_VENV)
	$(NOTEBOOKS_VENV)/bin/python -m pip install $(PIP_OPTIONS) --editable ".[notebooks]"
	touch $@

$(TFC_VENV)/.done: pyproject.toml requirements/tfc.txt
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed" >&2; exit 1; }
	$(PYTHON) -m venv $(TFC_VENV)
	$(TFC_VENV)/bin/python -m pip install --quiet --disable-pip-version-check \
		--constraint requirements/tfc.txt --editable ".[tfc]" pytest hypothesis
	touch $@

clean:
	rm -rf $(VENV) $(DEMO_OUT) .mypy_cache .pytest_cache .ruff_cache \
		$(NOTEBOOKS_VENV) $(NOTEBOOKS_OUT) $(TFC_VENV)
