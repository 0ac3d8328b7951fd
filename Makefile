# From nothing to a working system: Python 3.11 or newer and make are all that these need. Each Python has its environment.
PYTHON ?= python3
VERSION := $(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
$(if $(VERSION),,$(error $(PYTHON) does not run))
VENV := .venv-$(VERSION)
BIN := $(VENV)/bin

# 1: with torch. Gigabytes from PyPI, it is tested on the oldest supported Python; elsewhere its tests are skipped.
TORCH ?= $(if $(filter 3.11,$(VERSION)),1,0)
DEV := $(VENV)/dev-torch$(TORCH).stamp

# Minutes; `make demo-full` is the same at greater length.
DEMO := runs/demo
STORIES := 6000
CASES := 60
MINUTES := 10

# Says what comes next, and how long the rest of the demo takes: $(2) is its share in percent.
stage = @echo "$(DEMO): $(1); about $$(( ($(MINUTES) * $(2) + 99) / 100 )) min to go on two fast CPU cores, twice that on slow ones"

.PHONY: demo demo-full chat test test-all soak lint clean

# The embedded corpus, a small model pretrained on its stories, the same model fine-tuned, and what each can do. After an
# interruption the same command resumes.
demo: $(DEMO)/sft.done
	$(call stage,evaluating both models,10)
	$(BIN)/python -m tinysft_jax.evaluation.run --checkpoint=$(DEMO)/sft --baseline=$(DEMO)/pretrain \
		--data=$(DEMO)/tasks --output=$(DEMO)/evaluation --overwrite --cases=$(CASES) --show=8

demo-full:
	$(MAKE) demo DEMO=runs/demo-full STORIES=20000 CASES=100 MINUTES=37 \
		PRETRAIN_FLAGS=--config.train.max_steps=2000 SFT_FLAGS=--config.train.max_steps=4500

# Talks to the demo's model.
chat: $(DEMO)/sft.done | $(VENV)/demo.stamp
	@$(BIN)/python sample.py --checkpoint=$(DEMO)/sft --interactive

$(DEMO)/sft.done: $(DEMO)/pretrain.done $(DEMO)/tasks/data.json
	$(call stage,fine-tuning,80)
	$(BIN)/python train.py --config=configs/sft.py:demo --workdir=$(DEMO)/sft \
		--config.init_from=$(DEMO)/pretrain --config.data.path=$(DEMO)/tasks $(SFT_FLAGS)
	@touch $@

$(DEMO)/pretrain.done: $(DEMO)/stories/data.json
	$(call stage,pretraining,98)
	$(BIN)/python train.py --config=configs/pretrain.py:demo --workdir=$(DEMO)/pretrain \
		--config.data.path=$(DEMO)/stories $(PRETRAIN_FLAGS)
	@touch $@

$(DEMO)/stories/data.json: | $(VENV)/demo.stamp
	$(call stage,writing the corpus,100)
	$(BIN)/python -m tinysft_jax.data.prepare --embedded=$(STORIES) --output=$(DEMO)/stories --bpe_ranks=8192 --format=text

$(DEMO)/tasks/data.json: | $(VENV)/demo.stamp
	$(BIN)/python -m tinysft_jax.data.prepare --embedded=$(STORIES) --output=$(DEMO)/tasks --bpe_ranks=8192

# The quick tier and all tests: docs/development.md.
test: $(DEV) lint
	@$(call pytest,)

test-all: $(DEV) lint
	@$(call pytest,-m 'not soak')

pytest = start=$$(date +%s); $(BIN)/python -m pytest -n 2 $(1); code=$$?; echo "tests: $$(( $$(date +%s) - start )) s"; exit $$code

# Kills, damage and a long run: an hour or two on two cores. Prints its figures; docs/reliability.md has the last ones.
soak: $(DEV)
	$(BIN)/python -m pytest -m soak -s

lint: $(DEV)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf .venv-3.* runs/demo runs/demo-full

# What running needs, and what developing needs on top of it: exact versions, so that all run the same.
$(VENV)/demo.stamp: pyproject.toml constraints.txt
	@$(call install,.[eval])

$(DEV): pyproject.toml constraints.txt
	@$(call install,.[dev$(comma)eval$(comma)hf$(comma)gguf$(comma)parquet$(comma)tokamax$(if $(filter 1,$(TORCH)),$(comma)torch)])

comma := ,
define install
start=$$(date +%s); \
test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '$(1)' || exit; \
touch $@; echo "environment: $$(( $$(date +%s) - start )) s"
endef
