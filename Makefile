# make demo: set up .venv and run the method on the embedded data.  make test: set up what the tests need on top, and run them.
# PYTHON chooses the interpreter that .venv is made from (3.11 or newer).

PYTHON ?= python3
BIN := .venv/bin
.DELETE_ON_ERROR:
.PHONY: demo test lint clean

demo: .venv/.installed
	@echo "== ISICLE on generated shapes, generator included: minutes on two cores; everything goes to Models/"
	$(BIN)/python TrainISICLE.py --resume auto

test: .venv/.installed-dev lint
	@echo "== tests: a few minutes on two cores; those that need a GPU or real images say why they are skipped"
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: .venv/.installed-dev
	@echo "== ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is missing or older than Python 3.11: name another, as in: make demo PYTHON=python3.12"; exit 1; }
	@echo "== making a virtual environment in .venv"
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "cannot make .venv: install Python's venv module (Debian: python3-venv)"; exit 1; }

.venv/.installed: requirements.txt | .venv/bin/python
	@echo "== installing requirements.txt: torch is large, this takes minutes the first time"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt || \
		{ echo "the installation failed: see above; with a network and 8 GB of disk, run the same command again"; exit 1; }
	@touch $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	@echo "== installing what tests and benchmarks need on top"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt || \
		{ echo "the installation failed: see above; with a network, run the same command again"; exit 1; }
	@touch $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
