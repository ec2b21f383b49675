PYTHON ?= python3
# The torch that the recorded results were measured with. Installed first and by number, because the package's own
# range lets pip pass over a CPU build at hand for the newest release and its gigabytes of CUDA.
TORCH ?= 2.13.0
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test study notebooks lint types docs hub-kernel clean
.NOTPARALLEL:

demo: $(VENV)/.installed-cli
	$(BIN)/raas-cache demo

# One thread a worker: the tests' models are too small to share among cores.
test: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto

# The rows already there are not run again. For a look at it: make study ARGS=--quick
study: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/torchrun --nproc-per-node 2 examples/study.py $(ARGS)

lint: $(VENV)/.installed-dev
	$(BIN)/ruff check
	$(BIN)/ruff format --check

# Each notebook runs from top to bottom, in this environment.
notebooks: $(VENV)/.installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --nbmake --nbmake-timeout 600 examples

types: $(VENV)/.installed-dev
	$(BIN)/mypy

# A link or an anchor that leads nowhere is an error. To write with a look at it: $(BIN)/mkdocs serve
docs: $(VENV)/.installed-dev
	$(BIN)/mkdocs build --strict

# The kernels as the Hugging Face Hub keeps one; needs no package but Python.
hub-kernel:
	$(PYTHON) kernels/build_hub.py build/hub

clean:
	rm -rf $(VENV) build dist site src/*.egg-info *.egg-info .mypy_cache .pytest_cache .ruff_cache

# The stem is the extra to install.
$(VENV)/.installed-%: pyproject.toml setup.cfg
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==$(TORCH)
	$(BIN)/python -m pip install --quiet --editable ".[$*]"
	touch $@
