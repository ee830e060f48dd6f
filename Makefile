# Two commands do everything: `make repro` and `make test`. Both set up .venv first (pipeline/setup_env.sh), and do again
# only what a change asks for: each step of the set-up leaves a stamp in .venv, written last, so an interrupted one is
# taken up where it stopped. Paths here are relative, because make cannot name a folder with a space in its path.
# PYTHON=python3.11 make repro   chooses the Python of a new .venv.

export PYTHON ?= python3
# Small torch operations are many times slower when idle OpenMP threads spin on busy cores.
export OMP_WAIT_POLICY ?= PASSIVE
# Models and data come from folders, never from a hub.
export HF_HUB_OFFLINE ?= 1
export TRANSFORMERS_OFFLINE ?= 1
export HF_DATASETS_OFFLINE ?= 1
export DVC_NO_ANALYTICS ?= 1
export TOKENIZERS_PARALLELISM ?= false
unexport PYTHONPATH PYTHONHOME

# DVC's stages and the tests call `python`, `dvc` and `deltatc`: those of .venv.
VENV := PATH="$$PWD/.venv/bin:$$PATH"

# A .venv that was moved here with its folder, or whose Python is gone, is made anew; a deleted folder is pulled again.
$(shell test -x .venv/bin/python && grep -qsxF "$$(pwd -P)" .venv/.folder || rm -f .venv/.requirements)
$(foreach folder,data models,$(shell test -d $(folder) || rm -f .venv/.pulled-$(folder)))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.PHONY: help repro test setup bench bench-full bootstrap lint clean

help: ## show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "make %-10s %s\n", $$1, $$2}' Makefile

repro: setup ## run the study (what is up to date is not run again) and show its results
	@$(VENV) dvc repro
	@$(VENV) deltatc summary

test: setup ## run the tests; ARGS="-k ops" chooses some
	@$(VENV) pytest $(ARGS)

setup: .venv/.extension .venv/.pulled-data .venv/.pulled-models ## only set up: packages, extension, data and models

bench: .venv/.extension ## time the operator beside its peers (five minutes); ARGS="-k 16k" chooses some
	@$(VENV) pytest benchmarks --benchmark-enable --benchmark-only $(ARGS)

bench-full: .venv/.extension ## the same with more shapes and torch.compile (an hour)
	@$(VENV) pytest benchmarks --benchmark-enable --benchmark-only --full $(ARGS)

bootstrap: .venv/.extension .venv/.pulled-data ## make the tiny model and its base transcoders again (minutes)
	@$(VENV) python -m pipeline.bootstrap
	@$(VENV) dvc add models
	@$(VENV) dvc push --remote embedded data.dvc models.dvc
	@touch .venv/.pulled-models

lint: .venv/.requirements ## check style and types
	@$(VENV) ruff check
	@$(VENV) ruff format --check
	@$(VENV) mypy

clean: ## remove .venv and what was built; data, models and results stay
	rm -rf .venv build deltatc.egg-info deltatc/_ops*.so .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks

.venv/.requirements: requirements.txt constraints.txt
	@pipeline/setup_env.sh requirements
	@touch $@

.venv/.extension: .venv/.requirements setup.py pyproject.toml $(shell find csrc)
	@pipeline/setup_env.sh extension
	@touch $@

.venv/.pulled-%: %.dvc | .venv/.requirements
	@pipeline/setup_env.sh pull $*
	@touch $@
