"""Measure what quantization costs in quality: perplexity of real models on a text of this repository, without a server.

    python -m bench.perplexity -m demo -m gemma-3-270m-q4_k_m.gguf --tokens 2048

Every token but the first of each window counts, with all earlier tokens of its window as context. A file that is itself
quantized (GGUF) is dequantized when it is read: then "float32" is that file's own quality, not that of the original.

Files of 4-bit blocks hold 16 values per 32 inputs, which groups of the same 32 inputs can find again. "4-shifted" is
int4 as for weights without such blocks: the inputs of each matrix are rolled by 16, quantized and put back, so that
every group has halves of two blocks. "4-shuffled" permutes them at random, which also mixes large and small inputs.
"4-plain" is int4 with each group's range cut into 15 equal steps, and nothing searched. "kv-fp8" keeps keys and values
as `--kv-cache-dtype fp8` does. "q8_0" rounds the linear layers as llama.cpp's format of that name; a GGUF file of
Q4_K_M is that format already, so that its "float32" is llama.cpp's quality.

"packed" is a GGUF file as a CPU server holds it in bfloat16: 4-bit matrices by torch's kernels for them, others dense.
"8-bfloat16" and "4-bfloat16" are `--quant` with these kernels. All other formats widen the file to dense weights first.

"fp8" and "8" are weight-only, as on the CPU. "fp8-w8a8" rounds the activations of linear layers too, as GPUs with
float8 products do for many rows; "8-integers" rounds them to 16 bits, as Hopper does; "8-w8a8" would round them to 8.
"rounded" rounds the weights of the file to float8, "rows-fp8" activations, and "rounded-rows-fp8" both, as Hopper does
for many rows with weights of up to 5 bits; "4-rounded-rows-fp8" does so with int4.
"""

# T tokens of a window, V vocabulary, O outputs, I inputs of a matrix, E inputs of a group

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from mgpu.launch.bench.report import describe, heading
from mgpu.orchestrator.gateway.text.tokenizer import load_codec
from mgpu.orchestrator.models.find import ResolvedModel, read_model, resolve_model
from mgpu.orchestrator.placement.gguf import facts_as_held
from mgpu.orchestrator.placement.machine.devices import cpu_machine
from mgpu.protocol.cache_root import cache_root
from mgpu.protocol.checkpoint.read import Checkpoint
from mgpu.protocol.model.facts import KvCacheDtype
from mgpu.protocol.model.placement import RankPlace
from mgpu.protocol.model.quantization import INT4_GROUP, Quant, weight_format
from mgpu.worker.layers.linear import Linear
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.models.build import DecoderStage, build_stage
from mgpu.worker.quantization.float8_rows import SMALLEST, round_rows
from mgpu.worker.quantization.float8_weights import round_dense
from mgpu.worker.quantization.integer_rows import round_integers
from mgpu.worker.quantization.packing import dequantize
from mgpu.worker.quantization.quantize import quantize
from mgpu.worker.ranks.collectives import SingleRank
from mgpu.worker.state.batch import StepBatch
from mgpu.worker.state.kv_cache import KvCache, stored_dtype

TEXT = Path(__file__).parent / "data" / "public_domain.txt"
BLOCK = 16
LOGIT_ROWS = 128
"""Logits computed at once: Gemma's vocabulary has 262,144 entries."""
Rounding = Callable[[Tensor], Tensor]
"""What is done to the dense weight [O, I] of each linear layer."""


def searched(weight_OI: Tensor) -> Tensor:
    """Round as `--quant 4` does."""
    return dequantize(quantize(weight_OI, weight_format("4")), torch.float32)


def float8(weight_OI: Tensor) -> Tensor:
    """Round as `--quant fp8` does."""
    return dequantize(quantize(weight_OI, weight_format("fp8")), torch.float32)


def int8(weight_OI: Tensor) -> Tensor:
    """Round as `--quant 8` does."""
    return dequantize(quantize(weight_OI, weight_format("8")), torch.float32)


def octets(x_TI: Tensor) -> Tensor:
    """Round rows to integers of 8 bits, the largest of each at 127."""
    scale_T1 = x_TI.abs().amax(1, keepdim=True).clamp_(min=SMALLEST) / 127
    return (x_TI / scale_T1).round_().mul_(scale_T1)


def plain(weight_OI: Tensor) -> Tensor:
    """Round each group to 16 values, the smallest and the largest of its own among them."""
    w_OGE = weight_OI.unflatten(1, (-1, INT4_GROUP))
    low_OG1, high_OG1 = w_OGE.amin(2, keepdim=True), w_OGE.amax(2, keepdim=True)
    steps_OG1 = ((high_OG1 - low_OG1) / 15).clamp_(min=1e-30)
    return ((w_OGE - low_OG1) / steps_OG1).round_().mul_(steps_OG1).add_(low_OG1).flatten(1)


def q8_0(weight_OI: Tensor) -> Tensor:
    """Round as llama.cpp's Q8_0 does: int8 with a float16 scale per 32 inputs."""
    from gguf import GGMLQuantizationType, quants

    stored = quants.quantize(weight_OI.numpy(), GGMLQuantizationType.Q8_0)
    return torch.from_numpy(quants.dequantize(stored, GGMLQuantizationType.Q8_0))


def shifted(count: int) -> Tensor:
    return torch.arange(count).roll(INT4_GROUP // 2)


def shuffled(count: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))


def regrouped(order: Callable[[int], Tensor], rounding: Rounding) -> Rounding:
    """Round with the inputs in another order."""

    def apply(weight_OI: Tensor) -> Tensor:
        places, rounded_OI = order(weight_OI.shape[1]), torch.empty_like(weight_OI)
        rounded_OI[:, places] = rounding(weight_OI[:, places])
        return rounded_OI

    return apply


@dataclass(frozen=True, slots=True)
class Format:
    dtype: torch.dtype = torch.float32
    quant: Quant = "none"
    rounding: Rounding | None = None
    kv_cache_dtype: KvCacheDtype = "auto"
    rounds_inputs: Rounding | None = None
    """What is done to the rows that linear layers multiply."""
    is_packed: bool = False
    """True if matrices are held as a CPU server does."""


FORMATS = {
    "float32": Format(),
    "bfloat16": Format(torch.bfloat16),
    "packed": Format(torch.bfloat16, is_packed=True),
    "8-bfloat16": Format(torch.bfloat16, "8"),
    "4-bfloat16": Format(torch.bfloat16, "4"),
    "kv-fp8": Format(kv_cache_dtype="fp8"),
    "8": Format(quant="8"),
    "q8_0": Format(rounding=q8_0),
    "8-kv-fp8": Format(quant="8", kv_cache_dtype="fp8"),
    "fp8": Format(quant="fp8"),
    "fp8-w8a8": Format(rounding=float8, rounds_inputs=round_rows),
    "8-integers": Format(rounding=int8, rounds_inputs=round_integers),
    "8-w8a8": Format(rounding=int8, rounds_inputs=octets),
    "4": Format(quant="4"),
    "rounded": Format(rounding=round_dense),
    "rows-fp8": Format(rounds_inputs=round_rows),
    "rounded-rows-fp8": Format(rounding=round_dense, rounds_inputs=round_rows),
    "4-rounded-rows-fp8": Format(rounding=lambda weight: round_dense(searched(weight)), rounds_inputs=round_rows),
    "4-shifted": Format(rounding=regrouped(shifted, searched)),
    "4-shifted-rounded-rows-fp8": Format(
        rounding=lambda weight: round_dense(regrouped(shifted, searched)(weight)), rounds_inputs=round_rows
    ),
    "4-shuffled": Format(rounding=regrouped(shuffled, searched)),
    "4-plain": Format(rounding=plain),
    "4-plain-shifted": Format(rounding=regrouped(shifted, plain)),
}


class RoundedInputs:
    """Multiplies as a layer does, after its inputs were rounded."""

    def __init__(self, layer: Linear, rounding: Rounding) -> None:
        self._multiply, self._round = layer._multiply, rounding

    def __call__(self, x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        return self._multiply(self._round(x_TI), weight_OI, bias_O)


def load(checkpoint: Checkpoint, form: Format) -> DecoderStage:
    facts = replace(checkpoint.facts, formats=())
    if form.is_packed:
        facts = facts_as_held(checkpoint.facts, cpu_machine(1), "bfloat16")
    place, layers = RankPlace(0, 0, 0, 1, 0), range(facts.num_layers)
    stage = build_stage(facts, place, layers, SingleRank(), form.dtype, torch.device("cpu"), form.quant)
    with WeightReader(checkpoint, lambda count: None) as reader:
        stage.load(reader)
    if form.rounding is not None:
        for layer in linear_layers(stage):
            layer.weight = form.rounding(layer.weight)
    stage.finalize()
    return stage


def linear_layers(stage: DecoderStage) -> list[Linear]:
    return [module for _, module in stage.named_modules() if isinstance(module, Linear)]


def window_batch(ids: list[int]) -> StepBatch:
    """Lay one window out as the prompt of a single row."""
    count = len(ids)
    places = torch.arange(count)
    return StepBatch(
        rows=torch.zeros(1, dtype=torch.int64),
        token_ids=torch.tensor(ids),
        positions=places,
        slots=places,
        query_starts=torch.tensor([0, count], dtype=torch.int32),
        context_lens=torch.tensor([count], dtype=torch.int32),
        block_tables=torch.arange(-(-count // BLOCK), dtype=torch.int32).view(1, -1),
        logit_rows=places,
        query_lens_host=[count],
        context_lens_host=[count],
    )


def negative_log_likelihoods(stage: DecoderStage, ids: list[int], kept: torch.dtype) -> Tensor:
    """Return -log p of every token of a window but the first, in float64, with keys and values ``kept`` in a type."""
    facts = stage.facts
    shape = (facts.num_layers, -(-len(ids) // BLOCK), BLOCK, facts.num_kv_heads, facts.head_dim)
    batch = window_batch(ids)
    x_TD = stage.run_layers(stage.embed(batch.token_ids), batch, KvCache(*shape, kept, torch.device("cpu")))
    parts = []
    for first in range(0, len(ids) - 1, LOGIT_ROWS):
        end = min(first + LOGIT_ROWS, len(ids) - 1)
        targets = batch.token_ids[first + 1 : end + 1]
        logits_TV = stage.logits(x_TD[first:end])
        parts.append(torch.nn.functional.cross_entropy(logits_TV, targets, reduction="none").double())
    return torch.cat(parts)


def text_windows(model: ResolvedModel, text: Path, tokens: int, window: int) -> list[list[int]]:
    """Return the token ids of a text, cut into windows that each begin as a prompt of the model does."""
    codec = load_codec(model.path, model.format)
    if codec is None:
        raise SystemExit(f"{model.path} has no tokenizer")
    return cut(codec.encode(""), codec.encode(text.read_text(), add_special_tokens=False)[:tokens], window)


def cut(first_ids: list[int], ids: list[int], window: int) -> list[list[int]]:
    """Return whole windows, each of which begins with ``first_ids``."""
    size = window - len(first_ids)
    return [first_ids + ids[first : first + size] for first in range(0, len(ids) - size + 1, size)]


@torch.inference_mode()
def measure(checkpoint: Checkpoint, windows: list[list[int]], name: str) -> dict[str, object]:
    """Load the model in one format and score all windows."""
    form = FORMATS[name]
    began_s = time.monotonic()
    stage = load(checkpoint, form)
    if form.rounds_inputs is not None:
        for layer in linear_layers(stage):
            layer._multiply = RoundedInputs(layer, form.rounds_inputs)
    loaded_s = time.monotonic()
    kept = stored_dtype(form.kv_cache_dtype, form.dtype)
    nll = torch.cat([negative_log_likelihoods(stage, each, kept) for each in windows])
    return {
        "format": name,
        "perplexity": round(math.exp(nll.mean()), 3),
        "tokens": len(nll),
        "weight_bytes": stage.weight_bytes(),
        "load_s": round(loaded_s - began_s, 1),
        "score_s": round(time.monotonic() - loaded_s, 1),
    }


def find(name: str) -> str:
    """Take a path, ``demo``, or the name of a file in the cache of models."""
    cached = cache_root() / "models" / name
    return str(cached) if cached.is_file() else name


def read_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-m", "--model", action="append", required=True, help="path, demo, or a file of the cache")
    parser.add_argument("--text", type=Path, default=TEXT)
    parser.add_argument("--tokens", type=int, default=2048, help="most tokens of the text")
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--json", action="store_true")
    return parser.parse_args()


def main() -> None:
    options = read_options()
    print(heading(describe()), flush=True)
    for name in options.model:
        model = resolve_model(find(name))
        windows = text_windows(model, options.text, options.tokens, options.window)
        checkpoint, baseline = read_model(model), 0.0
        for form in options.formats:
            result = measure(checkpoint, windows, form)
            baseline = baseline or float(str(result["perplexity"]))
            if options.json:
                print(json.dumps({"model": model.name} | result), flush=True)
                continue
            print(line(model.name, result, baseline), flush=True)


def line(model: str, result: dict[str, object], baseline: float) -> str:
    """Write a result for people, with the loss against the first format."""
    perplexity, mib = float(str(result["perplexity"])), int(str(result["weight_bytes"])) / 2**20
    return (
        f"{model:24} {result['format']:16} perplexity {perplexity:8.3f} ({perplexity / baseline - 1:+.1%}) over "
        f"{result['tokens']} tokens, {mib:6.0f} MiB, {result['load_s']} s to load, {result['score_s']} s to score"
    )


if __name__ == "__main__":
    main()
