# `make demo` and `make test` set everything up on a machine with Python >= 3.11 and a network to the package registry.
PYTHON ?= python3
# The PyTorch build: a requirement, and the flags that pip needs to find it (see README).
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=
VENV ?= .venv
DEMO ?= runs/demo
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo test format clean

$(READY): pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "$(TORCH)" $(TORCH_FLAGS)
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $(READY)

demo: $(READY)
	$(BIN)/sagerec simulate $(DEMO)/store
	$(BIN)/sagerec run $(DEMO)/store --out $(DEMO)/run --split.reserve event --train.epochs 10 --train.batch-size 32 \
		--baselines popularity item-knn
	$(BIN)/sagerec align $(DEMO)/run --objective sage --reward click=1 --reward like=1 --reward dislike=-1 \
		--criterion clicks=1 --criterion likes=0.5 --batch-users 64 --round-users 256
	$(BIN)/sagerec evaluate $(DEMO)/run --policy policy-sage

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs
