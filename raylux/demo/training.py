"""The demo's small GPT and its tokenizer: trained once on the demo's corpus, then kept in the cache."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from raylux.batches import TokenRow
from raylux.cache import build_once, entry_name
from raylux.evaluate.training import Progress, Recipe, Watch, train
from raylux.modelfiles import quiet

SPECIAL = "<|endoftext|>"
_FORMAT = 1  # raise when training changes in a way that the settings do not show


@dataclass(frozen=True)
class TrainingSettings:
    """Size and training of the demo's model; all of them name its folder in the cache.

    Attributes:
        vocabulary, layers, width, heads, context: of the Llama model.
        epochs: passes over the corpus.
        batch_tokens: tokens of a batch with its padding, at most.
        rate: the largest learning rate (linear warm-up, then linear decay to zero).
        weight_decay: of AdamW.
        seed: initial weights and the order of the batches.
        threads: CPU threads.
    """

    vocabulary: int = 2048
    layers: int = 4
    width: int = 128
    heads: int = 4
    context: int = 128
    epochs: int = 14
    batch_tokens: int = 512
    rate: float = 2e-3
    weight_decay: float = 0.01
    seed: int = 0
    threads: int = 1


def train_cached(
    texts: Sequence[str], settings: TrainingSettings, progress: Progress | None = None
) -> tuple[Path, bool]:
    """The folder of the model trained on the texts (config.json, model.safetensors, tokenizer), and whether
    it was in the cache already.

    Raises:
        UserError: the cache cannot be written.
    """
    trained = False

    def build(folder: Path) -> None:
        nonlocal trained
        trained = True
        tokenizer = train_tokenizer(texts, settings)
        model = train_model(texts, tokenizer, settings, progress)
        with quiet():
            model.save_pretrained(str(folder))
            tokenizer.save_pretrained(str(folder))

    name = entry_name("gpt", _FORMAT, json.dumps(asdict(settings)), json.dumps(list(texts)))
    folder = build_once("demo", name, build)
    return folder.absolute(), not trained


def train_tokenizer(texts: Sequence[str], settings: TrainingSettings) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on the texts; it puts one ``<|endoftext|>`` before each of them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[SPECIAL],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL} $A", special_tokens=[(SPECIAL, tokenizer.token_to_id(SPECIAL))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=SPECIAL,
        eos_token=SPECIAL,
        pad_token=SPECIAL,
        model_max_length=settings.context,
    )


def train_model(
    texts: Sequence[str],
    tokenizer: PreTrainedTokenizerFast,
    settings: TrainingSettings,
    progress: Progress | None = None,
    watch: Watch | None = None,
    weights: Sequence[float] | None = None,
    start: PreTrainedModel | None = None,
) -> PreTrainedModel:
    """A small GPT of the Llama kind, trained on the mean token loss of each batch.

    The same texts and settings give the same model on the same machine; the caller's random state and
    number of threads are left as they were.

    Args:
        texts: one sequence each.
        tokenizer: theirs.
        settings: size and training.
        progress: called after each step.
        watch: called after each epoch.
        weights: of each text, as ``raylux.evaluate.training.train`` takes them; default: 1 each.
        start: a model of these sizes whose weights training begins at, in its dtype; it is left as it is. Default:
            ``initial_model``'s.
    """
    encoded = tokenizer(list(texts), truncation=True, max_length=settings.context)["input_ids"]
    rows = [TokenRow(tokens, tokens) for tokens in map(np.asarray, encoded)]
    recipe = Recipe(settings.epochs, settings.batch_tokens, settings.rate, settings.weight_decay)
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        model = initial_model(tokenizer, settings) if start is None else copy.deepcopy(start)
        train(model, rows, recipe, settings.seed, weights, progress, watch)
    finally:
        torch.set_num_threads(threads)
    return model.eval()


def initial_model(tokenizer: PreTrainedTokenizerFast, settings: TrainingSettings) -> PreTrainedModel:
    """The model before the first step; the caller's random state is left as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return LlamaForCausalLM(_model_config(tokenizer, settings))


def _model_config(tokenizer: PreTrainedTokenizerFast, settings: TrainingSettings) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=settings.context,
        hidden_size=settings.width,
        intermediate_size=settings.width * 8 // 3 // 16 * 16,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_key_value_heads=settings.heads,
        tie_word_embeddings=True,
        # The usual 0.02 is meant for wider layers: with it the loss stays at that of word counts for long.
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
