# Every target does the set-up that it needs: python3, pip and make are all that a machine must have.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

# uv does not read pip's find-links, where a machine may keep a CPU build of torch.
export UV_FIND_LINKS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))

.PHONY: help setup demo test test-gpu test-oldest test-newest lock check format mutants fuzz faults soak audit bench notebooks figures results book wheel clean

help:  ## Show the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# $(call environment,FOLDER,CONSTRAINTS): a virtual environment with the project and its development tools, made by uv
# in seconds, or by pip in minutes where uv is not to be had. setuptools comes first: it builds the project from the
# lock, not from whatever is newest.
define environment
	@echo "Setting up $(1) (about a minute)"
	@$(PYTHON) -m venv --clear $(1)
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check -c $(2) setuptools uv \
	  && $(1)/bin/uv pip install -q -p $(1) -c $(2) --no-build-isolation-package littlebit -e '.[dev]' \
	  || $(1)/bin/python -m pip install -q --disable-pip-version-check -c $(2) -e '.[dev]'
endef

$(VENV)/.ok: pyproject.toml constraints.txt
	$(call environment,$(VENV),constraints.txt)
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

build/oldest/.ok: pyproject.toml constraints-oldest.txt
	$(call environment,build/oldest,constraints-oldest.txt)
	@touch $@

test-oldest: build/oldest/.ok  ## Run the tests with the oldest dependencies that pyproject.toml allows, but for torch
	HYPOTHESIS_PROFILE=quick build/oldest/bin/python -m pytest -n $(JOBS) --dist loadfile

test-newest:  ## Run the tests with the newest dependencies that pyproject.toml allows, but for torch: what does a release break?
	@mkdir -p build
	@echo '$(TORCH)' > build/torch.txt
	$(call environment,build/newest,build/torch.txt)
	build/newest/bin/python -m pytest -n $(JOBS) --dist loadfile

# The torch of both locks. A newer one costs gigabytes of CUDA where no CPU build is at hand.
TORCH ?= torch==2.13.0
COMPILE = env -u UV_FIND_LINKS build/lock/bin/uv pip compile -q --universal --python-version 3.11 --upgrade \
  --custom-compile-command 'make lock' -c build/torch.txt pyproject.toml

lock:  ## Renew constraints.txt (newest versions) and constraints-oldest.txt (oldest), for every supported Python
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install -qq --disable-pip-version-check uv
	@echo '$(TORCH)' > build/torch.txt
	$(COMPILE) --all-extras -o constraints.txt
	$(COMPILE) --extra dev --resolution lowest-direct -o constraints-oldest.txt

test-gpu: $(VENV)/.ok  ## Run the CUDA kernels' tests on a GPU, and each kernel under compute-sanitizer
	$(PY) -m pytest tests/gpu/test_gpu.py tests/gpu/test_gpu_decode.py
	compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 $(PY) tests/gpu/gpu_pass.py
	compute-sanitizer --tool racecheck --kernel-name kns=littlebit --error-exitcode 1 $(PY) tests/gpu/gpu_pass.py

check: $(VENV)/.ok build/types  ## Lint, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)

format: $(VENV)/.ok  ## Format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

mutants: $(VENV)/.ok  ## Apply small mistakes to the code and count those that the tests notice
	$(PY) tests/stress/mutants.py

# Seconds that fuzz, faults and soak may take; SAVE=1 writes what they count to book/results/reliability.json
BUDGET ?= 60
TRIED := --budget $(BUDGET) $(if $(SAVE),--save)

build/atheris/.ok: $(VENV)/.ok constraints.txt
	rm -rf build/atheris
	$(VENV)/bin/uv pip install -q -p $(VENV) -c constraints.txt --no-deps --target build/atheris atheris \
	  || $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps --target build/atheris atheris
	@touch $@

fuzz: build/atheris/.ok  ## Read checkpoints that nobody wrote for BUDGET seconds: refused, or loaded identically
	PYTHONPATH=build/atheris $(PY) tests/stress/fuzz.py $(TRIED)

faults: $(VENV)/.ok  ## Kill, starve and interrupt commands for about BUDGET seconds: output whole or absent
	$(PY) tests/stress/faults.py $(TRIED)

soak: $(VENV)/.ok  ## Generate text and compute random layers for BUDGET seconds: memory flat, results the same
	$(PY) tests/stress/soak.py $(TRIED) $(if $(SHAPES),--shapes $(SHAPES))

audit: $(VENV)/.ok  ## Compare what is installed with the known vulnerabilities (asks the package index)
	$(VENV)/bin/uv tool run --from pip-audit pip-audit --path $(VENV)/lib/python*/site-packages

bench: $(VENV)/.ok  ## Time the packed linear layer beside torch's
	$(PY) -m littlebit.fast bench linear

figures: $(VENV)/.ok  ## Draw the book's figures and write its tables from book/results, and the README's
	$(PY) book/figures/make.py

results: $(VENV)/.ok  ## Measure again what a CPU can of book/results (half an hour on a machine that does nothing else)
	$(PY) book/experiments/remake.py

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
