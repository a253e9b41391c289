# make demo, make test: the two commands; both make .venv themselves.  Everything else is for working on Penjing.
PYTHON ?= python3
TORCH ?= torch==2.13.0
# An index that has torch's CPU build, if the default one has not: make test TORCH_INDEX=https://…/whl/cpu
TORCH_INDEX ?=
VENV := .venv
BIN := $(VENV)/bin

.PHONY: native
native: ## build the native library in place, for work in the source tree (PYTHON needs nanobind)
	cmake -S . -B build/dev -G Ninja -DPython_EXECUTABLE=$$($(PYTHON) -c 'import sys; print(sys.executable)') >/dev/null
	cmake --build build/dev
	cp build/dev/native/_native.*.so src/penjing/
