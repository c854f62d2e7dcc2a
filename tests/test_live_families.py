"""One TorchServe serves a tiny model of each family in turn: imported, exported, archived, registered
in the place of the one before, and asked by REST and gRPC."""

from pathlib import Path

import pytest
import requests
from huggingface_models import save_family
from live import client_of, configure, management_key
from test_families import PHOTOS, generate
from test_image_preprocess import jpeg

from export.archive import build_archive
from export.export import export_checkpoint
from handler.serve import server as serve
from training.checkpoint import load_captioner
from training.weights.huggingface import import_huggingface

pytestmark = [pytest.mark.live, pytest.mark.slow]
NAMES = ("blip", "git", "vit+gpt2")
OPTIONS = {"num_beams": 3, "max_new_tokens": 9}
