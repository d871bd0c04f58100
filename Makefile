# make train: a fresh machine to a trained model. make test: the suite; make test-slow: what compiles or waits for long.
# Each prepares what it needs.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# One process a GPU, but the tiny batch divides by no more than two; two CPU processes where there is no GPU.
PROCESSES = $$($(BIN)/python -c "from minzero.commands import begin; begin(); import torch; print(min(torch.cuda.device_count() or 2, 2))")
ACCELERATOR = $$($(BIN)/python -c "from minzero.commands import begin; begin(); import torch; print('' if torch.cuda.is_available() else 'DS_ACCELERATOR=cpu')")
NOT_INSTALLED = echo "minZeRO: pip could not install it: see above; is there a network? Then make again continues"; exit 2

.PHONY: setup data train test test-slow clean

setup: $(VENV)/.installed
data: data/stdlib/meta.json

$(VENV)/.installed: requirements.txt
	@command -v $(PYTHON) >/dev/null || { echo "minZeRO: no $(PYTHON): install Python 3.10 to 3.13, or call make PYTHON=..."; exit 2; }
	@$(PYTHON) minzero/preflight.py
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements.txt || { $(NOT_INSTALLED); }
	@touch $@

$(VENV)/.installed-dev: requirements-dev.txt $(VENV)/.installed
	$(BIN)/pip install --quiet --disable-pip-version-check -r requirements-dev.txt || { $(NOT_INSTALLED); }
	@touch $@

data/stdlib/meta.json: $(VENV)/.installed
	@test -e $@ || $(BIN)/python data/stdlib/prepare.py
	@touch $@

train: setup data
	@processes=$(PROCESSES) || exit; echo "deepspeed --num_gpus $$processes train.py configs/tiny.json"; \
	env $(ACCELERATOR) $(BIN)/deepspeed -q --num_gpus $$processes train.py configs/tiny.json
	@echo; $(BIN)/python eval.py out/tiny --gzip
	@echo; echo "A sample:"; $(BIN)/python sample.py out/tiny --prompt "def "
	@echo; echo "The picture of the loss: out/tiny/loss.png"

test: $(VENV)/.installed-dev data
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/vermin --quiet -t=3.10- --no-tips --violations *.py minzero data tests benchmarks
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m "not slow" tests

test-slow: $(VENV)/.installed-dev
	$(BIN)/python -m pytest -q -n 3 --dist loadfile -m slow tests

clean:
	rm -rf $(VENV) out data/stdlib/*.bin data/stdlib/meta.json data/stdlib/tokenizer
