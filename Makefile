# make demo | test: what a user runs. Each makes .venv and installs what is needed first.
#
# Any Python >= 3.11 will do; name one with `make setup PYTHON=/path/to/python3.12`.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-fast gpu-check lint clean

help:
	@echo "make setup      create $(VENV) and install the project into it (demo and test do so too)"
	@echo "make demo       train a small model on real text, export it, generate; minutes on two cores"
	@echo "make test       run the tests"
	@echo "make test-fast  run part of every folder's tests; within 3 minutes on two cores"
	@echo "make gpu-check  on a GPU host: the tests of kernels compiled, and the demo under many layouts"
	@echo "make lint       check format, lint and types"
	@echo "make clean      remove $(VENV), caches and build folders; data/ and runs/ stay"

setup:
	@if $(MAKE) --silent --question $(VENV)/.installed 2>/dev/null; then \
		echo "setup: $(VENV) is up to date with pyproject.toml, nothing to do"; \
	else \
		$(MAKE) --no-print-directory $(VENV)/.installed; \
	fi

# pip alone decides which packages fit; on x86 Linux it brings the CUDA build of torch, which runs
# on hosts without a GPU too and brings Triton.
$(VENV)/.installed: pyproject.toml
	@set -e; \
	fits() { "$$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1; }; \
	python=; \
	for name in "$(PYTHON)" $(if $(filter file,$(origin PYTHON)),python3.13 python3.12 python3.11); do \
		if fits "$$name"; then python=$$name; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "setup: Python 3.11 or newer is wanted; $(PYTHON) gives: $$("$(PYTHON)" -V 2>&1 || true)" >&2; \
		echo "setup: install one, or name it: make setup PYTHON=/path/to/python3.12" >&2; \
		exit 1; \
	fi; \
	if ! fits $(BIN)/python || ! $(BIN)/python -m pip --version >/dev/null 2>&1; then \
		echo "setup: creating $(VENV) with $$("$$python" -V) ($$(command -v "$$python"))"; \
		rm -rf $(VENV); \
		if ! "$$python" -m venv $(VENV); then \
			rm -rf $(VENV); \
			echo "setup: $$python cannot make a virtual environment." >&2; \
			echo "setup: on Debian and Ubuntu its venv module is a package of its own:" >&2; \
			echo "setup:     apt-get update && apt-get install python3-venv" >&2; \
			exit 1; \
		fi; \
	fi; \
	echo "setup: installing transxssm and what it needs into $(VENV) (a new one: about 7 GB, some minutes)"; \
	$(BIN)/python -m pip install -e '.[dev]'; \
	touch $@; \
	echo "setup: done; try $(BIN)/transxssm doctor"

demo: setup
	@$(BIN)/python -m benchmarks.demo

test: setup
	@$(BIN)/python -m pytest -n 2
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 tests/interpreted

test-fast: setup
	@$(BIN)/python -m pytest -n 2 $$(grep -v /interpreted/ tests/fast.txt)
	@TRITON_INTERPRET=1 $(BIN)/python -m pytest $$(grep /interpreted/ tests/fast.txt)

gpu-check: setup
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		TRANSXSSM_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/kernels && \
		TRANSXSSM_TEST_DEVICE=cuda $(BIN)/python -m pytest tests/interpreted; \
	fi && $(BIN)/python -m benchmarks.gpu_check

lint: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

clean:
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
