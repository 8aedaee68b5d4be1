PYTHON ?= python3
BIN := .venv/bin
LOWEST := .venv-lowest/bin
AXE := .axe/node_modules/axe-core/axe.min.js

.PHONY: help demo test test-all test-lowest test-browser test-examples test-faults docs check format
help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

.venv/.installed: pyproject.toml constraints-cpu.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet -c constraints-cpu.txt torch
	$(BIN)/pip install --quiet -c constraints-cpu.txt -e ".[dev]"
	touch $@

demo: .venv/.installed ## reconstruct pictures with the embedded checkpoint, into demo/
	$(BIN)/python scripts/demo.py

test: .venv/.installed ## the default tests
	$(BIN)/python -m pytest

test-all: .venv/.installed ## the slow tests too
	$(BIN)/python -m pytest -m ''

.venv-lowest/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	$(LOWEST)/pip install --quiet -c constraints-lowest.txt torch
	$(LOWEST)/pip install --quiet -c constraints-lowest.txt -e ".[train,eval,perceptual,space,benchmarks]" pytest
	touch $@

test-lowest: .venv-lowest/.installed ## the default tests with the lowest versions that pyproject.toml allows
	$(LOWEST)/python -m pytest

$(AXE): Makefile
	npm install --silent --no-audit --no-fund --prefix .axe axe-core@4.14.1
	touch $@

test-browser: .venv/.installed $(AXE) ## the demo in a real browser; needs Chromium, and npm for axe-core
	$(BIN)/python -m pytest tests/browser

test-examples: .venv/.installed ## the scripts of examples/ and the notebook
	$(BIN)/python -m pytest tests/examples

test-faults: .venv/.installed ## kills, full disks, damaged files, fuzzed inputs: a table; FAULTS=small: a share, FAULTS_SEED=1: others
	$(BIN)/python -m pytest -m '' tests/faults

docs: .venv/.installed ## this documentation as a site, into site/; fails for a broken link
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: .venv/.installed ## lint and format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/.installed ## lint and format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
