# Two commands for a machine with Python, pip, git and make: `make demo` and `make test`.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# torch first and by its exact pin: a range would bring the newest build with its CUDA packages.
TORCH := $(shell grep '^torch==' constraints.txt)
# The peers of tests/parity, beside the environment: their wheels bring top-level packages `tests` and `scripts`.
# OpenRLHF's wheel says CPython 3.11 on Linux and holds Python only.
ANY_PYTHON := --only-binary=:all: --python-version 3.11 --implementation cp --abi cp311 --platform manylinux1_x86_64

.PHONY: demo compare test docs lint format bench clean

demo: $(VENV)/.installed
	$(BIN)/python examples/trl_grpo.py

compare: $(VENV)/.installed
	$(BIN)/python examples/trl_grpo.py --loss both --out docs/demo

test: $(VENV)/.installed
	$(BIN)/python -m pytest -q -n 2
	$(BIN)/python examples/trl_grpo.py --steps 400 --quiet
	$(BIN)/python examples/hand_written_loop.py
	$(BIN)/python examples/hf_trainer.py
	$(BIN)/python examples/verl_policy_loss.py
	$(BIN)/python examples/openrlhf_policy_loss.py
	$(BIN)/python examples/ppo_with_critic.py

docs: $(VENV)/.installed
	$(BIN)/python docs/generate.py

lint: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.installed
	$(BIN)/python -m bench --suite all --plot

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q $(TORCH)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[trl,parity,dev]'
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt liger-kernel cut-cross-entropy spmd_types
	$(BIN)/python -m pip install -q --no-deps -c constraints.txt $(ANY_PYTHON) --target $(VENV)/peers verl openrlhf
	$(BIN)/python -m pip install -q --no-deps --ignore-requires-python -c constraints.txt --only-binary=:all: \
		--target $(VENV)/peers skyrl areal torchtitan
	touch $@

clean:
	rm -rf $(VENV) dist examples/out
