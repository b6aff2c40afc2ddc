# make demo: the main job on the embedded model and generated scenes.  make test: lint and tests.
# PYTHON=... names the interpreter, VENV=... the folder of the environment.
SHELL := bash
export VENV ?= .venv
bin := $(VENV)/bin

# glibc maps and unmaps every large temporary otherwise, which takes half of the time of a forward
# on a CPU (1 GiB and 64 MiB, in bytes).
export MALLOC_MMAP_MAX_ ?= 0
export MALLOC_TRIM_THRESHOLD_ ?= 1073741824
export MALLOC_TOP_PAD_ ?= 67108864

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
	$(bin)/mypy

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .pytest_cache .ruff_cache
	find . -name __pycache__ -prune -exec rm -rf {} +
