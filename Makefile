# Every target sets up what it needs: Python and make are all that a machine must have.
# PYTHON=python3.12 make test picks the interpreter.
PYTHON ?= python3
VENV ?= .venv
RUN = "$(VENV)/bin/python"
# On all cores, a file of tests on one of them. Each test has one thread: more would wait in turns.
# A test that hangs or ends its process is named and fails, and the others go on.
PYTEST = OMP_NUM_THREADS=1 $(RUN) -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile
# These load three other runtimes, each with its own threads: in processes of their own.
EXPORTS = tests/deploy tests/test_docs.py
SETUP = PYTHON="$(PYTHON)" requirements/setup.sh
# Another interpreter is another stamp, so that setup.sh sees it and says what to do.
INSTALLED := $(VENV)/installed-$(shell "$(PYTHON)" -c 'import sys; print("%d.%d" % sys.version_info[:2])')

.DEFAULT_GOAL := help
.PHONY: help setup lint format test test-slow demo coverage docs lock test-latest clean

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 22

setup: $(INSTALLED) ## make or update the environment in .venv

# Written last: an interrupted set-up is repeated.
$(INSTALLED): pyproject.toml setup.py $(wildcard requirements/*)
	@$(SETUP) "$(VENV)"
	@touch "$@"

lint: setup ## ruff (lint and format), mypy, direction of imports
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -c "from importlinter.cli import lint_imports_command as c; c()" --no-cache

format: setup ## let ruff rewrite what it can
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

test: lint ## lint, types and tests
	$(PYTEST)

test-slow: setup ## what takes minutes: the tests marked slow, and some minutes of fuzzing
	$(PYTEST) -m slow -vv --durations 10 $(EXPORTS:%=--ignore %)
	$(PYTEST) -m slow -vv --durations 10 $(EXPORTS)
	$(PYTEST) --dist load tests/fuzz --hypothesis-profile=long

demo: setup ## train and evaluate on the embedded digits
	$(RUN) train_net.py --config-file configs/quick/digits_R18.yaml

coverage: setup ## which lines of the package the tests run
	$(RUN) -m pytest --cov=retina_plugin --cov-report=term-missing:skip-covered

docs: setup ## write the generated pages of docs/ from the code and the tests
	$(RUN) docs/make_configuration.py
	$(RUN) docs/make_models.py
	$(RUN) docs/make_deployment.py
	$(RUN) docs/make_reliability.py

lock: setup ## renew requirements/lock.txt with the newest versions
	$(RUN) -m uv pip compile --universal --python-version 3.11 --fork-strategy fewest --upgrade \
	    --all-extras --annotation-style line --custom-compile-command "make lock" \
	    --quiet --output-file requirements/lock.txt pyproject.toml

test-latest: ## the tests with the newest versions of everything, in .venv-latest
	@$(SETUP) .venv-latest latest
	.venv-latest/bin/python -m pytest

clean: ## remove caches and build products; environments and output/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache .import_linter_cache \
	    .hypothesis
	find . -path "./.venv*" -prune -o -name __pycache__ -type d -prune -exec rm -rf {} +
