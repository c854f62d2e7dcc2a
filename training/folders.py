"""What is in the folder of a checkpoint, so that nothing else is ever replaced by one."""

import dataclasses
from pathlib import Path

from handler.files import FolderKind

CHECKPOINTS = Path("build/checkpoints")
WEIGHTS_FILE = "model.safetensors"
# What training keeps there for `--resume`, and what it logs.
STATE_FILE, LOG_FILE = "train_state.pt", "metrics.jsonl"
# All that training and import ever write, or wrote in version 1.0, into a run's folder.
CHECKPOINT = FolderKind(
    "a checkpoint",
    "config.json",
    ("model", "preprocessing", "tokenizer", "training"),
    (WEIGHTS_FILE, "config.json", "tokenizer.json", STATE_FILE, LOG_FILE, "tensorboard"),
    sure=(STATE_FILE,),  # a run that was interrupted before its first validation
)
# What an import writes: a run that was trained from it is never replaced by another import.
IMPORTED = dataclasses.replace(
    CHECKPOINT,
    name="an imported checkpoint",
    files=(WEIGHTS_FILE, "config.json", "tokenizer.json"),
    sure=(),
)
