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
DEMO_PROMPT ?= a red fox runs through fresh snow at sunrise
# Where `make gpu` leaves its results.
RESULTS := $(if $(OUT),$(OUT),build/gpu)

.PHONY: help setup demo test lint slow gpu clean

help:
	@sed -n 's/^# make/make/p' Makefile; echo "also: setup lint slow gpu clean"

setup:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; none of $(CANDIDATES) is. Install one," \
		"or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) tools/setup_env.py $(VENV) $(EXTRAS)

demo: setup
	@mkdir -p demo
	@$(BIN)/python -m export build --gpu cpu --preset tiny --name $(notdir $(DEMO_BUNDLE)) --out $(dir $(DEMO_BUNDLE))
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

# On a machine with a GPU: its own python3 (PyTorch, Triton, pytest), no virtual environment and no network. Compiles
# the kernels for that GPU first. Every benchmark runs even where a test fails; the exit code tells whether anything did.
gpu:
	@mkdir -p $(RESULTS)
	@command -v nvidia-smi >/dev/null || { echo "error: make gpu needs an NVIDIA GPU and its driver" >&2; exit 2; }
	@status=0; \
	arch=$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .); \
	python3 -m plugins build --arch sm_$$arch || status=1; \
	tests=$$(grep -rlE 'mark\.gpu' tests --include='test_*.py'); \
	if [ -n "$$tests" ]; then python3 -m pytest -m gpu -p no:cacheprovider $$tests $(PYTEST_ARGS) || status=1; fi; \
	for benchmark in $$(grep -l __main__ benchmarks/*.py); do \
		echo "== $$benchmark"; \
		python3 -m benchmarks.$$(basename $$benchmark .py) --out $(RESULTS) || status=1; \
	done; \
	exit $$status

clean:
	rm -rf build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +
