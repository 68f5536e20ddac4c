# make report [PROFILE=smollm2] [ONLY=01,02] [FAST=1] [COMMIT=1] · make test · make test-fast · make lab · make help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet
REPORT_FLAGS := $(if $(PROFILE),--profile $(PROFILE)) $(if $(ONLY),--only $(ONLY)) $(if $(FAST),--fast) $(if $(COMMIT),--commit)
WORKERS ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder
export PIP_DISABLE_PIP_VERSION_CHECK := 1
# Python compiles what is imported, which is a small part.
export PIP_NO_COMPILE := 1

.DEFAULT_GOAL := help
.PHONY: help report lint test test-fast lab pair clean

help:  ## this text
	@echo "make report [PROFILE=smollm2] [ONLY=01,02] [FAST=1] [COMMIT=1]"
	@echo "            run the notebooks, write reports/<profile>/index.html"
	@echo "            (COMMIT=1 also refreshes the committed notebooks, results, figures and pages)"
	@echo "make test   lint, all tests, every notebook at its fast setting (in two processes; WORKERS=4 for more)"
	@echo "make test-fast"
	@echo "            lint, and the tests that need no packaged model, no notebook and no network"
	@echo "make pair   train the adapters of data/aligned_pair and its bank and measure their cards (about two hours"
	@echo "            from nothing; adapters of the bank that are there are kept, so that a cut run goes on)"
	@echo "make lab    open JupyterLab on the notebooks"
	@echo "make clean  remove .venv and reports (data/cache stays)"

$(VENV)/.installed: requirements.txt requirements.lock pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "Python 3.11 or newer is wanted; $$($(PYTHON) --version) was found. Try make PYTHON=python3.12"; exit 1; }
	@test -x $(BIN)/python || { echo "making $(VENV)"; $(PYTHON) -m venv $(VENV); }
	@echo "installing torch (1 of 3): the largest download, a few minutes on a slow line"
	@$(PIP) --upgrade pip
	@$(PIP) torch==2.13.0
	@echo "installing the other libraries (2 of 3): about a hundred packages"
	@$(PIP) -r requirements.txt -c requirements.lock
	@echo "installing this repository (3 of 3)"
	@$(PIP) --quiet --no-deps -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.installed requirements-test.txt requirements-oracle.txt
	@echo "installing what the tests need (1 of 2)"
	@$(PIP) -r requirements-test.txt -c requirements.lock
	@echo "installing what results are compared with (2 of 2)"
	@$(PIP) --no-deps -r requirements-oracle.txt
	@touch $@

report: $(VENV)/.installed  ## run the notebooks and render the report
	$(BIN)/python -m helpers.report $(REPORT_FLAGS)

lint: $(VENV)/.installed-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

test: lint  ## lint and all tests
	$(PYTEST)

test-fast: lint  ## lint and the tests of the code alone
	$(PYTEST) -m "not packaged and not notebooks"

pair: $(VENV)/.installed  ## train data/aligned_pair anew
	@echo "installing what training the pair needs (1 of 1)"
	@$(PIP) -r requirements-pair.txt -c requirements.lock
	$(BIN)/python -m scripts.aligned_pair
	$(BIN)/python -m scripts.bank

lab: $(VENV)/.installed  ## JupyterLab
	$(BIN)/jupyter lab --notebook-dir notebooks

clean:
	rm -rf $(VENV) reports
