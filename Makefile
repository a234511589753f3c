# Everything starts from `make setup`: a virtual environment in .venv with the package, editable, and its command.
# Each step is done once; what it made is newer than pyproject.toml until that changes, so a second call needs no network.
# --no-compile: compiling every module of torch took a third of the time of installing; Python compiles what it imports.

PYTHON ?= python3
BIN := .venv/bin
# The requirements of pyproject.toml that begin with torch.
TORCH := $(shell sed -n 's/^    \("torch[^"]*"\),$$/\1/p' pyproject.toml)

.PHONY: help setup demo test test-all check results rehearsal bench gpu gpu-kit crash-test mutants long-run fuzz audit docs clean

help:
	@echo "make demo     train on the built-in digits: BCL, and plain cross-entropy beside it; write the report"
	@echo "make setup    .venv with the command .venv/bin/equipoise"
	@echo "make test     what a change can break (five minutes on two cores)"
	@echo "make test-all the long tests too: many processes, kills, damaged files"
	@echo "make check    ruff, pyright, import contracts"
	@echo "make results  the table of docs/results.md for Digits-LT (20 runs; what is there already is kept)"
	@echo "make rehearsal [PHOTOS=folder]  the BCL authors' commands on miniature ImageNet-LT and iNaturalist 2018"
	@echo "make bench    speed against the obvious way, and against what was measured last (8 minutes)"
	@echo "make gpu [CIFAR=folder] [PHOTOS=folder]      does training work on this machine's GPU, and how fast (9 minutes)"
	@echo "make gpu-kit [CIFAR=folder] [PHOTOS=folder]  what a bare machine with a GPU lacks, into .gpu-kit"
	@echo "make crash-test  a run that is killed 60 times ends where one ends that is left alone (about half an hour)"
	@echo "make mutants  would the tests notice? the package is broken in many places, one at a time (half an hour)"
	@echo "make long-run  memory, open files, processes and logs over 200 epochs (5 minutes, on Linux)"
	@echo "make fuzz [INPUTS=1000000]  damaged files for the readers of our own (about 20 minutes on two cores)"
	@echo "make audit    known vulnerabilities of what is installed, and an SBOM in build/"
	@echo "make docs     the documentation as a site: site/index.html; warnings are errors"
	@echo "make clean    remove .venv and caches; runs/ stays"

setup: .venv/.setup

demo: setup
	$(BIN)/equipoise train

# Two at a time, one thread each; the tests of a file stay together, since they share what takes long to make.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

test: .venv/.test
	$(PYTEST) -m "not long"

test-all: .venv/.test
	$(PYTEST) -m "not long"
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m long --durations=20

check: .venv/.check
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/pyright --project pyproject.toml
	$(BIN)/lint-imports

results: setup
	$(BIN)/equipoise compare digits-lt --methods bcl,ce,logit-adjusted,supcon+la --seeds 5

rehearsal: .venv/.test
	$(BIN)/python -m benchmarks.rehearsal $(if $(PHOTOS),"$(PHOTOS)")

bench: .venv/.test
	$(BIN)/python -m benchmarks $(BENCHMARKS)

gpu: .venv/.test
	$(BIN)/python -m benchmarks.gpu $(if $(CIFAR),--data "$(CIFAR)") $(if $(PHOTOS),--photos "$(PHOTOS)")

gpu-kit: .venv/bin/python
	$(BIN)/python -m benchmarks.gpu.kit "$(or $(CIFAR),../shared/data/cifar10)" "$(or $(PHOTOS),../shared/data/photos)"

crash-test: setup
	$(BIN)/python -m benchmarks.crash

mutants: .venv/.test
	$(BIN)/python -m benchmarks.mutants

long-run: setup
	$(BIN)/python -m benchmarks.long_run

fuzz: .venv/.fuzz
	$(BIN)/python -m benchmarks.fuzz $(or $(INPUTS),1000000)

audit: .venv/.audit
	$(BIN)/python -m benchmarks.audit

# Anew every time: a page that is kept has the navigation of before.
docs: .venv/.docs
	rm -rf site build/docs
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -d build/docs docs site
	@echo "site/index.html"

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "equipoise needs Python 3.11 or newer, but $(PYTHON) is older or missing; try: make PYTHON=python3.12"; exit 2; }
	@# Some systems ship Python without ensurepip: then the system's pip fills the environment.
	$(PYTHON) -m venv .venv || { $(PYTHON) -m venv --clear --without-pip .venv && $(PYTHON) -m pip --python .venv install pip; }

.venv/.setup: pyproject.toml | .venv/bin/python
	@echo "installing into .venv, once: first torch, the largest part (up to 3 GB; a minute from a near disk) ..."
	@$(BIN)/python -m pip install --quiet --no-compile $(TORCH)
	@echo "... then what is smaller: timm, opencv, scikit-learn and others ..."
	@$(BIN)/python -m pip install --quiet --no-compile --editable '.[weights]'
	@echo "... done"
	@touch $@

.venv/.test: .venv/.setup
	@echo "installing what the tests need ..."
	@$(BIN)/python -m pip install --quiet --no-compile --editable '.[test]'
	@touch $@

.venv/.check: .venv/.test
	@echo "installing ruff, pyright and import-linter ..."
	@$(BIN)/python -m pip install --quiet --no-compile --editable '.[check]'
	@touch $@

.venv/.docs: .venv/.setup
	@$(BIN)/python -m pip install --quiet --no-compile --editable '.[docs]'
	@touch $@

.venv/.fuzz: .venv/.setup
	@$(BIN)/python -m pip install --quiet --no-compile --editable '.[fuzz]'
	@touch $@

.venv/.audit: .venv/.setup
	@$(BIN)/python -m pip install --quiet --no-compile --editable '.[audit]'
	@touch $@

clean:
	rm -rf .venv build src/*.egg-info .ruff_cache .import_linter_cache .hypothesis
