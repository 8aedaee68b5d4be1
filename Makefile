PYTHON ?= python3
BIN := .venv/bin
LOWEST := .venv-lowest/bin
# pip would tell it after it has fetched torch.
CHECK_PYTHON := import sys; sys.exit(sys.version_info < (3, 11) and "$(PYTHON) is Python %d.%d; 3.11 or later is needed: make PYTHON=python3.12 ..." % sys.version_info[:2])
AXE := .axe/node_modules/axe-core/axe.min.js

.PHONY: help demo static-space test test-all test-lowest axe test-browser test-examples test-faults test-ray test-mds docs check types format
help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

.venv/.installed: pyproject.toml constraints-cpu.txt
	@$(PYTHON) -c '$(CHECK_PYTHON)'
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile -c constraints-cpu.txt torch
	$(BIN)/pip install --quiet --no-compile -c constraints-cpu.txt -e ".[dev]"
	touch $@

demo: .venv/.installed ## reconstruct pictures with the embedded checkpoint, into demo/
	$(BIN)/python scripts/demo.py

static-space: .venv/.installed ## the tokenizer as a page that runs in the browser, into build/static-space; needs npm
	$(BIN)/python scripts/static_space.py

test: .venv/.installed ## the default tests, two files at a time
	$(BIN)/python -m pytest -n 2 --dist loadfile

test-all: .venv/.installed ## the slow tests too
	$(BIN)/python -m pytest -m ''

.venv-lowest/.installed: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv .venv-lowest
	$(LOWEST)/pip install --quiet -c constraints-lowest.txt torch
	$(LOWEST)/pip install --quiet -c constraints-lowest.txt -e ".[train,eval,perceptual,space,onnx,benchmarks]" pytest
	touch $@

test-lowest: .venv-lowest/.installed ## the default tests with the lowest versions that pyproject.toml allows
	$(LOWEST)/python -m pytest

$(AXE): Makefile
	npm install --silent --no-audit --no-fund --prefix .axe axe-core@4.14.1
	touch $@

axe: $(AXE)

test-browser: .venv/.installed $(AXE) ## the pages in a real browser, both at a time; needs Chromium, and npm for axe-core
	$(BIN)/python -m pytest -n 2 --dist loadfile tests/browser

test-examples: .venv/.installed ## the scripts of examples/ and the notebook
	$(BIN)/python -m pytest tests/examples

test-faults: .venv/.installed ## kills, full disks, damaged files, fuzzed inputs: a table; FAULTS=small: a share, FAULTS_SEED=1: others
	$(BIN)/python -m pytest -m '' tests/faults

test-ray: .venv/.installed ## tokenize-dataset on a Ray cluster of two workers, one of which is killed; installs ray
	$(BIN)/pip install --quiet --no-compile -c constraints-cpu.txt -e ".[ray]"
	$(BIN)/python -m pytest -m '' tests/cluster

# mosaicml-streaming asks for transformers below 5: what of it reads MDS is installed beside, without what it asks for.
test-mds: .venv/.installed ## what export-tokens writes for MosaicML streaming, read by its own reader
	$(BIN)/pip install --quiet --no-deps --target build/mds mosaicml-streaming python-snappy cramjam Brotli zstd catalogue
	PYTHONPATH=build/mds $(BIN)/python -m pytest tests/test_token_datasets.py -k mds

docs: .venv/.installed ## this documentation as a site, into site/; fails for a broken link
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

check: .venv/.installed ## lint and format, changing nothing
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: .venv/.installed ## mypy on the modules of the public face and on a user's script
	$(BIN)/mypy

format: .venv/.installed ## lint and format in place
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
