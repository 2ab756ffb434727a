"""Servers that an attack needs: with few descriptors, with HTTP, or with a tokenizer that can be made to panic."""

import json
from dataclasses import dataclass
from pathlib import Path

from bench.attack.small_model import config


@dataclass(frozen=True)
class Situation:
    """What differs from an ordinary server."""

    open_files: int = 0
    """Limit of open files of each process; 0: that of this process."""
    split: str = ""
    """Regular expression by which the model's tokenizer cuts a text; empty: the ordinary model."""
    lacks_token: bool = False
    """True: the tokenizer names a special token that it lacks."""
    http: bool = False
    """True: it serves HTTP, with API keys, and half of the honest streams and a prober are there."""


ORDINARY = Situation()
FEW_DESCRIPTORS = Situation(open_files=256)
WITH_HTTP = Situation(http=True)
SLOW_EXPRESSION = Situation(split="(a+)+b|.")
LOST_TOKEN = Situation(split=".", lacks_token=True)


def make_model(folder: Path, situation: Situation) -> Path:
    """Write a small Llama without weights (``--load-format dummy``) whose tokenizer is the situation's."""
    folder.mkdir()
    vocabulary = {chr(code): code - 32 for code in range(32, 127)}
    single: list[dict[str, object]] = [{"Sequence": {"id": "A", "type_id": 0}}]
    if situation.lacks_token:
        single.insert(0, {"SpecialToken": {"id": "<lost>", "type_id": 0}})
    split = {"type": "Split", "pattern": {"Regex": situation.split}, "behavior": "Isolated", "invert": False}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [],
        "pre_tokenizer": split,
        "post_processor": {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}},
        "decoder": {"type": "ByteFallback"},
        "model": {"type": "BPE", "vocab": vocabulary, "merges": []},
    }
    (folder / "config.json").write_text(json.dumps(config(hidden_size=64)))
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages[0].content }}"}))
    return folder
