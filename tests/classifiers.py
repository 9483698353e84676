"""Tiny seeded classifiers of texts, a tokenizer with special tokens at both ends, and labelled texts."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

CLASSES = ("bad", "fair", "good")
WORDS = "a the film was dull warm slow long quick sad funny and or but not very plot of two old people in rain".split()
SPECIAL = ("<s>", "<pad>", "</s>", "<unk>")
CONTEXT = 40
_SIZES = {
    "vocab_size": 40,
    "num_labels": len(CLASSES),
    "id2label": dict(enumerate(CLASSES)),
    "label2id": {name: number for number, name in enumerate(CLASSES)},
    "pad_token_id": 1,
}
_BERT = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": CONTEXT,
}


def _bert(more: dict[str, Any]) -> PreTrainedModel:
    return BertForSequenceClassification(BertConfig(**{**_SIZES, **_BERT, **more}))


def _roberta(more: dict[str, Any]) -> PreTrainedModel:
    """Positions begin after the padding token, so two are never used; a head of two linears."""
    sizes = {**_SIZES, **_BERT, "max_position_embeddings": CONTEXT + 2, "bos_token_id": 0, "eos_token_id": 2}
    return RobertaForSequenceClassification(RobertaConfig(**{**sizes, **more}))


def _distilbert(more: dict[str, Any]) -> PreTrainedModel:
    sizes = {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 4, "max_position_embeddings": CONTEXT}
    return DistilBertForSequenceClassification(DistilBertConfig(**{**_SIZES, **sizes, **more}))


def _gpt2(more: dict[str, Any]) -> PreTrainedModel:
    """Reads the last token that is no padding."""
    sizes = {
        "n_embd": 16,
        "n_inner": 24,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": CONTEXT,
        "bos_token_id": 0,
        "eos_token_id": 2,
    }
    return GPT2ForSequenceClassification(GPT2Config(**{**_SIZES, **sizes, **more}))


ARCHITECTURES = {"bert": _bert, "roberta": _roberta, "distilbert": _distilbert, "gpt2": _gpt2}


def classifier(name: str, dtype: torch.dtype = torch.float64, **more: Any) -> PreTrainedModel:
    """One of ``ARCHITECTURES``, every parameter random and large enough that predictions are far from uniform."""
    model = ARCHITECTURES[name](more)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.35 * torch.randn(parameter.shape, generator=generator) + (parameter.dim() == 1) * 0.5)
    return model.to(dtype).eval().requires_grad_(False)


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """A token per word, ``<s>`` before a text and ``</s>`` behind it."""
    core = Tokenizer(models.WordLevel({word: place for place, word in enumerate((*SPECIAL, *WORDS))}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    core.post_processor = processors.TemplateProcessing("<s> $A </s>", None, [("<s>", 0), ("</s>", 2)])  # type: ignore[assignment]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )


def texts(count: int) -> list[tuple[str, str]]:
    """Texts of 2 to 24 words with a class each."""
    return [
        (" ".join(WORDS[(7 * n + k * (1 + n % 3)) % len(WORDS)] for k in range(2 + (5 * n) % 23)), CLASSES[(n * n) % 3])
        for n in range(count)
    ]
