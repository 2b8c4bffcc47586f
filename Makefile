# Every target does the set-up that it needs: python3, pip and make are all that a machine must have.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

# uv does not read pip's find-links, where a machine may keep a CPU build of torch.
export UV_FIND_LINKS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))

.PHONY: help setup demo test test-gpu test-oldest check format mutants fuzz faults soak audit bench notebooks figures results book wheel clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(VENV)/.ok: pyproject.toml constraints.txt
	@echo "Setting up $(VENV) (about a minute)"
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install -q --disable-pip-version-check uv \
	  && $(VENV)/bin/uv pip install -q -p $(VENV) -c constraints.txt -e '.[dev]' \
	  || $(PY) -m pip install --disable-pip-version-check -c constraints.txt -e '.[dev]'
	@touch $@

build/types:
	mkdir -p $@/littlebit
	ln -sfn ../../../reference $@/littlebit/reference
	ln -sfn ../../../fast $@/littlebit/fast

setup: $(VENV)/.ok  ## Make .venv and install the project with its development tools

demo: $(VENV)/.ok  ## Let SmolLM2-135M in 0.55 bits a weight write, then measure it beside others
	@$(PY) -m littlebit.fast demo --out build/demo

# Processes among which the tests are divided; several take a GB of memory each
JOBS ?= 2

test: $(VENV)/.ok  ## Run the tests
	$(PY) -m pytest -n $(JOBS) --dist loadfile

TRANSFORMERS_TESTS := tests/test_quantizer.py tests/test_families.py tests/test_lora.py
# The oldest transformers that pyproject.toml allows, in a folder that Python looks into before the environment
OLDEST := $(shell sed -n 's/.*"transformers>=\([0-9.]*\)[",].*/\1/p' pyproject.toml)

build/oldest/.ok: $(VENV)/.ok
	rm -rf build/oldest
	$(VENV)/bin/uv pip install -q -p $(VENV) --target build/oldest 'transformers==$(OLDEST).*' \
	  || $(PY) -m pip install -q --disable-pip-version-check --target build/oldest 'transformers==$(OLDEST).*'
	@touch $@

CORE_TESTS := tests/test_packing.py tests/test_bits.py tests/test_linear.py

build/oldest-core/.ok: $(VENV)/.ok pyproject.toml constraints.txt constraints-oldest.txt
	$(PYTHON) -m venv --clear build/oldest-core
	$(VENV)/bin/uv pip install -q -p build/oldest-core -c constraints.txt -c constraints-oldest.txt -e . pytest hypothesis \
	  || build/oldest-core/bin/python -m pip install -q --disable-pip-version-check -c constraints.txt \
	     -c constraints-oldest.txt -e . pytest hypothesis
	@touch $@

test-oldest: build/oldest/.ok build/oldest-core/.ok  ## Run tests with the oldest dependencies that are allowed
	HYPOTHESIS_PROFILE=quick build/oldest-core/bin/python -m pytest $(CORE_TESTS)
	PYTHONPATH=build/oldest $(PY) -c 'import transformers as t; assert t.__version__.startswith("$(OLDEST)."), t'
	PYTHONPATH=build/oldest $(PY) -m pytest -n $(JOBS) --dist loadfile $(TRANSFORMERS_TESTS)

test-gpu: $(VENV)/.ok  ## Run the CUDA kernels' tests on a GPU, and each kernel under compute-sanitizer
	$(PY) -m pytest tests/test_gpu.py tests/test_gpu_decode.py
	compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 $(PY) tests/gpu_pass.py
	compute-sanitizer --tool racecheck --kernel-name kns=littlebit --error-exitcode 1 $(PY) tests/gpu_pass.py

check: $(VENV)/.ok build/types  ## Lint, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)

format: $(VENV)/.ok  ## Format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

mutants: $(VENV)/.ok  ## Apply small mistakes to the code and count those that the tests notice
	$(PY) tests/mutants.py

# Seconds that fuzz, faults and soak may take; SAVE=1 writes what they count to book/results/reliability.json
BUDGET ?= 60
TRIED := --budget $(BUDGET) $(if $(SAVE),--save)

build/atheris/.ok: $(VENV)/.ok constraints.txt
	rm -rf build/atheris
	$(VENV)/bin/uv pip install -q -p $(VENV) -c constraints.txt --no-deps --target build/atheris atheris \
	  || $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps --target build/atheris atheris
	@touch $@

fuzz: build/atheris/.ok  ## Read checkpoints that nobody wrote for BUDGET seconds: refused, or loaded identically
	PYTHONPATH=build/atheris $(PY) tests/fuzz.py $(TRIED)

faults: $(VENV)/.ok  ## Kill, starve and interrupt commands for about BUDGET seconds: output whole or absent
	$(PY) tests/faults.py $(TRIED)

soak: $(VENV)/.ok  ## Generate text and compute random layers for BUDGET seconds: memory flat, results the same
	$(PY) tests/soak.py $(TRIED) $(if $(SHAPES),--shapes $(SHAPES))

audit: $(VENV)/.ok  ## Compare what is installed with the known vulnerabilities (asks the package index)
	$(VENV)/bin/uv tool run --from pip-audit pip-audit --path $(VENV)/lib/python*/site-packages

bench: $(VENV)/.ok  ## Time the packed linear layer beside torch's
	$(PY) -m littlebit.fast bench linear

figures: $(VENV)/.ok  ## Draw the book's figures and write its tables from book/results, and the README's
	$(PY) book/figures/make.py

results: $(VENV)/.ok  ## Measure again what a CPU can of book/results (half an hour on a machine that does nothing else)
	$(PY) book/remake.py

# The trained model, and so the one that it was made from, is fetched before two notebooks ask for it at once.
notebooks: $(VENV)/.ok  ## Execute the notebooks, and keep their outputs for the book
	$(PY) -m littlebit.fast fetch smollm2-0.55bit
	$(PY) notebooks/run.py

book: $(VENV)/.ok  ## Build the book: build/book/index.html
	$(PY) -m sphinx -q -W --keep-going -j 2 -d build/book-cache book build/book

wheel: $(VENV)/.ok  ## Build dist/*.whl
	$(PY) -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w dist .

clean:  ## Remove everything that the other targets made
	rm -rf $(VENV) build dist *.egg-info
