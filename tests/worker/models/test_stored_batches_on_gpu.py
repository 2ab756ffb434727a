"""Small quantized models on a GPU decode at 1, 3 and 70 rows, as graphs: tokens are the reference's, or near them."""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from harness.answers.explained import Margins, Round, logits_after, whole_logprobs
from harness.models.quantized_folders import (
    Format,
    Store,
    awq,
    compressed,
    float8_blocks,
    gptq,
    pack_quantized,
    write_quantized,
)
from harness.models.scheduled_model import Request, ScheduledModel
from harness.models.stored_models import EXPERTS, KINDS, NOT_CAPTURABLE, STORED, Stored, write_gguf_experts_in
from mgpu.orchestrator.scheduler.limits import Limits
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.model.quantization import Quant
from mgpu.worker.quantization.float8_rows import round_blocks, round_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
ROWS = (1, 3, 70)
TOKENS = 40
PROMPTS = (40, 5, 17, 2, 29, 11)
"""Lengths that take turns."""
LARGE = {"hidden_size": 512, "intermediate_size": 512}
"""Sizes of which every kernel's tiles are whole."""
_WIDE = {"num_bits": 8, "type": "int", "strategy": "group", "group_size": 128}
GROUPS_OF_128 = {
    "gptq-128": Format("", {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False}, gptq(4, 128)),
    "gptq-8-128": Format("", {"quant_method": "gptq", "bits": 8, "group_size": 128}, gptq(8, 128)),
    "awq-128": Format("", {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm"}, awq(128)),
    "w8a16-128": Format("", compressed("pack-quantized", **_WIDE), pack_quantized(8, 128)),
    "fp8-blocks-128": Format("", {"quant_method": "fp8", "weight_block_size": [128, 128]}, float8_blocks(128)),
}
"""The sizes that are published; those of `STORED` are cut at 32."""
QUANTS: dict[str, Quant] = {"quant 8": "8", "quant 4": "4", "quant fp8": "fp8"}
EXPERTS_IN = {f"GGUF {kind} experts": kind for kind in KINDS}
NAMES = [
    *STORED,
    *EXPERTS_IN,
    *(name + experts for name in (*GROUPS_OF_128, *QUANTS) for experts in ("", " experts")),
]


@dataclass(frozen=True)
class Case:
    """A model twice, how both are quantized while they are loaded, and how inputs of products are rounded.

    ``rounds`` is for steps of at least ``from_rows`` rows. ``rounds_weights``: weights are rounded there too.
    """

    stored: Stored
    quant: Quant
    rounds: Round
    from_rows: int
    rounds_weights: bool = False


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Case]:
    @lru_cache(maxsize=1)
    def make(name: str) -> Case:
        stored = _write(name, tmp_path_factory.mktemp("stored"))
        if name.startswith("fp8-blocks-128"):
            return Case(stored, "none", round_blocks, 17)
        quant = QUANTS.get(name.removesuffix(" experts"), "none")
        return Case(stored, quant, round_rows, _least_rows(name), _rounds_weights(name))

    return make


@dataclass(frozen=True)
class Errors:
    """How far rounding moves log-probabilities, and logits at most."""

    mean: float
    largest: float

    @staticmethod
    def of(rounded_NV: Tensor, exact_NV: Tensor) -> "Errors":
        mean = (rounded_NV.log_softmax(-1) - exact_NV.log_softmax(-1)).abs().mean()
        return Errors(float(mean), float((rounded_NV - exact_NV).abs().max()))


@pytest.fixture(scope="module")
def errors_of(case: Callable[[str], Case]) -> Callable[[str, bool], Errors]:
    """Return what rounding does over many sequences of random tokens: few rows alone say little about it."""

    @lru_cache(maxsize=1)
    def measure(name: str, is_rounded: bool) -> Errors:
        this, rng = case(name), random.Random(0)
        requests = _requests(ROWS[-1], this.stored.plain.facts.vocab_size)
        answers = [[rng.choice(request.prompt_ids) for _ in range(TOKENS)] for request in requests]
        of_plain = this.stored.plain, requests, answers, this.quant
        return Errors.of(
            logits_after(*of_plain, torch.bfloat16, this.rounds if is_rounded else None, this.rounds_weights),
            logits_after(*of_plain),
        )

    return measure


def _least_rows(name: str) -> int:
    """Return from how many rows on activations are rounded to float8 (see docs/quantization.md)."""
    if name.startswith("quant fp8"):
        return 9
    if name.startswith("GGUF"):
        return 1 << 30 if "Q8_0" in name else 65
    four_bits = ("quant 4", "gptq", "awq", "w4a16")
    return 65 if name.startswith(four_bits) and "order" not in name and "-8" not in name else 1 << 30


def _rounds_weights(name: str) -> bool:
    """Return whether weights are rounded with them: all of up to 6 bits but those in groups of 128."""
    return not name.startswith("quant fp8") and "-128" not in name


def _write(name: str, folder: Path) -> Stored:
    if name in EXPERTS_IN:
        return write_gguf_experts_in(folder, EXPERTS_IN[name])
    stem, changes = name.removesuffix(" experts"), {}
    if name.endswith(" experts"):
        changes = EXPERTS | {"moe_intermediate_size": 256}
    if stem in QUANTS:
        _, plain = write_quantized(folder, GROUPS_OF_128["gptq-128"], stores=_in_bfloat16, **LARGE, **changes)
        return Stored(read_checkpoint(plain), read_checkpoint(plain))
    if stem in GROUPS_OF_128:
        packed, plain = write_quantized(folder, GROUPS_OF_128[stem], **LARGE, **changes)
        return Stored(read_checkpoint(packed), read_checkpoint(plain))
    return STORED[name](folder)


def _in_bfloat16(name: str) -> Store:
    """Return how to store a matrix dense, so that a rank in bfloat16 quantizes the same numbers as one in float32."""

    def store(generator: torch.Generator, outputs: int, inputs: int) -> tuple[dict[str, Tensor], Tensor]:
        weight = torch.randn(outputs, inputs, generator=generator).mul_(0.1).bfloat16().float()
        return {"weight": weight}, weight

    return store


def _requests(rows: int, vocab_size: int) -> list[Request]:
    rng = random.Random(rows)
    lengths = [PROMPTS[index % len(PROMPTS)] for index in range(rows)]
    return [Request([rng.randrange(3, vocab_size - 3) for _ in range(length)], TOKENS) for length in lengths]


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_tokens_of_a_crowd_are_those_of_plain_torch_or_near_them(
    case: Callable[[str], Case], errors_of: Callable[[str, bool], Errors], name: str, dtype: torch.dtype, rows: int
) -> None:
    """Graphs choose tokens that are as near to the best as rounding explains, and so are all log-probabilities.

    Where rounding turns a router to another expert, a logit moves further than elsewhere.
    """
    this, limits = case(name), Limits(block_size=16, max_rows=70, max_batch_tokens=256, max_seq_len=95, num_blocks=450)
    plain, vocab_size = this.stored.plain, this.stored.plain.facts.vocab_size
    requests = _requests(rows, vocab_size)
    model = ScheduledModel(this.stored.packed, dtype, DEVICE, this.quant)
    chosen, _ = model.run(limits, requests)
    answers, _ = model.run(limits, [replace(request, num_logprobs=vocab_size) for request in requests])
    assert model.has_graphs or name in NOT_CAPTURABLE
    found_NV = whole_logprobs([model.logprobs[number] for number in range(rows)], vocab_size)
    exact_NV = logits_after(plain, requests, answers, this.quant)
    of_chosen_NV = exact_NV if chosen == answers else logits_after(plain, requests, chosen, this.quant)
    got = Margins.of(of_chosen_NV, torch.tensor([each for answer in chosen for each in answer]))
    spread, moved = float(exact_NV.std()), (found_NV - exact_NV.log_softmax(-1)).abs()
    how_far = f"{float(moved.mean()):.3g} to {float(moved.max()):.3g} of {spread:.3g}"
    print(f"{name} {dtype} {rows} rows: {got}, moved {how_far}", flush=True)
    if dtype == torch.float32:
        bound = 4e-4 * max(1.0, float(exact_NV.abs().max()))
        assert got.worst <= bound
        assert moved.max() <= bound
        return
    is_rounded = sum(len(request.prompt_ids) for request in requests) >= this.from_rows
    errors, slack = errors_of(name, is_rounded), 0.05 if "experts" in name else 0.005
    if rows == ROWS[-1]:
        rounds = this.rounds if is_rounded else None
        rounded_NV = logits_after(plain, requests, answers, this.quant, torch.bfloat16, rounds, this.rounds_weights)
        errors, slack = Errors.of(rounded_NV, exact_NV), 0.002
        expected = Margins.of(exact_NV, rounded_NV.argmax(1))
        print(f"    rounding: {expected}, moves {errors.mean:.3g} to {errors.largest:.3g}", flush=True)
        assert got.mean <= 2 * expected.mean + 0.01 * spread
    assert got.worst <= 2 * errors.largest
    assert moved.mean() <= 1.5 * errors.mean + slack * spread
