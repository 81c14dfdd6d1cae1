# `make help` lists the targets. The environment is made on first use, in .venv.
PYTHON ?= python3
# A pair that belongs together; for another build of torch: make TORCH="torch==… torchvision==…".
TORCH ?= torch==2.14.1 torchvision==0.29.1
EXTRAS ?= all
VENV ?= .venv
DEMO_ARGS ?=
TEST_ARGS ?=
COMFY_ARGS ?=
WORKERS ?= 2
BENCH_ARGS ?= linear

BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
NAMESPACES := kernels calibration nodes

.DEFAULT_GOAL := help
.PHONY: help venv demo test comfy-test slow lint types format aot bench wheel clean

help: ## this list
	@grep -hE '^[a-z]+:.*## ' Makefile | sed -E 's/:.*## /\t/' | expand -t 12

venv: $(STAMP) ## the environment, in .venv

# torch first: later installs then keep it.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -qq --disable-pip-version-check $(TORCH)
	$(BIN)/python -m pip install -qq --disable-pip-version-check --editable '.[$(EXTRAS)]'
	touch $@

demo: $(STAMP) ## quantizes the built-in pipeline to 4 bits on the CPU and puts pictures and numbers in build/demo
	$(BIN)/python -m qgen demo --out build/demo $(DEMO_ARGS)

# One thread for each worker: with more threads than cores, OpenMP's waiting threads make small layers many times slower.
test: $(STAMP) ## the tests, but for the slow ones; TEST_ARGS="-k nvfp4 -x" goes to pytest
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "not aot and not slow" $(TEST_ARGS)

slow: $(STAMP) ## the slow tests: kernels in Triton's interpreter, servers, browsers, whole pipelines
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m "slow and not aot" $(TEST_ARGS)

# Fetches ComfyUI (GPL-3, run as a program, no part of this project) and its front end into the user's cache on first use: see tests/comfy_server.py.
comfy-test: $(STAMP) ## the nodes on a real ComfyUI server and in its front end; COMFY_ARGS goes to pytest
	$(BIN)/python tests/comfy_server.py
	OMP_NUM_THREADS=1 QGEN_COMFY_TEST=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -rs tests/nodes tests/io/peers/test_comfy_server.py $(COMFY_ARGS)

lint: $(STAMP) ## ruff and the type checker
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(MAKE) types

# mypy cannot see setuptools' package-dir, so it gets a tree laid out like the wheel.
types: $(STAMP) ## the type checker alone
	rm -rf build/types && mkdir -p build/types && cp -R qgen build/types/qgen
	for folder in $(NAMESPACES); do if [ -d $$folder ]; then cp -R $$folder build/types/qgen/$$folder; fi; done
	cd build/types && "$(abspath $(BIN))/mypy" --config-file "$(abspath pyproject.toml)" --cache-dir "$(abspath .mypy_cache)"

format: $(STAMP) ## ruff's own corrections
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

aot: $(STAMP) ## compiles every kernel for every target and checks instructions, registers and spills; no GPU needed
	$(BIN)/python -m qgen.kernels.aot --jobs 2

bench: $(STAMP) ## kernels: correctness first, then time on this machine; BENCH_ARGS="attention"
	$(BIN)/python -m qgen.kernels.bench $(BENCH_ARGS)

wheel: $(STAMP) ## the wheel and the source archive, in dist/
	$(BIN)/python -m build --outdir dist
	rm -rf build/lib build/bdist.*

clean: ## everything made here but the environment
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -not -path './$(VENV)/*' -prune -exec rm -rf {} +
