"""Queries to tokens: one start token at most, no added space, weights of each measurement, and bad input."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from raylux.errors import UserError
from raylux.queries import Query, load_queries, parse_queries, token_split

VOCABULARY = 320
TEXT = "The capital of France is Paris, not Lyon."


def make_tokenizer(around: str = "$A", **options: Any) -> PreTrainedTokenizerFast:
    """A byte-level BPE: <s> is 0, </s> is 1, <u> (a role marker) is 2; ``around`` is put around each text."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>", "<u>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([TEXT] * 4, trainer)
    bpe.post_processor = processors.TemplateProcessing(single=around, special_tokens=[("<s>", 0), ("</s>", 1)])
    options = {"bos_token": "<s>", "eos_token": "</s>", "additional_special_tokens": ["<u>"], **options}
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **options)


PLAIN = make_tokenizer()
START = make_tokenizer("<s> $A")
BOTH = make_tokenizer("<s> $A </s>")
END = make_tokenizer("$A </s>")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<u>{{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<u>{% endif %}"
)


def bare(text: str) -> list[int]:
    return list(PLAIN(text, add_special_tokens=False)["input_ids"])


def parse(*records: Any, tokenizer: PreTrainedTokenizerFast = PLAIN, context: int | None = None) -> list[Query]:
    return parse_queries(list(records), tokenizer, VOCABULARY, context, where="q.yaml")


def one(tokenizer: PreTrainedTokenizerFast = PLAIN, context: int | None = None, **record: Any) -> Query:
    (query,) = parse(record, tokenizer=tokenizer, context=context)
    return query


class TestTokens:
    @pytest.mark.parametrize(("tokenizer", "head"), [(PLAIN, []), (START, [0]), (BOTH, [0]), (END, [])])
    def test_prompt_with_specials_then_completion_without(
        self, tokenizer: PreTrainedTokenizerFast, head: list[int]
    ) -> None:
        query = one(tokenizer, prompt="The capital of France is", completion=" Paris")
        (part,) = query.parts
        prompt, completion = bare("The capital of France is"), bare(" Paris")
        assert part.tokens.tolist() == [*head, *prompt, *completion]
        assert part.labels.tolist() == [-100] * len(head + prompt) + completion
        assert part.tokens.dtype == part.labels.dtype == np.int32
        assert part.weight == 1.0

    def test_no_space_is_added(self) -> None:
        split = token_split(one(prompt="France is", completion="Paris"), PLAIN)
        assert "".join(text for text, _, _ in split) == "France isParis"

    @pytest.mark.parametrize("prompt", ["<s>The", "<s><s>The", "The"])
    def test_one_start_token_at_most(self, prompt: str) -> None:
        tokens = one(START, prompt=prompt, completion=" end").parts[0].tokens.tolist()
        assert tokens[0] == 0
        assert tokens.count(0) == 1

    def test_a_start_token_that_is_also_the_end_token(self) -> None:
        tokenizer = make_tokenizer("<s> $A <s>", eos_token="<s>")
        assert one(tokenizer, prompt="The", completion=" end").parts[0].tokens.tolist() == [
            0,
            *bare("The"),
            *bare(" end"),
        ]

    def test_an_end_token_in_the_prompts_own_text_stays(self) -> None:
        tokens = one(BOTH, prompt="The</s>", completion=" end").parts[0].tokens.tolist()
        assert tokens == [0, *bare("The"), 1, *bare(" end")]

    @pytest.mark.parametrize("record", [{"prompt": "", "completion": "Paris"}, {"completion": "Paris"}])
    def test_an_empty_prompt_needs_a_start_token(self, record: dict[str, Any]) -> None:
        assert one(BOTH, **record).parts[0].labels.tolist() == [-100, *bare("Paris")]
        with pytest.raises(UserError, match="the prompt is empty and this tokenizer adds no start token"):
            one(PLAIN, **record)

    def test_chat_uses_the_models_template_with_one_start_token(self) -> None:
        for around in ("$A", "<s> $A", "<s> $A </s>"):
            tokenizer = make_tokenizer(around, chat_template=TEMPLATE)
            query = one(tokenizer, prompt="The capital", completion="Paris", chat=True)
            assert query.parts[0].tokens.tolist() == [0, 2, *bare("The capital"), 1, 2, *bare("Paris")]
            assert query.search_tokens.tolist() == bare("The capital") + bare("Paris")

    def test_chat_agrees_with_transformers(self) -> None:
        tokenizer = make_tokenizer("<s> $A", chat_template=TEMPLATE)
        messages = [{"role": "user", "content": "The capital"}]
        expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        query = one(tokenizer, prompt="The capital", completion="Paris", chat=True)
        assert query.parts[0].tokens.tolist() == expected + bare("Paris")


class TestMeasurements:
    def test_loss_is_minus_logprob(self) -> None:
        plain, loss = (one(prompt="The", completion=" end", measurement=name) for name in ("logprob", "loss"))
        assert plain.parts[0].tokens.tolist() == loss.parts[0].tokens.tolist()
        assert (plain.parts[0].weight, loss.parts[0].weight) == (1.0, -1.0)
        assert (plain.measurement, loss.measurement) == ("logprob", "loss")

    def test_contrast_has_both_completions(self) -> None:
        query = one(prompt="France is", completion=" Paris", contrast=" Lyon", measurement="contrast")
        head = bare("France is")
        assert [part.tokens.tolist() for part in query.parts] == [head + bare(" Paris"), head + bare(" Lyon")]
        assert [part.weight for part in query.parts] == [1.0, -1.0]
        assert query.search_tokens.tolist() == head + bare(" Paris") + bare(" Lyon")

    def test_tokenized_query(self) -> None:
        query = one(input_ids=[0, 5, 6, 7], labels=[-100, -100, 6, 7])
        assert query.parts[0].tokens.tolist() == [0, 5, 6, 7]
        assert query.parts[0].labels.tolist() == [-100, -100, 6, 7]
        assert query.search_tokens.tolist() == [5, 6, 7]
        assert one(input_ids=[5, 6], labels=[5, 6]).parts[0].labels.tolist() == [-100, 6]


class TestDisplay:
    def test_token_split(self) -> None:
        query = one(START, prompt="The capital", completion=" Paris")
        split = token_split(query, START)
        assert "".join(text for text, _, _ in split) == "<s>The capital Paris"
        assert [position for _, _, position in split] == list(range(len(split)))
        assert "".join(text for text, counted, _ in split if counted) == " Paris"

    def test_the_other_part_of_a_contrast(self) -> None:
        query = one(prompt="is", completion=" Paris", contrast=" Lyon", measurement="contrast")
        assert "".join(text for text, counted, _ in token_split(query, PLAIN, part=1) if counted) == " Lyon"

    def test_half_characters_are_shown_by_their_raw_names(self) -> None:
        split = token_split(one(prompt="is", completion=" 漢"), PLAIN)
        assert all(text and "\ufffd" not in text for text, _, _ in split)

    def test_record_is_what_the_file_said(self) -> None:
        query = one(id=7, prompt="The", completion=" end")
        assert query.id == "7"
        assert json.loads(json.dumps(query.record)) == {"id": "7", "prompt": "The", "completion": " end"}


RECORDS = [{"id": "a", "prompt": "The", "completion": " end"}, {"prompt": "é", "completion": " ü"}]


class TestFiles:
    @pytest.mark.parametrize("wrapped", [False, True])
    @pytest.mark.parametrize("suffix", [".yaml", ".yml", ".json", ".jsonl"])
    def test_every_format_gives_the_same_queries(self, tmp_path: Path, suffix: str, wrapped: bool) -> None:
        data: Any = {"queries": RECORDS} if wrapped else RECORDS
        text = yaml.safe_dump(data) if suffix.startswith(".y") else json.dumps(data)
        if suffix == ".jsonl":
            text = "\n\n".join(json.dumps(record) for record in RECORDS)
        (tmp_path / f"q{suffix}").write_text(text, encoding="utf-8")
        queries = load_queries(str(tmp_path / f"q{suffix}"), PLAIN, VOCABULARY, context=64)
        assert [query.id for query in queries] == ["a", "1"]
        assert queries[1].parts[0].tokens.tolist() == bare("é") + bare(" ü")

    @pytest.mark.parametrize(
        ("name", "content", "said"),
        [
            ("q.yaml", b"", r"q\.yaml: holds no query"),
            ("q.yaml", b"[]", r"q\.yaml: holds no query"),
            ("q.yaml", b"queries: []", r"q\.yaml: holds no query"),
            ("q.jsonl", b"\n", r"q\.jsonl: holds no query"),
            ("q.yaml", b"queries:\n- prompt: 'a\n", r"q\.yaml: not valid YAML at line"),
            ("q.yaml", b"prompt: a\ncompletion: b\n", r"the one key 'queries'"),
            ("q.yaml", b"text", r"must be a list of queries"),
            ("q.jsonl", b'{"prompt": "a"}\n{"prompt"', r"q\.jsonl line 2: not valid JSON"),
            ("q.json", b"[", r"q\.json: not valid JSON"),
            ("q.yaml", b"- prompt: caf\xe9", r"q\.yaml: not UTF-8 text \(byte 13\)"),
            ("q.csv", b"a,b", r"queries are a \.yaml, \.json or \.jsonl file"),
        ],
    )
    def test_bad_files(self, tmp_path: Path, name: str, content: bytes, said: str) -> None:
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=said) as caught:
            load_queries(str(tmp_path / name), PLAIN, VOCABULARY, context=None)
        assert "\n" not in str(caught.value)

    def test_a_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(UserError, match=r"q\.yaml: no such file"):
            load_queries(str(tmp_path / "q.yaml"), PLAIN, VOCABULARY, context=None)


GOOD: dict[str, Any] = {"id": "a", "prompt": "The", "completion": " end"}
BAD: list[tuple[Any, str]] = [
    ({"id": "a", "prompt": "The"}, r"q\.yaml query 0 \('a'\): no 'completion'"),
    ({"prompt": "The"}, r"q\.yaml query 0: no 'completion'"),
    ({**GOOD, "completion": ""}, r"'completion' is empty"),
    ({**GOOD, "completion": None}, r"no 'completion'"),
    ({**GOOD, "completion": 1969}, r"'completion' must be text, not 1969; put it in quotes"),
    ({**GOOD, "prompt": True}, r"'prompt' must be text, not True"),
    ({**GOOD, "prompt": "a\ud800"}, r"'prompt' has half a surrogate pair at character 1"),
    ({**GOOD, "compltion": "x"}, r"unknown key 'compltion'; did you mean 'completion'\?"),
    ({**GOOD, "zzz": "x"}, r"unknown key 'zzz'; known: id, prompt"),
    ({**GOOD, "measurement": "logit"}, r"unknown measurement 'logit'; known: logprob, contrast, loss"),
    ({**GOOD, "measurement": "contrast"}, r"'contrast' .* and 'measurement: contrast' go together"),
    ({**GOOD, "contrast": " x"}, r"go together"),
    ({**GOOD, "contrast": "", "measurement": "contrast"}, r"'contrast' is empty"),
    ({**GOOD, "contrast": " end", "measurement": "contrast"}, r"are the same text"),
    ({**GOOD, "chat": True}, r"the tokenizer has no chat template"),
    ({**GOOD, "chat": "yes"}, r"'chat' must be true or false"),
    ({**GOOD, "id": ""}, r"the id must be text or a whole number"),
    ({**GOOD, "id": True}, r"the id must be text or a whole number"),
    ({**GOOD, "labels": [1]}, r"'labels' go with 'input_ids'"),
    ({**GOOD, "input_ids": [1]}, r"'prompt' does not go with 'input_ids'"),
    ({"input_ids": [5, 6]}, r"'input_ids' need 'labels'"),
    ({"input_ids": [5, 6], "labels": [6]}, r"1 labels for 2 input_ids"),
    ({"input_ids": [5, 6], "labels": [5, -100]}, r"no completion: every label after the first position is -100"),
    ({"input_ids": [5, 6], "labels": [-100, 7]}, r"label 7 at position 1 is neither -100 nor the token there"),
    (
        {"input_ids": [5, 320], "labels": [-100, 320]},
        r"token 320 at position 1 is outside the model's vocabulary of 320",
    ),
    ({"input_ids": "5", "labels": [5]}, r"input_ids must be a list of whole numbers, not text"),
    ("The end", r"a query is a mapping"),
]


@pytest.mark.parametrize(("record", "said"), BAD, ids=[said[:40] for _, said in BAD])
def test_bad_queries_end_in_one_line_that_names_the_query(record: Any, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        parse(record)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("q.yaml query 0")


def test_duplicate_ids_name_both_queries() -> None:
    with pytest.raises(UserError, match=r"query 2: the id '0' was already used by query 0"):
        parse({"prompt": "a", "completion": "b"}, GOOD, {**GOOD, "id": 0})


def test_longer_than_the_context_names_query_and_numbers() -> None:
    length = len(bare("The") + bare(" end"))
    assert one(context=length, **GOOD)
    with pytest.raises(UserError, match=rf"\('a'\): {length} tokens, longer than the model's context of {length - 1}"):
        one(context=length - 1, **GOOD)


def test_a_text_query_with_tokens_that_the_model_has_not() -> None:
    with pytest.raises(UserError, match="outside the model's vocabulary of 50"):
        parse_queries([GOOD], PLAIN, 50, None)


def test_a_failing_template_is_one_line() -> None:
    tokenizer = make_tokenizer(chat_template="{{ raise_exception('no\nsystem') }}")
    with pytest.raises(UserError, match="chat template fails") as caught:
        one(tokenizer, **GOOD, chat=True)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("records", [None, [], ()])
def test_no_query_at_all(records: Any) -> None:
    with pytest.raises(UserError, match="holds no query"):
        parse_queries(records, PLAIN, VOCABULARY, None)
