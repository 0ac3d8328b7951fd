# From nothing to a working system: Python 3.11 or newer and make are all that these need.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := runs/demo
STORIES := 8000

.PHONY: demo test soak lint clean

# Make again after an interruption, and it goes on where it was.
# The embedded corpus, a small model pretrained on its stories, the same model taught to answer, and what it answers.
demo: $(DEMO)/sft.done
	$(BIN)/python -m tinysft_jax.evaluation.samples --checkpoint=$(DEMO)/sft --data=$(DEMO)/tasks

$(DEMO)/sft.done: $(DEMO)/pretrain.done $(DEMO)/tasks/data.json
	$(BIN)/python train.py --config=configs/sft.py:demo --workdir=$(DEMO)/sft \
		--config.init_from=$(DEMO)/pretrain --config.data.path=$(DEMO)/tasks
	@touch $@

$(DEMO)/pretrain.done: $(DEMO)/stories/data.json
	$(BIN)/python train.py --config=configs/pretrain.py:demo --workdir=$(DEMO)/pretrain \
		--config.data.path=$(DEMO)/stories
	@touch $@

$(DEMO)/stories/data.json: | $(VENV)/demo.stamp
	$(BIN)/python -m tinysft_jax.data.prepare --embedded=$(STORIES) --output=$(DEMO)/stories --bpe_ranks=4096 --format=text

$(DEMO)/tasks/data.json: | $(VENV)/demo.stamp
	$(BIN)/python -m tinysft_jax.data.prepare --embedded=$(STORIES) --output=$(DEMO)/tasks --bpe_ranks=4096

test: $(VENV)/dev.stamp lint
	@start=$$(date +%s); $(BIN)/python -m pytest; code=$$?; echo "tests: $$(( $$(date +%s) - start )) s"; exit $$code

# Kills, damage and a long run: an hour or two on two cores. Prints its figures; docs/reliability.md has the last ones.
soak: $(VENV)/dev.stamp
	$(BIN)/python -m pytest -m soak -s

lint: $(VENV)/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

clean:
	rm -rf $(VENV) $(DEMO)

# What running needs, and what developing needs on top of it: exact versions, so that all run the same.
$(VENV)/demo.stamp: pyproject.toml constraints.txt
	@$(call install,.)

$(VENV)/dev.stamp: pyproject.toml constraints.txt
	@$(call install,.[dev$(comma)eval$(comma)torch])

comma := ,
define install
start=$$(date +%s); \
test -x $(BIN)/python || $(PYTHON) -m venv $(VENV); \
$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '$(1)' || exit; \
touch $@; echo "environment: $$(( $$(date +%s) - start )) s"
endef
