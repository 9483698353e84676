"""A sequence that ends the process of every worker that runs it, on a cluster of its own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml

from jobs.faults.cluster import cluster
from jobs.faults.driver import Driver
from jobs.faults.inputs import write_config
from jobs.faults.verdict import differing
from raylux.api import run, run_stages
from raylux.config import Config
from raylux.ledger import COVARIANCE, MOMENTS, PROBE, QUARANTINE, SCORE
from raylux.store import RunFolder
from tests.small import CUT, Inputs, make_inputs, tokenizer, write_lines

pytestmark = pytest.mark.cluster
DEADLY = "herbs"
# Code that ships with a model, as a faulty kernel would do it. Fake and meta tensors hold no numbers to look at.
CODE = """
import os, signal
import torch
from transformers import GPT2Config, GPT2LMHeadModel


class FragileConfig(GPT2Config):
    model_type = "fragile"


class FragileModel(GPT2LMHeadModel):
    config_class = FragileConfig

    def forward(self, input_ids=None, position_ids=None, logits_to_keep=0, **rest):
        if type(input_ids) is torch.Tensor and input_ids.device.type == "cpu" and (input_ids == TOKEN).any():
            os.kill(os.getpid(), signal.SIGKILL)
        rest |= {"position_ids": position_ids, "logits_to_keep": logits_to_keep}
        return super().forward(input_ids=input_ids, **rest)
"""


def fragile(inputs: Inputs, folder: Path) -> Path:
    """The same weights in a model that dies of the deadly word."""
    shutil.copytree(inputs.model, folder)
    (token,) = tokenizer()(DEADLY)["input_ids"]
    (folder / "fragile.py").write_text(CODE.replace("TOKEN", str(token)), encoding="utf-8")
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "fragile", "architectures": ["FragileModel"]}
    config["auto_map"] = {"AutoConfig": "fragile.FragileConfig", "AutoModelForCausalLM": "fragile.FragileModel"}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_it_is_left_out_with_its_unit_and_the_rest_has_its_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Held against a run in process in which the same units were given up before it began."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    inputs = make_inputs(tmp_path / "inputs", "gpt2")
    rows = [json.loads(line) for line in inputs.corpus.read_text(encoding="utf-8").splitlines()]
    for place, row in enumerate(rows):
        row["text"] = row["text"].replace(DEADLY, "plums") + (f" {DEADLY}" if place == 17 else "")
    write_lines(inputs.corpus, rows)
    folder, usual = tmp_path / "run", tmp_path / "usual"
    sections = inputs.sections(folder)
    del sections["run"]
    for text in CUT:
        name, _, value = text.partition("=")
        section, _, key = name.partition(".")
        sections.setdefault(section, {})[key] = yaml.safe_load(value)
    sections["engine"] |= {"backend": "ray", "timeout": 120}
    sections["query"] = {"low_rank": "always"}  # so that there are probes
    deadly = {**sections, "model": {"path": str(fragile(inputs, tmp_path / "fragile")), "trust_remote_code": True}}
    config = write_config(tmp_path / "run.yaml", deadly, folder)
    with cluster() as there:
        driver = Driver(config, there.env, tmp_path / "log")
        driver.start()
        try:
            driver.wait(280)
        finally:
            driver.kill()
    assert driver.code == 3, driver.said()

    given_up = RunFolder(str(folder)).units(QUARANTINE)
    assert [manifest.meta["stage"] for manifest in given_up.values()] == [COVARIANCE, PROBE, SCORE]
    for manifest in given_up.values():
        assert "s17" in manifest.meta["sequences"]
        assert len(manifest.meta["sequences"]) < len(rows) / 2
        assert manifest.meta["deaths"] == 4 and "process ended" in manifest.meta["reason"]

    alone = Config.load(write_config(tmp_path / "usual.yaml", sections, usual, backend="local"))
    run_stages(alone, ["corpus"], quiet=True)
    for unit, manifest in given_up.items():
        RunFolder(str(usual)).commit(QUARANTINE, unit, **manifest.meta)
    run(alone)
    assert differing(folder, usual) == []
    assert RunFolder(str(usual)).committed(MOMENTS)
