# make test | lint | demo. Everything runs in .venv, made once from $(PYTHON).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TYPING := build/typing

.PHONY: demo test lint env clean

demo: env
	OMP_NUM_THREADS=1 $(BIN)/torchrun --standalone --nproc-per-node 2 -m xdit_ir.tools.demo

# One thread each: two processes of two threads on two cores take 1.7 times as long.
test: env
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist worksteal

# The packages are mapped by setup.cfg (xdit_ir.passes lives in passes/), which mypy cannot know.
# So it is shown the tree as it is installed, made of links and made anew each time.
lint: env
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf $(TYPING)
	mkdir -p $(TYPING)/xdit_ir
	ln -s $(foreach path,$(wildcard xdit_ir/*) passes models tools,$(abspath $(path))) $(TYPING)/xdit_ir/
	$(BIN)/mypy -p xdit_ir

env: $(VENV)/.stamp

# torch first: pip then finds the wheel that fits the machine before anything else asks for one.
$(VENV)/.stamp: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet torch==2.13.0
	$(BIN)/python -m pip install --quiet -e '.[test,viz]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache .hypothesis
