# Every target does its own set-up: a virtual environment in .venv with the tested versions.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
DATA ?= $(PLUGBRIDGE_DATA)
READY := $(VENV)/.ready

.PHONY: help demo test lint setup pair clean
help:  ## show the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 10

setup: $(READY)  ## create the virtual environment

# torch first and by version: a plain `torch` may bring several GB of CUDA
$(READY): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "error: $(PYTHON) not found; set PYTHON=python3.x (3.11 or newer)" >&2; exit 2; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing torch (CPU is enough) and the tested versions of the rest into $(VENV) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

demo: $(READY)  ## the main job on the embedded models, in a few minutes
	@$(BIN)/plugbridge run configs/demo.yaml --out runs/demo

LINT = $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/pyright && $(BIN)/lint-imports --no-cache

lint: $(READY)
	@$(LINT)

# the checks run beside the first tests, pyright on one core alone would leave the other idle; they are told at the end
test: $(READY)  ## every check and every test
	@($(LINT)) >$(VENV)/lint.txt 2>&1 & lint=$$!; \
	$(BIN)/python -m pytest -n 2 --dist worksteal -q; tests=$$?; \
	wait $$lint; checks=$$?; cat $(VENV)/lint.txt; test $$checks = 0 && exit $$tests

# the texts: see pairs/README.md; every run resumes where it was, the result lies in runs/pairs beside the shipped pairs/
pair: $(READY)  ## pretrain the embedded models anew: make pair DATA=DIR (hours)
	@test -n "$(DATA)" || { echo "error: give the directory of the texts (see pairs/README.md): make pair DATA=DIR" >&2; exit 2; }
	$(BIN)/python pairs/text.py --data "$(DATA)" --out runs/pairs/wordnet-kind
	$(foreach recipe,gpt2-small gpt2-large t5-small t5-large,\
	  $(BIN)/python pairs/pretrain.py $(recipe) --data "$(DATA)" --out runs/pairs --threads 2 && ) true
	$(BIN)/python pairs/judge.py runs/pairs/gpt2 --task runs/pairs/wordnet-kind --json runs/pairs/gpt2.json
	$(BIN)/python pairs/judge.py runs/pairs/t5 --task runs/pairs/wordnet-kind --json runs/pairs/t5.json

clean:  ## remove the virtual environment and all runs
	rm -rf $(VENV) runs
