"""What the teachers of a run are checked against."""

from pathlib import Path
from typing import NamedTuple

import torch

from handler.caption_tokenizer import CaptionTokenizer
from handler.image_preprocess import PreprocessConfig
from training.model import CaptioningModel


class Student(NamedTuple):
    """The model that a run trains, and what its teachers must have in common with it. `folders` are
    those that the run writes."""

    model: CaptioningModel
    tokenizer: CaptionTokenizer
    preprocessing: PreprocessConfig
    max_tokens: int
    device: torch.device
    folders: tuple[Path, ...]
