.DEFAULT_GOAL := help
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One stamp, written last: an install that was cut short is done again.
READY := $(VENV)/.complete
# Small operations: processes of one thread each give more than threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses auto --maxprocesses 4 --dist worksteal

.PHONY: help study docs test test-slow test-browser lint peers bench readme clean

help: ## this list
	@awk 'BEGIN {FS = ":.*## "} /^[a-z.-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

.venv: $(READY) ## the environment: made and filled when missing, incomplete or older than its lists

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "Python 3.11 or newer is needed; this is %s. Write: make PYTHON=python3.12 ..." % sys.version.split()[0])'
	test -f $@ || $(PYTHON) -m venv --clear $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test]'
	touch $@

study: $(READY) ## the digits study: trains twins, draws the figures, writes results/digits/report.html (about 5 minutes)
	$(BIN)/stability run digits --out results/digits

docs: $(VENV)/.docs ## the documentation as a site, build/docs/index.html; a warning is an error
	$(BIN)/python -m sphinx -b html -W --keep-going -q docs build/docs
	@echo "build/docs/index.html"

$(VENV)/.docs: $(READY)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	touch $@

test: $(READY) ## everything that is quick: unit, property, doc tests (under 10 minutes on 2 cores)
	$(PYTEST)

test-slow: $(VENV)/.docs ## the slow suites too, that of the documentation's site among them
	$(PYTEST) -m 'slow or not slow'

test-browser: $(READY) ## the reports in a headless browser (Chromium or Chrome of the system)
	@for name in chromium chromium-browser google-chrome google-chrome-stable chrome; do command -v $$name >/dev/null && exit 0; done; \
		echo "No Chromium or Chrome on PATH. Install one (Debian, Ubuntu: apt install chromium), or let playwright fetch its own:"; \
		echo "$(BIN)/pip install playwright && $(BIN)/playwright install chromium, and put that chrome on PATH."; exit 1
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[test,browser]'
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m browser tests/studies

lint: $(READY) ## style and import order
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

peers: $(READY) ## nngeometry, curvlinops and backpack, against which the tests then compare too (nothing of theirs replaces torch)
	$(BIN)/python -m pip install --quiet --no-deps --requirement benchmarks/peers/torch.txt

bench: $(READY) ## time, memory and growth against peers, into benchmarks/results/ (over an hour)
	$(BIN)/python -m benchmarks.peers.install
	$(BIN)/python -W ignore -m benchmarks

readme: $(READY) ## the README's figure and numbers from results/digits (after make study)
	$(BIN)/python docs/refresh_readme.py results/digits

clean: ## remove the environment and the results
	rm -rf $(VENV) results build docs/api docs/measured *.egg-info
