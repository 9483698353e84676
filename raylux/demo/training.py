"""The demo's small GPT and its tokenizer: trained once on the demo's corpus, then kept in the cache."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from raylux.batches import IGNORED
from raylux.cache import build_once, entry_name
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


Progress = Callable[[int, int, float], None]
"""Called after each step with (step, steps, loss per token)."""

Watch = Callable[[int, float, PreTrainedModel], None]
"""Called after each epoch with (epoch, learning rate of its last step, the model as it is then)."""


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
        weights: w of each text: a batch's loss is Σ w L / T with L a text's summed token loss and T the batch's
            labelled tokens, whatever the weights are. Which texts make a batch, and in what order batches come, does
            not depend on them either: models that differ in weights alone are trained on common random numbers.
            Default: 1 each.
        start: a model of these sizes whose weights training begins at, in its dtype; it is left as it is. Default:
            ``initial_model``'s.
    """
    rows = tokenizer(list(texts), truncation=True, max_length=settings.context)["input_ids"]
    threads = torch.get_num_threads()
    torch.set_num_threads(settings.threads)
    try:
        model = initial_model(tokenizer, settings) if start is None else copy.deepcopy(start)
        own = None if weights is None else torch.tensor(weights, dtype=torch.float64)
        _fit(model, rows, settings, progress, watch, own)
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


def _fit(
    model: PreTrainedModel,
    rows: list[list[int]],
    settings: TrainingSettings,
    progress: Progress | None,
    watch: Watch | None,
    weights: torch.Tensor | None,
) -> None:
    generator = torch.Generator().manual_seed(settings.seed)
    epochs = [_batches(rows, settings.batch_tokens, generator) for _ in range(settings.epochs)]
    steps = sum(len(epoch) for epoch in epochs)
    warm = max(1, steps // 20)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=settings.rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warm, max(0.0, (steps - step) / max(1, steps - warm)))
    )
    model.train()
    batches = [
        (number, place == len(epoch), batch)
        for number, epoch in enumerate(epochs, start=1)
        for place, batch in enumerate(epoch, start=1)
    ]
    for step, (epoch, last, batch) in enumerate(batches, start=1):
        tokens, mask, labels = _pad([rows[i] for i in batch])
        optimizer.zero_grad(set_to_none=True)
        if weights is None:
            loss = model(input_ids=tokens, attention_mask=mask, labels=labels).loss
        else:
            logits = model(input_ids=tokens, attention_mask=mask, use_cache=False).logits
            loss = _weighted(logits, labels, weights[batch])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        rate = float(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
        if watch is not None and last:
            watch(epoch, rate, model)
        if progress is not None:
            progress(step, steps, float(loss.detach()))


def _weighted(logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Σ w L / T of a batch; the number of labelled tokens T is that of the batch without weights."""
    wanted = labels[:, 1:]
    losses = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), wanted.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return (losses.view_as(wanted).sum(1) * weights.to(losses.dtype)).sum() / (wanted != IGNORED).sum()


def _batches(rows: list[list[int]], batch_tokens: int, generator: torch.Generator) -> list[list[int]]:
    """Rows of like length together, at most ``batch_tokens`` tokens with padding, batches shuffled."""
    jitter = (torch.rand(len(rows), generator=generator) * 8).tolist()
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]) + jitter[i])
    batches: list[list[int]] = [[]]
    for i in order:
        # Rows come by about rising length, so this one sets the width, within the jitter.
        width = max([len(rows[i])] + [len(rows[j]) for j in batches[-1]])
        if batches[-1] and width * (len(batches[-1]) + 1) > batch_tokens:
            batches.append([])
        batches[-1].append(i)
    return [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]


def _pad(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens (0 where padded), mask, and labels (-100 where padded), each of shape (rows, longest)."""
    width = max(len(row) for row in rows)
    tokens = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return tokens, mask, tokens.masked_fill(mask == 0, IGNORED)
