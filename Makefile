# make demo   a 5-second clip from a text prompt, on any machine
# make test   linters, type checker and the test suite
# Both set up .venv themselves. Needed: Python >= 3.11 with venv, make, a C compiler.

VENV := .venv
BIN := $(VENV)/bin
EXTRAS := cpu,text,video,export,quantize,kernels,plugin,tensorrt-rtx,gpu,train,test,dev

# The first interpreter that is new enough; override with PYTHON=...
CANDIDATES := python3 python3.13 python3.12 python3.11
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)

DEMO_BUNDLE := engines/built/demo
DEMO_PROMPT ?= a yellow square on black moves right from the top left
# Where `make gpu` leaves its results.
RESULTS := $(if $(OUT),$(OUT),build/gpu)

SITE := build/site

.PHONY: help setup demo test lint slow wheels clean
.PHONY: gpu gpu-site gpu-tests gpu-attention gpu-rollout-build gpu-rollout gpu-quality

help:
	@sed -n 's/^# make/make/p' Makefile; echo "also: setup lint slow wheels gpu clean"

setup:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; none of $(CANDIDATES) is. Install one," \
		"or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) tools/setup_env.py $(VENV) $(EXTRAS)

demo: setup
	@mkdir -p demo
	@$(BIN)/python -m export build --gpu cpu --preset tiny --variant dense --name $(notdir $(DEMO_BUNDLE)) --out $(dir $(DEMO_BUNDLE))
	@$(BIN)/python -m runtime generate $(DEMO_BUNDLE) --prompt "$(DEMO_PROMPT)" --seconds 5 \
		--out demo/clip.mp4 --contact-sheet demo/contact_sheet.png

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy

test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

# Full-size checks: minutes, and up to 12 GiB of memory.
slow: setup
	@$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# What `make gpu` needs beyond PyTorch and Triton, as wheels, to be carried to a GPU machine without network.
wheels:
	@python3 tools/gpu_wheels.py

# On a machine with a GPU: its own python3 (PyTorch, Triton, pytest), no virtual environment and no network; `build/wheels`
# is used if it is there. Every part runs even where another fails; the exit code tells whether anything did.
gpu:
	@status=0; for part in gpu-tests gpu-attention gpu-rollout-build gpu-rollout gpu-quality; do \
		echo "== $$part"; $(MAKE) --no-print-directory $$part || status=1; done; exit $$status

GPU_ENV = PYTHONUNBUFFERED=1 PYTHONPATH=$(CURDIR)/$(SITE)$(if $(PYTHONPATH),:$(PYTHONPATH))

gpu-site:
	@command -v nvidia-smi >/dev/null || { echo "error: make gpu needs an NVIDIA GPU and its driver" >&2; exit 2; }
	@mkdir -p $(RESULTS)
	@if ls build/wheels/*.whl >/dev/null 2>&1; then python3 -m pip install -q --no-index --no-deps --no-compile \
		--upgrade --target $(SITE) build/wheels/*.whl; fi
	@arch=$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .); \
		$(GPU_ENV) python3 -m plugins build --arch sm_$$arch

gpu-tests: gpu-site
	@$(GPU_ENV) python3 -m pytest -m gpu -q -rs -p no:cacheprovider --durations=8 tests/gpu $(PYTEST_ARGS)

gpu-attention: gpu-site
	@$(GPU_ENV) python3 -m benchmarks.attention --flex one --out $(RESULTS)

gpu-rollout-build: gpu-site
	@$(GPU_ENV) python3 -m benchmarks.rollout --build-only --frames 81 --resolution 512x768 --budget-seconds 540

gpu-rollout: gpu-site
	@$(GPU_ENV) python3 -m benchmarks.rollout --frames 81 --resolution 512x768 --budget-seconds 400 --out $(RESULTS)

gpu-quality: gpu-site
	@$(GPU_ENV) python3 -m benchmarks.quality --out $(RESULTS)

clean:
	rm -rf build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
