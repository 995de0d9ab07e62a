# Every target makes and fills .venv by itself, and again when pyproject.toml or constraints.txt change.
# All paths are relative, so that a folder with spaces in its name works too.

PYTHON ?= python3
ARGS ?=
PROCESSES ?= 2

PY := .venv/bin/python
INSTALLED := .venv/.installed
UNFINISHED := .venv/.unfinished

.DEFAULT_GOAL := help
.PHONY: help demo test numeric slow soak load hosts check docs clean

help: ## list these targets
	@sed -n 's/^\([a-z]*\):.*## \(.*\)/  make \1	\2/p' Makefile

demo: $(INSTALLED) ## tokenize real photographs with the packaged weights, into ./demo
	@echo "demo: alit demo"
	@$(PY) .venv/bin/alit demo

test: $(INSTALLED) ## run the tests, in two processes; ARGS="-k name" passes options on to pytest
	@echo "test: pytest -n $(PROCESSES) $(ARGS)"
	@$(PY) -m pytest -n $(PROCESSES) --no-loadscope-reorder $(ARGS)

numeric: $(INSTALLED) ## run the numeric tests with the kernels of other machines: AVX2, one thread
	@echo "numeric: pytest -n $(PROCESSES) -m numeric tests/alit $(ARGS)"
	@ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OMP_NUM_THREADS=1 $(PY) -m pytest -n $(PROCESSES) --no-loadscope-reorder -m numeric tests/alit $(ARGS)

slow: $(INSTALLED) ## run the tests that take minutes: training that learns, a cluster whose nodes come and go
	@echo "slow: pytest -m slow $(ARGS)"
	@$(PY) -m pytest -m slow $(ARGS)

soak: $(INSTALLED) ## kill a job again and again and compare its files: make soak INPUT=photos/
	@echo "soak: tests/tools/soak.py $(INPUT) soak"
	@PYTHONPATH=tests/support $(PY) tests/tools/soak.py "$(INPUT)" soak

load: $(INSTALLED) ## put the service under load and measure: make load INPUT=photos.parquet
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[load]"
	@echo "load: tests/tools/load.py $(INPUT)"
	@PYTHONPATH=tests/support $(PY) tests/tools/load.py "$(INPUT)"

hosts: $(INSTALLED) ## train, tokenize and serve on hosts in network namespaces: make hosts INPUT=photos.parquet
	@echo "hosts: tests/tools/hosts.py $(INPUT)"
	@PYTHONPATH=tests/support $(PY) tests/tools/hosts.py "$(INPUT)"

check: $(INSTALLED) ## lint, formatting, types, imports between packages, spelling and YAML
	@echo "check: ruff check"
	@$(PY) -m ruff check .
	@echo "check: ruff format --check"
	@$(PY) -m ruff format --check .
	@echo "check: pyright"
	@PYRIGHT_PYTHON_IGNORE_WARNINGS=1 $(PY) -m pyright
	@echo "check: lint-imports"
	@$(PY) .venv/bin/lint-imports
	@echo "check: codespell"
	@$(PY) .venv/bin/codespell
	@echo "check: yamllint"
	@$(PY) -m yamllint --strict .

docs: $(INSTALLED) ## build the documentation into ./site and check its links
	@echo "docs: mkdocs build --strict"
	@NO_MKDOCS_2_WARNING=1 $(PY) -m mkdocs build --strict

clean: ## remove what the other targets made, except .venv
	@echo "clean: build products, caches, ./demo, ./site"
	@rm -rf build dist ./*.egg-info .pytest_cache .ruff_cache .hypothesis .import_linter_cache demo site
	@find alit jobs serve tests -name __pycache__ -prune -exec rm -rf {} +

# The stamp holds the folder it was made in: an editable install that was copied or moved would test the old folder.
ifneq "$(shell cat $(INSTALLED) 2>/dev/null)" "$(CURDIR)"
.PHONY: $(INSTALLED)
endif

# A first installation that was interrupted starts over; a later one is repaired in place.
$(INSTALLED): pyproject.toml constraints.txt
	@if [ -e $(UNFINISHED) ] || ! $(PY) -m pip --version >/dev/null 2>&1; then \
	    "$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11) and "alit needs Python 3.11 or newer, and $(PYTHON) is " + sys.version.split()[0] + "; name another one: make PYTHON=python3.11")' && \
	    echo "venv: making .venv with $(PYTHON)" && \
	    "$(PYTHON)" -m venv --clear .venv && \
	    touch $(UNFINISHED); \
	fi
	@echo "venv: installing the pinned dependencies (minutes, the first time)"
	@$(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev,demo]"
	@rm -f $(UNFINISHED)
	@printf '%s' "$(CURDIR)" >$@
