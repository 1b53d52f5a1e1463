# make demo: set up .venv and run the method on the embedded data.  make test: set up what the tests need on top, and run them.
# make soak: kill runs, damage their files and fill their disks, for an hour; the counts go to Results/soak.json.
#
# PYTHON=python3.12     the interpreter that .venv is made from, 3.11 or newer
# LATEST=1              install the newest versions, not those of constraints.txt
# PIP_FLAGS="..."       further flags of pip. CPU wheels of torch, 0.3 GB instead of 5.7, in a .venv that is not there yet:
#                       make demo PIP_FLAGS="--extra-index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check $(PIP_FLAGS)
.DELETE_ON_ERROR:
.PHONY: demo test lint soak clean always

ifdef LATEST
PIP += --upgrade --upgrade-strategy eager
# without a stamp, the next start without LATEST installs constraints.txt again
STAMP := rm -f
INSTALLED_BY := always
else
PIP += -c constraints.txt
STAMP := touch
INSTALLED_BY := constraints.txt
endif

demo: .venv/.installed
	@echo "== ISICLE on generated shapes, generator included: minutes on two cores; everything goes to Models/"
	$(BIN)/python TrainISICLE.py --resume auto

test: .venv/.installed-dev lint
	@echo "== tests: five to ten minutes on two cores; those that need a GPU or real images say why they are skipped"
	$(BIN)/python -m pytest -n 2 --dist worksteal

soak: .venv/.installed-dev
	@echo "== attacks on the training scripts: about an hour on two cores"
	$(BIN)/python -m Benchmarks.Soak

lint: .venv/.installed-dev
	@echo "== ruff"
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "$(PYTHON) is missing or older than Python 3.11: name another, as in: make demo PYTHON=python3.12"; exit 1; }
	@echo "== making a virtual environment in .venv"
	@$(PYTHON) -m venv .venv || { rm -rf .venv; echo "cannot make .venv: install Python's venv module (Debian: python3-venv)"; exit 1; }

.venv/.installed: requirements.txt $(INSTALLED_BY) | .venv/bin/python
	@echo "== installing requirements.txt: torch is large, this takes minutes the first time"
	@$(PIP) -r requirements.txt || \
		{ echo "the installation failed: see above; with a network and 8 GB of disk, run the same command again"; exit 1; }
	@$(STAMP) $@

.venv/.installed-dev: requirements-dev.txt .venv/.installed
	@echo "== installing what tests and benchmarks need on top"
	@$(PIP) -r requirements-dev.txt || \
		{ echo "the installation failed: see above; with a network, run the same command again"; exit 1; }
	@$(STAMP) $@

clean:
	rm -rf .venv .pytest_cache .ruff_cache
