# make demo: the main job on the embedded model and generated scenes.  make test: lint and tests.
# make docs: the pages as a site, served on this machine.
# PYTHON=... names the interpreter, VENV=... the folder of the environment.
SHELL := bash
export VENV ?= .venv
bin := $(VENV)/bin

.PHONY: demo test lint site docs clean

demo:
	./environment.sh
	$(bin)/ptq4sam demo

# In one process; pytest -n auto takes one for each core.
test: lint site
	$(bin)/pytest

# Every page, link, anchor and docstring that the site shows is there: anything else is an error.
site:
	./environment.sh docs
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs build --strict --quiet

docs: site
	NO_MKDOCS_2_WARNING=1 $(bin)/mkdocs serve

lint:
	./environment.sh test dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/lint-imports
	$(bin)/mypy
	$(bin)/mypy --platform win32 --cache-dir .mypy_cache/win32
	$(bin)/mypy --platform darwin --cache-dir .mypy_cache/darwin
	$(bin)/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	! command -v actionlint || actionlint

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
