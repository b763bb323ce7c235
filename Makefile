# Everything a newcomer runs: `make demo` and `make test`. The rest is what CI runs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# On a machine with an NVIDIA driver the default wheel of torch brings CUDA. Elsewhere a version is pinned that has a
# CPU wheel, and installed first, so that nothing pulls gigabytes of CUDA libraries; TORCH_INDEX says where to find it
# when pip's own index has another one (see .ci/torch_wheel.py). TORCH may be any requirement, also a wheel's path.
HAS_DRIVER := $(shell command -v nvidia-smi 2>/dev/null)
TORCH := $(if $(HAS_DRIVER),torch>=2.11,torch==2.13.0)
TORCH_INDEX :=
TORCH_OPTIONS := $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX))

.PHONY: demo test lint types contracts check proto clean

$(BIN)/.installed: pyproject.toml setup.py
	$(PYTHON) -m venv $(VENV)
	@echo "installing into $(VENV)/, which takes some minutes (log: $(VENV)/install.log)"
	@$(BIN)/pip install --upgrade pip setuptools wheel > $(VENV)/install.log 2>&1 || { cat $(VENV)/install.log; exit 1; }
	@$(if $(HAS_DRIVER),true,$(BIN)/pip install --quiet --dry-run --no-deps --report - $(TORCH_OPTIONS) "$(TORCH)" \
	  2>> $(VENV)/install.log | $(BIN)/python .ci/torch_wheel.py)
	@{ $(BIN)/pip install $(TORCH_OPTIONS) "$(TORCH)" \
	  && $(BIN)/pip install --no-build-isolation --editable ".[dev]"; \
	} >> $(VENV)/install.log 2>&1 || { cat $(VENV)/install.log; exit 1; }
	@touch $@

demo: $(BIN)/.installed
	$(BIN)/python examples/demo.py

test: $(BIN)/.installed
	$(BIN)/pytest

lint: $(BIN)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs -r $(BIN)/clang-format --dry-run --Werror

types: $(BIN)/.installed
	mkdir -p build/mypy && ln -sfn ../.. build/mypy/fuseline
	cd build/mypy && $(CURDIR)/$(BIN)/mypy --config-file ../../pyproject.toml fuseline

contracts: $(BIN)/.installed
	$(BIN)/lint-imports

check: lint types contracts

proto: $(BIN)/.installed
	$(BIN)/python proto/generate.py

clean:
	rm -rf build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
