"""Configs that are wrong: each ends in one line with the file, the line or key, and the fault."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from raylux.config import Config
from raylux.errors import UserError
from tests.malformed import Case, case, refused, table

GOOD = """\
run: {folder: runs/x}
model: {path: models/x}
corpus: {path: corpus.jsonl}
queries: {path: queries.yaml}
"""
BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n" + GOOD

# The whole file, what the line says beside the file's name.
FILES = (
    case("empty", "", "a config is a mapping of sections"),
    case("only a comment", "# nothing\n", "a config is a mapping"),
    case("a list", "- run\n- model\n", "a config is a mapping"),
    case("a number", "42\n", "a config is a mapping"),
    case("a text", "run.folder\n", "a config is a mapping"),
    case("null", "null\n", "a config is a mapping"),
    case("a tab", "run:\n\tfolder: x\n", "line 2", r"character '\t'"),
    case("an open quote", GOOD + "fit: {labels: 'sampled}\n", "not valid YAML", "line"),
    case("an open bracket", GOOD + "fit: {seed: 1\n", "not valid YAML", "line 6"),
    case("two colons", GOOD + "fit: seed: 1\n", "line 5", "mapping values are not allowed"),
    case("bad indentation", GOOD + "fit:\n  seed: 1\n unit_tokens: 2\n", "line 7"),
    case("a bad escape", GOOD + 'fit: {labels: "\\q"}\n', "line 5", "escape"),
    case("a key twice", GOOD + "fit: {seed: 1, seed: 2}\n", "line 5", "'seed' comes twice"),
    case("a section twice", GOOD + "fit: {seed: 1}\nfit: {sequences: 2}\n", "line 6", "'fit' comes twice"),
    case("a key twice, once in quotes", GOOD + 'fit: {seed: 1, "seed": 2}\n', "'seed' comes twice"),
    case("a merge key", "base: &b {seed: 1}\n" + GOOD + "fit:\n  <<: *b\n", "line 7", "*b stands for"),
    case("a merge key with a mapping", GOOD + "fit:\n  <<: {seed: 1}\n", "line 6", "merge keys"),
    case("an alias bomb", BOMB, "line 2", "*a stands for a list or mapping"),
    case("an alias of itself", "run: &r {folder: *r}\n", "line 1", "*r stands for"),
    case("an alias of nothing", GOOD + "fit: {seed: *s}\n", "line 5", "undefined alias 's'"),
    case("two documents", GOOD + "---\n" + GOOD, "line 5", "another document"),
    case("a tag of Python", GOOD + "fit: !!python/object/apply:os.getpid []\n", "line 5", "!!python/object"),
    case("a tag of a name", GOOD + "fit: {seed: !!python/name:os.getpid ''}\n", "line 5", "!!python/name"),
    case("a tag of YAML", GOOD + "fit: {seed: !!int '5'}\n", "line 5", "the tag !!int"),
    case("a tag of a broken number", GOOD + "fit: {seed: !!int x}\n", "line 5", "the tag !!int"),
    case("a tag of a broken date", GOOD + "fit: {seed: !!timestamp x}\n", "the tag !!timestamp"),
    case("a tag of bytes", GOOD + "fit: {seed: !!binary '='}\n", "the tag !!binary"),
    case("a tag of one's own", GOOD + "fit: !mine {seed: 1}\n", "the tag !mine"),
    case("a directive of another YAML", "%YAML 9.0\n---\n" + GOOD, "line 1", "YAML document"),
    case("a mapping as a key", GOOD + "? {a: 1}\n: 2\n", "line 5", "a key must be text"),
    case("a list as a key", GOOD + "fit: {[seed]: 1}\n", "line 5", "a key must be text"),
    case("a number as a section", GOOD + "7: {seed: 1}\n", "unknown section 7", "known: run"),
    case("null as a section", GOOD + "~: {seed: 1}\n", "unknown section None"),
    case("true as a section", GOOD + "on: {seed: 1}\n", "unknown section True"),
    case("a number as a key", GOOD + "fit: {7: 1}\n", "unknown key 'fit.7'"),
    case("null as a key", GOOD + "fit: {~: 1}\n", "unknown key 'fit.None'"),
    case("a key of several lines", GOOD + 'fit: {"seed\\nx": 1}\n', "unknown key", "\\n"),
    case("a NUL", GOOD + "fit: {labels: a\0b}\n", "line 5", "U+0000"),
    case("a control character", GOOD + "fit: {labels: a\x1bb}\n", "line 5", "U+001B"),
    case("a number of 5,000 digits", GOOD + f"fit: {{seed: {'9' * 5000}}}\n", "digits"),
    case("10,000 brackets", "[" * 10_000, "nested too deeply"),
    case("10,000 mappings", "{a: " * 10_000, "nested too deeply"),
    case("Latin-1", (GOOD + "# caf\xe9\n").encode("latin-1"), "not UTF-8", "byte"),
    case("UTF-16", GOOD.encode("utf-16"), "not UTF-8", "byte 0"),
    case("bytes of a program", b"\x7fELF\x02\x01\x01\x00" * 9, "line 1", "U+007F"),
    case("2 MiB", "#" * (1 << 21), "2,097,152 bytes", "too many"),
    case("no run section", GOOD.replace("run: {folder: runs/x}\n", ""), "'run' is required"),
    case("no model section", GOOD.replace("model: {path: models/x}\n", ""), "'model' is required"),
    case("no corpus path", GOOD.replace("{path: corpus.jsonl}", "{text: body}"), "'corpus.path' is required"),
    case("nothing required", "fit: {seed: 1}\n", "'run' is required", "3 more"),
    case("a section that is null", GOOD + "fit:\n", "the section 'fit'", "is empty"),
    case("a section that is a list", GOOD + "fit: [seed, 1]\n", "the section 'fit'", "a list of 2"),
    case("a section that is text", GOOD + "fit: sampled\n", "the section 'fit'", "'sampled'"),
    case("a section that is true", GOOD + "score: yes\n", "the section 'score'", "True"),
    case("a required section that is null", "run:\n", "the section 'run'", "is empty"),
    case("an unknown section", GOOD + "fitt: {seed: 1}\n", "unknown section 'fitt'", "did you mean 'fit'"),
    case("an unknown key", GOOD + "fit: {sequence: 1}\n", "unknown key 'fit.sequence'", "did you mean 'sequences'"),
    case("a key far from any", GOOD + "fit: {zzz: 1}\n", "unknown key 'fit.zzz'", "known: sequences"),
    case("a key of another section", GOOD + "fit: {damping: 1}\n", "unknown key 'fit.damping'"),
    case("a key at the top", GOOD + "damping: 1\n", "unknown section 'damping'"),
    case("a section's key with a dot", GOOD + "fit.seed: 1\n", "unknown section 'fit.seed'"),
)

# An override, and what the line says beside the key. Each is also tried as a line of the file.
VALUES = (
    case("fit.sequences=0", None, "'fit.sequences' = 0", "greater than or equal to 1"),
    case("fit.sequences=-3", None, "-3"),
    case("fit.sequences=1.5", None, "1.5", "valid integer"),
    case("fit.sequences=true", None, "True", "valid integer"),
    case("fit.sequences='7'", None, "'7'", "valid integer"),
    case("fit.sequences=010", None, "'010'", "valid integer"),
    case("fit.sequences=0o17", None, "'0o17'", "valid integer"),
    case("fit.sequences=12:30", None, "'12:30'", "valid integer"),
    case("fit.sequences=2024-01-01", None, "'2024-01-01'", "valid integer"),
    case("fit.sequences=10 000", None, "'10 000'", "valid integer"),
    case("fit.sequences=1e3", None, "'1e3'", "valid integer"),
    case("fit.sequences=.nan", None, "nan", "valid integer"),
    case("fit.sequences=.inf", None, "inf", "valid integer"),
    case("fit.sequences=", None, "None", "valid integer"),
    case("fit.sequences=[1]", None, "a list of 1", "valid integer"),
    case("fit.sequences={a: 1}", None, "a mapping of 1", "valid integer"),
    case("fit.sequences=1" + "0" * 30, None, "less than or equal to"),
    case("fit.sequences=1" + "0" * 300, None, "bits", "less than or equal to"),
    case("fit.labels=random", None, "'random'", "'sampled' or 'dataset'"),
    case("fit.labels=no", None, "False", "'sampled' or 'dataset'"),
    case("fit.seed=-1", None, "-1", "greater than or equal to 0"),
    case("fit.seed=9223372036854775808", None, "less than 9223372036854775808"),
    case("fit.unit_tokens=0", None, "greater than or equal to 1", "'auto'"),
    case("fit.unit_tokens=automatic", None, "'automatic'", "valid integer or", "'auto'"),
    case("fit.snapshot=-1", None, "-1", "greater than or equal to 0"),
    case("fit.snapshot=.nan", None, "nan", "finite"),
    case("fit.snapshot=.inf", None, "inf", "finite"),
    case("fit.snapshot=1e999", None, "inf", "finite"),
    case("curvature.kind=EKFAC", None, "'EKFAC'", "'ekfac'"),
    case("curvature.kind=[ekfac]", None, "a list of 1"),
    case("curvature.damping=-0.1", None, "-0.1", "greater than or equal to 0"),
    case("curvature.damping=.nan", None, "nan", "finite"),
    case("curvature.damping=-.inf", None, "-inf", "finite"),
    case("curvature.damping=0.1x", None, "'0.1x'", "valid number or"),
    case("curvature.damping=off", None, "False", "valid number or"),
    case("prefilter.kind=null", None, "None", "'idf'"),
    case("prefilter.top=0", None, "greater than or equal to 1"),
    case("prefilter.top=all", None, "'all'", "valid integer"),
    case("query.max_error=1", None, "less than 1"),
    case("query.max_error=-1e-9", None, "greater than or equal to 0"),
    case("query.max_error=.nan", None, "finite"),
    case("query.max_rank=0", None, "greater than or equal to 1"),
    case("query.probes=0", None, "greater than or equal to 1"),
    case("query.probes=many", None, "'many'", "'auto'"),
    case("score.unit=bits", None, "'bits'", "'nats' or 'raw'"),
    case("score.train_size=0", None, "greater than or equal to 1"),
    case("score.layers=1", None, "1", "valid boolean"),
    case("score.layers='yes'", None, "'yes'", "valid boolean"),
    case("score.token_top=-1", None, "greater than or equal to 0"),
    case("score.unit_size=0", None, "greater than or equal to 1"),
    case("engine.backend=spark", None, "'spark'", "'ray' or 'local'"),
    case("engine.workers=0", None, "greater than or equal to 1"),
    case("engine.workers=-2", None, "greater than or equal to 1"),
    case("engine.workers=1000000000", None, "less than or equal to 100000"),
    case("engine.shards=0", None, "greater than or equal to 1"),
    case("engine.threads=0", None, "greater than or equal to 1"),
    case("engine.threads=100000", None, "less than or equal to 4096"),
    case("engine.batch_tokens=0", None, "greater than or equal to 1"),
    case("engine.timeout=0", None, "greater than 0"),
    case("engine.timeout=.inf", None, "finite"),
    case("model.dtype=float16", None, "'float16'", "'bfloat16'"),
    case("model.device=tpu", None, "'tpu'", "'cuda'"),
    case("model.trust_remote_code='true'", None, "'true'", "valid boolean"),
    case("model.trust_remote_code=1", None, "valid boolean"),
    case("model.layers=[]", None, "a list of 0", "at least 1 item"),
    case("model.layers=5", None, "5", "valid tuple"),
    case("model.layers=[5]", None, "5", "valid string"),
    case("model.layers=['']", None, "must not be empty"),
    case("model.path=", None, "None", "valid string"),
    case("model.path=5", None, "5", "valid string"),
    case("model.path=' '", None, "must not be empty"),
    case("model.tokenizer=''", None, "must not be empty"),
    case("run.folder=''", None, "must not be empty"),
    case("run.folder=[a]", None, "valid string"),
    case('run.folder="a\\0b"', None, "U+0000"),
    case('run.folder="a\\nb"', None, "U+000A"),
    case('corpus.path="\\ud800"', None, "U+D800"),
    case('queries.path="\\e[2J"', None, "U+001B"),
    case("corpus.max_length=1", None, "greater than or equal to 2"),
    case("corpus.max_length=1000000000000", None, "less than or equal to"),
    case("corpus.limit=0", None, "greater than or equal to 1"),
    case("corpus.limit=9223372036854775808", None, "less than or equal to"),
    case("corpus.format=csv", None, "'csv'", "'jsonl'"),
    case("corpus.pack=maybe", None, "'maybe'", "valid boolean"),
    case("corpus.keep={a: b}", None, "a mapping of 1", "valid tuple"),
    case("corpus.keep=[a, 1]", None, "valid string"),
    case("corpus.text=''", None, "must not be empty"),
    case("corpus.id=7", None, "valid string"),
)

OVERRIDES = (
    case("no equals sign", "fit.seed", "override 'fit.seed'", "section.key=value"),
    case("no dot", "seed=1", "override 'seed=1'", "section.key=value"),
    case("no key", "fit.=1", "section.key=value"),
    case("no section", ".seed=1", "section.key=value"),
    case("nothing", "", "override ''", "section.key=value"),
    case("only an equals sign", "=", "section.key=value"),
    case("an unknown section", "fitt.seed=1", "unknown section 'fitt'", "did you mean 'fit'"),
    case("an unknown key", "fit.sed=1", "unknown key 'fit.sed'", "did you mean 'seed'"),
    case("a key of a key", "fit.seed.x=1", "unknown key 'fit.seed.x'"),
    case("an open bracket", "fit.seed=[1", "override 'fit.seed=[1'", "not valid YAML"),
    case("two documents", "fit.seed=1\n---\n2", "another document"),
    case("a tag", "fit.seed=!!python/name:os.getpid ''", "the tag !!python/name"),
    case("a bomb", "fit.seed=[&a [1], *a]", "*a stands for"),
    case("a tab", "fit.seed=\t@", "not valid YAML"),
    case("a long one", f"fit.labels={'x' * 9000}", "'fit.labels' = 'xxx", "…"),
)


def load(folder: Path, content: str | bytes, *overrides: str) -> Config:
    path = folder / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Config.load(path, overrides)


def test_what_the_tables_spoil_is_good(tmp_path: Path) -> None:
    assert load(tmp_path, GOOD) == load(tmp_path, "\ufeff" + GOOD.replace("\n", "\r\n"))


@table(*FILES)
def test_files(case: Case, tmp_path: Path) -> None:
    refused(lambda: load(tmp_path, case.content), "c.yaml: ", *case.says)


@table(*VALUES)
def test_values_in_a_file_and_on_the_command_line(case: Case, tmp_path: Path) -> None:
    key, _, value = case.name.partition("=")
    section, _, name = key.partition(".")
    sections = {line.split(":")[0]: line for line in GOOD.splitlines()}
    sections[section] = f"{section}:\n  {name}: {value}\n"
    if section in ("model", "corpus") and name != "path":
        sections[section] += "  path: x\n"
    assert refused(lambda: load(tmp_path, GOOD, case.name), "c.yaml: ", f"'{key}", *case.says) == refused(
        lambda: load(tmp_path, "\n".join(sections.values()))
    )


@table(*OVERRIDES)
def test_overrides(case: Case, tmp_path: Path) -> None:
    refused(lambda: load(tmp_path, GOOD, case.content), *case.says)


def test_places_that_are_no_files(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    for path, says in {
        tmp_path: "is a folder",
        tmp_path / "pipe": "no regular file",
        Path("/dev/zero"): "no regular file",
        Path("/dev/null"): "no regular file",
        tmp_path / "link": "no such config file",
        tmp_path / "loop": "cannot be read",
        tmp_path / ("x" * 300): "cannot be read",
        tmp_path / "a\0b": "cannot be read",
        tmp_path / "c.yaml" / "x": "no such config file",
    }.items():
        refused(lambda path=path: Config.load(path), says)


def test_text_stays_text() -> None:
    """What YAML 1.1 would turn into numbers and dates is what the user wrote."""
    sections = {"run": {"folder": "x"}, "model": {"path": "x"}, "corpus": {"path": "x"}, "queries": {"path": "x"}}
    for value in ("2024-01-01", "010", "12:30", "1_0.0.0", "=", "0b1", "1e3x"):
        assert Config.parse(sections, [f"run.folder={value}"]).run.folder == value
    numbers = Config.parse(sections, ["fit.seed=0x1F", "curvature.damping=1e-3", "prefilter.top=1_000"])
    assert (numbers.fit.seed, numbers.curvature.damping, numbers.prefilter.top) == (31, 0.001, 1000)


def test_an_error_is_one_line_whatever_is_put_into_it() -> None:
    line = str(UserError("a\nb\x1b[2J\ud800 " + "x" * 10**6))
    assert line.startswith(r"a\nb\x1b[2J\ud800 xxx")
    assert len(line) < 1_100


def test_an_error_travels_between_processes_as_it_is() -> None:
    import pickle

    error = pickle.loads(pickle.dumps(UserError("a\nb")))
    assert (type(error), str(error)) == (UserError, r"a\nb")


@pytest.mark.parametrize("section", [name for name in Config.model_fields if name not in ("run", "queries")])
def test_a_loaded_config_is_read_back_from_what_it_dumps(section: str) -> None:
    sections = {"run": {"folder": "x"}, "model": {"path": "x"}, "corpus": {"path": "x"}, "queries": {"path": "x"}}
    config = Config.parse(sections, ["model.layers=[a, b]", "corpus.keep=k", "engine.timeout=60"])
    assert getattr(Config.model_validate(config.dump()), section) == getattr(config, section)
