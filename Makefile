# Every target does its own set-up: Python and make are all that a machine needs.
# PYTHON=python3.12 make test picks the interpreter; another version rebuilds the environment.
PYTHON ?= python3
VENV ?= .venv
RUN = "$(VENV)/bin/python"

.DEFAULT_GOAL := help
.PHONY: help setup lint format test demo clean

help: ## list the targets
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' Makefile

setup: ## make or update the environment in .venv
	@"$(PYTHON)" requirements/bootstrap.py --venv "$(VENV)"

lint: setup ## ruff (lint and format) and mypy
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy retina_plugin train_net.py

format: setup ## let ruff rewrite what it can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

test: lint ## lint, types and tests
	$(RUN) -m pytest

demo: setup ## train and evaluate on the embedded digits
	$(RUN) train_net.py --config-file configs/quick/digits_R18.yaml

clean: ## remove caches and build products; the environment and output/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -path "./$(VENV)" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
