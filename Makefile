# make demo: the main job on the embedded model and generated scenes.  make test: lint and tests.
# PYTHON=... names the interpreter, VENV=... the folder of the environment.
SHELL := bash
export VENV ?= .venv
bin := $(VENV)/bin

.PHONY: demo test lint clean

demo:
	./environment.sh
	$(bin)/ptq4sam demo

test: lint
	$(bin)/pytest

lint:
	./environment.sh test dev
	$(bin)/ruff check .
	$(bin)/ruff format --check .
	$(bin)/lint-imports
	$(bin)/mypy
	$(bin)/mypy --platform win32 --cache-dir .mypy_cache/win32
	$(bin)/mypy --platform darwin --cache-dir .mypy_cache/darwin
	! command -v actionlint || actionlint

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
