# make demo   a 5-second clip from a text prompt, on any machine
# make serve  the same model live: a page in the browser, whose prompt can be changed while it plays
# make test   linters, type checker and the test suite
# All set up .venv themselves. Needed: Python >= 3.11 with venv, make, a C compiler.

VENV := .venv
BIN := $(VENV)/bin
EXTRAS := cpu,text,video,export,sign,quantize,kernels,plugin,tensorrt-rtx,gpu,train,serve,webrtc,ray,test,docs,dev

# LOCKED=1 installs the versions of tools/lock.txt by their hashes, instead of what the index has.
LOCKED ?=

# The first interpreter that is new enough; override with PYTHON=...
CANDIDATES := python3 python3.13 python3.12 python3.11
PYTHON ?= $(shell for p in $(CANDIDATES); do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' >/dev/null 2>&1 && { echo $$p; break; }; done)

DEMO_BUNDLE := engines/built/demo
BUILD_DEMO = $(BIN)/python -m export build --gpu cpu --preset tiny --variant dense --name $(notdir $(DEMO_BUNDLE)) \
	--out $(dir $(DEMO_BUNDLE))
DEMO_PROMPT ?= a yellow square on black moves right from the top left
SERVE_EXAMPLES := --example "a red circle on grey orbits clockwise from the top" \
	--example "a blue circle on grey orbits clockwise from the top" \
	--example "a cyan circle on brown bounces right from the bottom left"
# Where `make gpu` leaves its results.
RESULTS := $(if $(OUT),$(OUT),build/gpu)

# What runs on machines of any system.
PRODUCT := runtime serving export plugins lightforcing_ref engines examples

SITE := build/site

.PHONY: help setup demo serve test lint quick docs slow wheels clean

help:
	@sed -n 's/^# make/make/p' Makefile; echo "also: setup lint quick docs slow wheels gpu test-gpu-versions clean"

setup:
	@test -n "$(PYTHON)" || { echo "error: Python 3.11 or newer is needed; none of $(CANDIDATES) is. Install one," \
		"or name it: make PYTHON=/path/to/python3" >&2; exit 2; }
	@$(PYTHON) tools/setup_env.py $(VENV) $(if $(LOCKED),tools/lock.txt,$(EXTRAS))

# The newest versions that pyproject.toml allows, for every system and Python, with the hashes of all their files. Needs
# uv, and an index that has what PyPI has. pymdown-extensions, of the site, decides the oldest Python.
comma := ,
.PHONY: lock
lock:
	@command -v uv >/dev/null || { echo "error: make lock needs uv" >&2; exit 2; }
	@{ sed -n '/^#/p' tools/lock.txt; uv pip compile pyproject.toml $(patsubst %,--extra %,$(subst $(comma), ,$(EXTRAS))) \
		--universal --python-version 3.11.5 --generate-hashes --no-annotate --no-header --no-emit-index-url \
		--no-emit-find-links --no-emit-package torch -q; } > tools/lock.new && mv tools/lock.new tools/lock.txt || \
		{ rm -f tools/lock.new; exit 1; }


demo: setup
	@mkdir -p demo
	@$(MAKE) --no-print-directory $(DEMO_BUNDLE)/manifest.json
	@$(BIN)/python -m runtime generate $(DEMO_BUNDLE) --prompt "$(DEMO_PROMPT)" --seconds 5 \
		--out demo/clip.mp4 --contact-sheet demo/contact_sheet.png

# Built again where something that it is made by or from is newer.
$(DEMO_BUNDLE)/manifest.json: $(shell find export runtime plugins lightforcing_ref engines/targets engines/variants -type f \
	\( -name '*.py' -o -name '*.toml' -o -name '*.safetensors' \))
	@$(BUILD_DEMO)

serve: setup
	@$(MAKE) --no-print-directory $(DEMO_BUNDLE)/manifest.json
	@$(BIN)/python -m serving run $(DEMO_BUNDLE) --log-level WARNING $(SERVE_EXAMPLES) $(SERVE_ARGS)

lint: setup
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@for platform in win32 darwin; do \
		$(BIN)/mypy --no-error-summary --platform $$platform --cache-dir .mypy_cache/$$platform $(PRODUCT) || exit 1; done

test: lint
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile $(PYTEST_ARGS)

# What the default suite runs of each file: build/coverage.txt. Lines of kernels that are interpreted do not count.
.PHONY: coverage
coverage: setup
	@mkdir -p build
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile --cov --cov-report= $(PYTEST_ARGS); \
		$(BIN)/python -m coverage report > build/coverage.txt; tail -n 1 build/coverage.txt

# The shortest tests, with no model built, for the time between two edits.
quick: setup
	@$(BIN)/ruff check -q . && OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n auto --dist loadfile -m quick $(PYTEST_ARGS)

# The site, into build/docs; needs no network.
docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

# Full-size checks: minutes, and up to 12 GiB of memory.
slow: setup
	@$(BIN)/python -m pytest -m slow $(PYTEST_ARGS)

# Damage at random, for a bounded time: bundles, manifests, checkpoints, terminals, kills, exits. Prints its seed.
FUZZ_SECONDS ?= 300
.PHONY: fuzz
fuzz: setup
	@OMP_NUM_THREADS=1 $(BIN)/python -m tests.fuzz --seconds $(FUZZ_SECONDS) $(FUZZ_ARGS)

# The GPU machine's versions of PyTorch, Triton and numpy in an environment of their own: gigabytes, Python 3.12 or newer
# (tools/gpu_versions.txt); and the tests that depend on them.
GPU_VENV := .venv-gpu
GPU_VERSIONS_PYTHON ?= $(shell for p in python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1 && { echo $$p; break; }; done)
.PHONY: setup-gpu-versions test-gpu-versions

setup-gpu-versions:
	@test -n "$(GPU_VERSIONS_PYTHON)" || { echo "error: the GPU machine's versions need Python 3.12 or newer; install" \
		"one, or name it: make GPU_VERSIONS_PYTHON=/path/to/python3.12" >&2; exit 2; }
	@$(GPU_VERSIONS_PYTHON) tools/setup_env.py $(GPU_VENV) tools/gpu_versions.txt

test-gpu-versions: setup-gpu-versions
	@OMP_NUM_THREADS=1 $(GPU_VENV)/bin/python -m pytest -n auto --dist loadfile tests/lightforcing_ref tests/plugins \
		tests/export tests/runtime tests/benchmarks $(PYTEST_ARGS)

# What `make gpu` needs beyond PyTorch and Triton, as wheels, to be carried to a GPU machine without network.
wheels:
	@python3 tools/gpu_wheels.py

# On a machine with a GPU: its own python3 (PyTorch, Triton, pytest), no virtual environment and no network; `build/wheels`
# is used if it is there. The parts end within ten minutes each and come in the order of their worth (CONTRIBUTING.md);
# every part runs even where another fails, and the exit code tells whether anything did.
GPU_PARTS := gpu-kernels gpu-attention gpu-engines gpu-rollout-build gpu-rollout gpu-rest gpu-sanitizer
.PHONY: gpu gpu-site $(GPU_PARTS)

gpu:
	@status=0; for part in $(GPU_PARTS); do \
		echo "== $$part"; $(MAKE) --no-print-directory $$part || status=1; done; exit $$status

GPU_ENV = PYTHONUNBUFFERED=1 PYTHONPATH=$(CURDIR)/$(SITE)$(if $(PYTHONPATH),:$(PYTHONPATH)) \
	LIGHTFORCING_KERNELS=$(CURDIR)/build/kernels LIGHTFORCING_GPU_BUNDLES=$(CURDIR)/build/gpu-bundles
GPU_PYTEST = $(GPU_ENV) python3 -m pytest -m gpu -q -rs -p no:cacheprovider --durations=8
# Tests that measure the memory of the whole GPU, for which nothing else may run there.
LEAKS := many_chunks or given_back

# Once, not whenever a part starts: another part may be running.
$(SITE)/.installed: $(wildcard build/wheels/*.whl)
	@mkdir -p $(SITE)
	@$(if $^,python3 -m pip install -q --no-index --no-deps --no-compile --upgrade --target $(SITE) $^)
	@touch $@

gpu-site: $(SITE)/.installed
	@command -v nvidia-smi >/dev/null || { echo "error: make gpu needs an NVIDIA GPU and its driver" >&2; exit 2; }
	@mkdir -p build $(RESULTS)
	@$(GPU_ENV) python3 -c 'import torch; torch.zeros(1, device="cuda").add_(1).item()'
	@arch=$$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .); \
		$(GPU_ENV) python3 -m plugins build --arch sm_$$arch

gpu-kernels: gpu-site
	@$(GPU_PYTEST) tests/gpu/test_kernels_gpu.py tests/gpu/test_codes_gpu.py tests/gpu/test_methods_gpu.py \
		-k "not sanitizer" $(PYTEST_ARGS)

gpu-attention: gpu-site
	@$(GPU_ENV) python3 -m benchmarks.attention --flex one --out $(RESULTS)

gpu-engines: gpu-site
	@$(GPU_PYTEST) tests/gpu/test_executor_gpu.py tests/gpu/test_inductor_gpu.py -k "not ($(LEAKS))" $(PYTEST_ARGS)

# One at a time: a build in the background is waited for.
LADDER = mkdir -p build && $(GPU_ENV) flock build/ladder.lock python3 -m benchmarks.rollout --frames 81 --resolution 512x768

gpu-rollout-build: gpu-site
	@$(LADDER) --build-only --budget-seconds 540

gpu-rollout: gpu-site
	@$(LADDER) --budget-seconds 400 --out $(RESULTS)

gpu-rest: gpu-site
	@status=0; $(GPU_PYTEST) tests/gpu/test_executor_gpu.py -k "$(LEAKS)" $(PYTEST_ARGS) || status=1; \
		$(GPU_PYTEST) tests/gpu/test_plugin_gpu.py tests/gpu/test_tensorrt_gpu.py tests/gpu/test_ladder_gpu.py \
		$(PYTEST_ARGS) || status=1; exit $$status

gpu-sanitizer: gpu-site
	@$(GPU_PYTEST) tests/gpu/test_kernels_gpu.py -k sanitizer $(PYTEST_ARGS)

# Everything worth knowing from a GPU that is there for a quarter of an hour (docs/gpu.md): `make lease-archive` here, with
# the python3 of an environment that holds the GPU machine's PyTorch and Triton (GPU_PYTHON); `make lease`, then
# `make lease CALL=second` there.
GPU_PYTHON ?= $(or $(wildcard $(GPU_VENV)/bin/python),python3)
CALL ?= first
LEASE_ARCH := sm_90
LEASE_GPU := h200
LEASE_BUNDLES := inductor-bf16 inductor-fp8
.PHONY: lease lease-archive

lease-archive: wheels
	@$(GPU_PYTHON) -m plugins build --arch $(LEASE_ARCH) --candidates --out build/kernels
	@mkdir -p build/gpu-bundles
	@for name in $(LEASE_BUNDLES); do $(GPU_PYTHON) -m tests.gpu.bundles $$name build/gpu-bundles $(LEASE_GPU) || exit 1; done
	@$(GPU_PYTHON) -m benchmarks.rollout --gpu $(LEASE_GPU) --rungs 6 --frames 81 --resolution 512x768 --packages-only \
		--bundles build/ladder
	@python3 -m benchmarks.lease.archive build/wheels build/kernels build/gpu-bundles build/ladder

lease:
	@python3 -m benchmarks.lease --call $(CALL) --out $(RESULTS)

clean:
	rm -rf build dist demo .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -not -path './$(VENV)/*' -not -path './$(GPU_VENV)/*' -prune -exec rm -rf {} +
