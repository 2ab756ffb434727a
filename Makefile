# The two commands of the README are `make demo` and `make test`; the others are for work on mgpu itself.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# One test process more than cores, because many tests wait for their servers. A file's tests stay together, so that they
# share its servers and models, and files start in their order: the end-to-end tests, which take longest, come first.
PARALLEL ?= -n $(shell expr $$(nproc) + 1) --dist loadfile --no-loadscope-reorder
PIP := $(BIN)/python -m pip --disable-pip-version-check --quiet

# Tests of GPUs spend their time compiling kernels, each process its own; all share the GPU's memory.
PARALLEL_GPU ?= -n 4 --dist worksteal

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu check format bench-cpu chaos attack fuzz mutation clean

help: ## Show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:[^#]*##/\t/' | expand -t 14

demo: $(VENV)/installed ## Serve the built-in model, stream one answer, stop everything
	@$(BIN)/mgpu-launch demo

test: $(VENV)/installed-dev ## Run the whole test suite on all cores, end-to-end tests on the real model included
	@$(BIN)/python -m pytest $(PARALLEL)

test-gpu: $(VENV)/installed-dev ## Run the tests that need a CUDA device
	@$(BIN)/python -m pytest -m "gpu or multigpu" $(PARALLEL_GPU)

check: $(VENV)/installed-dev ## Format, lint, types, tests
	@$(BIN)/ruff format --check .
	@$(BIN)/ruff check .
	@$(BIN)/mypy
	@$(BIN)/python -m pytest $(PARALLEL)

format: $(VENV)/installed-dev ## Rewrite the sources in the project's format
	@$(BIN)/ruff format .
	@$(BIN)/ruff check --fix .

bench-cpu: $(VENV)/installed-dev ## Compare decode speed on the CPU with Hugging Face transformers (BENCH='--rounds 5')
	@$(BIN)/python -m bench.cpu_decode $(BENCH)

chaos: $(VENV)/installed-dev ## Break a real server under load and count what its clients lose (CHAOS=--long: an hour or two)
	@$(BIN)/python -m bench.chaos $(CHAOS)

mutation: $(VENV)/installed-dev ## Change 300 places one at a time and list what no test notices (hours; MUTATION='--places 40')
	@$(PIP) install -c constraints.txt -e '.[mutation]'
	@$(BIN)/python -m bench.mutation $(MUTATION)

attack: $(VENV)/installed-dev ## Attack a real server beside honest streams and count what those lose (ATTACK='--seconds 10')
	@$(BIN)/python -m bench.attack $(ATTACK)

fuzz: $(VENV)/installed-fuzz ## Feed hostile bytes to everything that reads them (MINUTES=10, of CPU time for each reader)
	@$(BIN)/python -m bench.http.document_fuzz --minutes $(or $(MINUTES),1)
	@$(BIN)/python -m bench.fuzz --minutes $(or $(MINUTES),1) $(FUZZ)

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "mgpu needs Python 3.11 or newer; set PYTHON=/path/to/python3.11"; exit 1; }
	@$(PYTHON) -m venv $(VENV)

$(VENV)/installed: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing mgpu into $(VENV) (the first time takes a minute or two)"
	@$(PIP) install -c constraints.txt -e '.[serve]'
	@touch $@

$(VENV)/installed-dev: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing mgpu and its test tools into $(VENV) (the first time takes a minute or two)"
	@$(PIP) install -c constraints.txt -e '.[dev,compat]'
	@touch $@ $(VENV)/installed

$(VENV)/installed-fuzz: $(VENV)/installed-dev
	@$(PIP) install -c constraints.txt -e '.[dev,fuzz]'
	@touch $@

clean: ## Remove the virtual environment and all caches
	rm -rf $(VENV) build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache
