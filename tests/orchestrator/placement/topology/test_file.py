"""Topology files in every right and every wrong form."""

import contextlib
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from harness.assertions import assert_has_all
from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.topology.file import parse_topology, read_topology

PIECES = [
    "0-16", "5", "/lm_head/", ":", " ", "\n", "{", "}", "device", "quant", '"cuda[0]"', "cpu", "4", ",", "[", "]", "- ",
    "&a", "*a", "<<", "!!python/name:os", "'", "\t", "---", "#", "|", "?", "\ufeff", "\0", "-", "/(/", "/.*/",
]  # fmt: skip


def refusal(text: str) -> str:
    with pytest.raises(PlacementError) as caught:
        parse_topology(text, "t.yaml")
    return str(caught.value)


def test_ranges_layers_and_patterns_are_read_in_order() -> None:
    topology = parse_topology(
        '0-16:\n  device: cuda[0]\n16 - 32: {device: "cuda[01] + cpu", quant: 4}\n5: {quant: "none"}\n'
        "/lm_head/: {device: cpu}\n",
        "t.yaml",
    )
    ranges = [(rule.first_layer, rule.end_layer, rule.devices, rule.quant) for rule in topology.rules]
    assert ranges[:3] == [(0, 16, ("cuda[0]",), None), (16, 32, ("cuda[1]", "cpu"), "4"), (5, 6, (), "none")]
    assert topology.rules[3].pattern is not None
    assert [rule.line for rule in topology.rules] == [1, 3, 4, 5]


@pytest.mark.parametrize(("text", "parts"), [
    ("", ["has no entries", "0-16:"]),
    ("# nothing\n", ["has no entries"]),
    ("{}", ["has no entries"]),
    ("- 0-16", ["not a mapping"]),
    ("0-16", ["not a mapping"]),
    ("0-16: cuda[0]", ["line 1, 0-16", "not a mapping", "device, quant, experts"]),
    ("0-16:\n", ["not a mapping"]),
    ("0-16: {}", ["says nothing"]),
    ("0-16: {devise: cpu}", ["unknown key 'devise'", "did you mean 'device'?"]),
    ("0-16: {layers: cpu}", ["unknown key 'layers'", "known keys: device, quant, experts"]),
    ("0-16: {<<: {device: cpu}}", ["unknown key '<<'"]),
    ("0-16: {quant: 4, quant: 8}", ["'quant' is there already, in line 1"]),
    ("0-16: {quant: 4}\n0-16: {quant: 8}", ["line 2", "'0-16' is there already, in line 1"]),
    ("16-0: {quant: 4}", ["the range has -16 layers", "write 0-16"]),
    ("5-5: {quant: 4}", ["the range has 0 layers", "layer 5 alone is written 5"]),
    ("-1: {quant: 4}", ["no layers", "START-END with the end exclusive"]),
    ("0..16: {quant: 4}", ["no layers"]),
    ("0-16,20: {quant: 4}", ["no layers"]),
    ("1.5: {quant: 4}", ["no layers"]),
    ("true: {quant: 4}", ["no layers"]),
    ("null: {quant: 4}", ["no layers"]),
    ("\uff19: {quant: 4}", ["no layers"]),
    ("12345678: {quant: 4}", ["no layers"]),
    ("[0, 16]: {quant: 4}", ["a key must be text"]),
    ("0-16: {quant: 3}", ["quant '3' is none of none, 8, 4, fp8"]),
    ("0-16: {quant: int4}", ["quant 'int4' is none of"]),
    ("0-16: {quant: [4]}", ["quant must be one value"]),
    ("0-16: {quant: }", ["quant '' is none of"]),
    ("0-16: {device: 1}", ["'1' is no device", 'did you mean "cuda[1]"?']),
    ("0-16: {device: gpu0}", ["'gpu0' is no device"]),
    ("0-16: {device: cuda}", ["'cuda' is no device"]),
    ("0-16:\n  device: cuda[-1]", ["is no device"]),
    ("0-16:\n  device: cuda[1]+cuda[1]", ["names a device twice"]),
    ("0-16:\n  device: [cuda, cpu]", ["device must be one value"]),
    ("0-16:\n  device:", ["'' is no device"]),
    ("0-16: {device: cuda[0]}", ["line 1", "not YAML", "device names stand in quotes"]),
    ("0-16: {quant: 4", ["not YAML"]),
    ("a: &x [*x]\n*x : 1", ["t.yaml"]),
    ("--- {0: {quant: 4}}\n--- {1: {quant: 4}}", ["not YAML"]),
    ("!!python/object/apply:os.system ['true']", ["not a mapping"]),
    ("/lm_head: {device: cpu}", ["between two slashes"]),
    ("//: {device: cpu}", ["between two slashes"]),
    ("/(/: {device: cpu}", ["not a regular expression"]),
    ("/(a+)+b/: {device: cpu}", ["none of a group"]),
    ("/.*.*.*.*Q/: {device: cpu}", ["3 repeats"]),
    (f"/{'.?' * 25}Q/: {{device: cpu}}", ["3 repeats"]),
    (f"/{'(.|.)' * 25}Q/: {{device: cpu}}", ["5 alternatives"]),
    ("[" * 60_000, ["nested too deeply"]),
    ("\x01: {quant: 4}", ["not YAML"]),
])  # fmt: skip
def test_what_is_wrong_is_named_with_the_way_out(text: str, parts: list[str]) -> None:
    assert_has_all(refusal(text), "t.yaml", *parts)


@pytest.mark.parametrize(
    "pattern",
    [
        r"layers\.[0-9]{1,2}\.(?:self_attn\.(q|k|v)|mlp\.(gate|up))_proj",
        r"layers\.(2[4-9])\..*?down_proj",
        r"(?i)\+\*\?\|+",
    ],
)
def test_patterns_that_take_no_time_are_read(pattern: str) -> None:
    (rule,) = parse_topology(f"'/{pattern}/': {{quant: 4}}", "t.yaml").rules
    assert rule.pattern == re.compile(pattern)


def test_files_that_cannot_be_read_are_refused(tmp_path: Path) -> None:
    for name, data, part in (
        ("missing", None, "No such file"),
        ("binary", b"\xff\xfe0: 1", "not UTF-8"),
        ("large", b"#" * ((1 << 16) + 1), "larger than 64 KiB"),
    ):
        if data is not None:
            (tmp_path / name).write_bytes(data)
        with pytest.raises(PlacementError, match=part):
            read_topology(tmp_path / name)
    with pytest.raises(PlacementError, match="Is a directory"):
        read_topology(tmp_path)


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=60) | st.lists(st.sampled_from(PIECES), max_size=14).map("".join))
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(PlacementError):
        assert parse_topology(text, "t.yaml").rules
