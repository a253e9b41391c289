# make demo, make test: the two commands; both make .venv themselves.  Everything else is for working on Penjing.
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
  $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
TORCH ?= torch==2.13.0
# An index that has torch's CPU build, if the default one has not: make test TORCH_INDEX=https://…/whl/cpu
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
NATIVE := CMakeLists.txt $(wildcard native/CMakeLists.txt native/*/*.cpp native/*/*.h native/*/*.inc)
FORMATTED := $(wildcard native/*/*.cpp native/*/*.h native/*/*.inc)

.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint fix bench engines llamacpp quality serve native asan fuzz arm clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sort | awk -F ':.*## ' '{printf "make %-10s %s\n", $$1, $$2}'

demo: $(VENV)/.installed ## compress Novelist, measure what was lost, serve it: the two-minute tour
	$(BIN)/python examples/demo.py

test: $(VENV)/.installed ## the tests that take seconds
	$(BIN)/python -m pytest -m "not slow"

test-all: $(VENV)/.installed ## every test, the slow ones too
	$(BIN)/python -m pytest

lint: $(VENV)/.linters ## ruff, mypy, clang-format: what a change must pass
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/clang-format --dry-run --Werror $(FORMATTED)

fix: $(VENV)/.linters ## let ruff and clang-format mend what they can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

bench: $(VENV)/.installed ## start-up times, and the speed of Novelist on this machine
	$(BIN)/python benchmarks/startup.py
	$(BIN)/penjing bench examples/novelist

engines: $(VENV)/.installed ## the engine beside llama.cpp, OpenVINO, vLLM and vllm.cpp; builds them first, then half an hour
	$(BIN)/python benchmarks/engines.py

llamacpp: $(VENV)/.installed ## llama.cpp itself on exported GGUF files (LLAMACPP: a Python that has llama-cpp-python)
	PENJING_LLAMACPP=$(LLAMACPP) $(BIN)/python -m pytest tests/export -q

quality: $(VENV)/.installed ## what compressing loses, beside other tools: make quality CALIBRATION=novel.txt; takes hours
	$(BIN)/python benchmarks/quality.py --calibration $(CALIBRATION)

serve: $(VENV)/.installed ## serve Novelist at http://127.0.0.1:8000
	$(BIN)/penjing serve examples/novelist

native: ## build the native library in place, for work in the source tree (PYTHON needs nanobind)
	cmake -S . -B build/dev -G Ninja -DPython_EXECUTABLE=$$($(PYTHON) -c 'import sys; print(sys.executable)') >/dev/null
	cmake --build build/dev
	for so in build/dev/native/_native.*.so; do \
	  cp $$so src/penjing/.new && mv src/penjing/.new src/penjing/$${so##*/}; done # written over, it would kill who runs it

# The library is checked from within an ordinary Python, so its run-time parts are loaded first; what Python itself
# leaks is not our matter.
asan: ## the kernel, format and decoder tests under AddressSanitizer and UndefinedBehaviorSanitizer (PYTHON needs the test packages)
	cmake -S . -B build/asan -G Ninja -DPENJING_SANITIZE=ON -DCMAKE_BUILD_TYPE=Debug \
	  -DPython_EXECUTABLE=$$($(PYTHON) -c 'import sys; print(sys.executable)') >/dev/null
	cmake --build build/asan
	mkdir -p build/asan/site && cp -r src/penjing build/asan/site/
	cp build/asan/native/_native.*.so build/asan/site/penjing/
	LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
	  ASAN_OPTIONS=detect_leaks=0 PYTHONPATH=build/asan/site \
	  $(PYTHON) -m pytest tests/kernels tests/formats tests/models/test_step.py tests/models/test_greedy.py -q -p no:cacheprovider --capture=sys -k "not compressed_tensors and not torch"

fuzz: $(VENV)/.installed ## damage small models for a minute; whatever is neither refused in one line nor computed is a bug
	$(BIN)/python -W ignore tests/fuzz_loader.py --seconds 60 --seed "$$(date +%s)"

arm: $(VENV)/.installed ## the kernel tests on 64-bit Arm, under an emulator (tests/arm/run.sh says what it needs)
	PYTHON=$(BIN)/python tests/arm/run.sh

clean: ## remove what make made
	rm -rf $(VENV) build dist out src/penjing/_native.*.so

# torch comes first and alone, so that its CPU build is there before anything else can ask for another one; from then
# on the constraint keeps it.
$(VENV)/.torch:
	@test -n "$(PYTHON)" || { echo "make: Penjing needs Python 3.11 or newer; give it as PYTHON=…" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PIP) --upgrade 'pip>=25.1'
	$(PIP) '$(TORCH)' $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))
	$(BIN)/python -m pip freeze | grep '^torch==' > $(VENV)/constraints.txt
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml $(NATIVE)
	$(PIP) -c $(VENV)/constraints.txt --group test -e '.[compress,onnx,demo]'
	@touch $@

$(VENV)/.linters: $(VENV)/.installed
	$(PIP) --group lint
	@touch $@
