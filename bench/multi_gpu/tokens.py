"""Correctness: every layout gives the tokens of one device in fp32, and what cannot be is refused with a way out."""

import re
import zlib
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

from bench.model_shapes import TINY, TINY_EXPERTS, TINY_FEW_KV, write_weights
from bench.multi_gpu.box import START_S, Box, Place, plan_of, run_command, serving
from bench.multi_gpu.report import Report
from mgpu import Client
from mgpu.orchestrator.placement.split.layer_map import even_stages, map_text

SECTION = "tokens"
LAYERS = 8
NEW_TOKENS = 24
PROMPTS = [[3 + (37 * i + 11 * n) % 997 for i in range(length)] for n, length in enumerate((1, 3, 20, 65, 300))]
ALONE = 2
"""The prompt that is asked alone, too."""
FP32 = ("--dtype", "float32", "--kv-memory", "64MiB", "--max-seq-len", "1024")
NO_NCCL = {"MGPU_NO_NCCL": "1"}
NO_P2P = {"MGPU_NO_NCCL": "1", "MGPU_NO_P2P": "1"}


@dataclass(frozen=True)
class Case:
    """One layout whose tokens must be those of one device."""

    what: str
    place: Place
    model: str = "own KV heads"
    arguments: tuple[str, ...] = ()
    environ: dict[str, str] = field(default_factory=dict)
    mode: str = ""
    transport: str = ""
    stage_transport: str = ""
    """What the layout must be on GPUs that reach each other; empty: not looked at."""
    uuids: tuple[str, ...] = ()
    """Which GPU each rank must have; empty: not looked at."""
    topology: str = ""
    """A topology file."""

    def options(self, folder: Path) -> tuple[str, ...]:
        """Return the arguments; the topology file is written into the folder."""
        if not self.topology:
            return self.arguments
        path = folder / f"topology-{zlib.crc32(self.topology.encode()):08x}.yaml"
        path.write_text(self.topology)
        return (*self.arguments, "--topology", str(path))


def cases(box: Box) -> Iterator[Case]:
    """List what this many devices can show, the widest first: time may end early."""
    for size in reversed(box.sizes[1:]):
        by_size = () if box.kind == "gpus" else ("--tp", str(size))  # GPUs with NCCL need no flag
        tensor_parallel = Case("", box.first(size), arguments=by_size, mode="tensor-parallel")
        yield replace(tensor_parallel, what=f"TP {size}", transport="nccl")
        if size > 2:
            yield replace(tensor_parallel, what=f"TP {size}, 2 KV heads replicated", model="2 KV heads")
        experts = replace(tensor_parallel, what=f"TP {size}, slices of experts", model="experts")
        yield experts
        whole = (*by_size, "--experts", "parallel")
        yield replace(experts, what=f"TP {size}, whole experts", arguments=whole)
    yield Case("--tp 2 of all", box.first(box.size), arguments=("--tp", "2"), mode="tensor-parallel")
    yield from mapped_cases(box)
    if box.size >= 4:
        yield from hybrid_cases(box)
    yield from subset_cases(box)


def unequal_cases(box: Box) -> Iterator[Case]:
    """Unequal shares of the heads, layers on the CPU, and an embedding or a head apart from its layers."""
    two = box.first(2)
    shares = Case("--tp-shares 5,3", two, arguments=("--tp-shares", "5,3"), mode="tensor-parallel", transport="nccl")
    yield shares
    yield replace(shares, what="--tp-shares 5,3, MGPU_NO_NCCL=1", environ=NO_NCCL, transport="gloo")
    offload = Case('-n "0:5;cpu:3"', box.first(1), arguments=("-n", "0:5;cpu:3"), mode="layer-mapped")
    yield replace(offload, stage_transport="pinned")
    yield replace(offload, what='-n "0:3;1:3;cpu:2"', place=two, arguments=("-n", "0:3;1:3;cpu:2"))
    first, second = ("cpu[0]", "cpu[1]") if box.kind == "cpu" else ("cuda[0]", "cuda[1]")
    layers = f'0-5: {{device: "{first}"}}\n5-8: {{device: "{second}"}}\n'
    for what, edge in (
        ("head on the first device", f'/lm_head/: {{device: "{first}"}}'),
        ("embedding on the second device", f'/embed/: {{device: "{second}"}}'),
        ("embedding on the CPU", "/embed/: {device: cpu}"),
    ):
        yield Case(what, two, topology=layers + edge, mode="layer-mapped")
    yield Case("all on the first, head on the second", two, topology=f'0-8: {{device: "{first}"}}\n/lm_head/: '
               f'{{device: "{second}"}}', mode="layer-mapped")  # fmt: skip


def mapped_cases(box: Box) -> Iterator[Case]:
    """Layer maps, typed and automatic, by every way that activations can take; and TP without NCCL."""
    count = min(box.size, LAYERS)
    typed = ("-n", map_text(even_stages(LAYERS, range(count))))
    mapped = Case(f'-n "{typed[1]}", NCCL', box.first(count), arguments=typed, mode="layer-mapped")
    automatic = replace(mapped, arguments=() if box.kind == "gpus" else typed)
    yield replace(mapped, stage_transport="nccl")
    yield replace(automatic, what=f"{count} stages, MGPU_NO_NCCL=1: P2P", environ=NO_NCCL, stage_transport="peer")
    yield replace(automatic, what=f"{count} stages, MGPU_NO_P2P=1: pinned", environ=NO_P2P, stage_transport="pinned")
    uneven = replace(mapped, place=box.first(2), arguments=("-n", "0:5;1:3"), environ=NO_NCCL)
    yield replace(uneven, what='-n "0:5;1:3", uneven, P2P', stage_transport="peer")
    tp = Case("--tp 2, MGPU_NO_NCCL=1: partial sums by gloo", box.first(2), arguments=("--tp", "2"), environ=NO_NCCL)
    yield replace(tp, mode="tensor-parallel", transport="gloo")


def sum_cases(box: Box) -> Iterator[Case]:
    """The ways of partial sums and of activations that are not the first choice, on two GPUs."""
    if box.kind != "gpus":
        return
    tp = Case("", box.first(2), arguments=("--tp", "2"), mode="tensor-parallel", transport="nccl")
    yield replace(tp, what="--tp 2, MGPU_PEER_REDUCE=0: NCCL alone", environ={"MGPU_PEER_REDUCE": "0"})
    yield replace(tp, what="--tp 2, MGPU_NO_P2P=1: host memory and NCCL", environ={"MGPU_NO_P2P": "1"})
    yield replace(tp, what="--tp 2, MGPU_NO_P2P=1, MGPU_NO_NCCL=1", environ=NO_P2P, transport="gloo")
    stages = Case("", box.first(2), arguments=("-n", "0:4;1:4"), mode="layer-mapped")
    channels = {"MGPU_STAGE_RELAY": "0"}
    yield replace(stages, what="2 stages, MGPU_STAGE_RELAY=0: NCCL", environ=channels, stage_transport="nccl")
    by_ipc = replace(stages, environ=channels | NO_NCCL, stage_transport="peer")
    yield replace(by_ipc, what="2 stages, MGPU_STAGE_RELAY=0, MGPU_NO_NCCL=1: CUDA IPC")
    by_host = replace(stages, environ=channels | NO_P2P, stage_transport="pinned")
    yield replace(by_host, what="2 stages, MGPU_STAGE_RELAY=0, MGPU_NO_P2P=1: pinned")


def hybrid_cases(box: Box) -> Iterator[Case]:
    """Two stages of half the devices each."""
    half = box.sizes[-1] // 2
    first, second = ("+".join(map(str, part)) for part in (range(half), range(half, 2 * half)))
    typed = ("-n", f"{first}:5;{second}:3")
    hybrid = Case(f"hybrid: 2 stages x {half}", box.first(2 * half), arguments=typed, mode="hybrid", transport="nccl")
    yield hybrid
    without = replace(hybrid, what=f"{hybrid.what}, MGPU_NO_NCCL=1", environ=NO_NCCL)
    yield replace(without, transport="gloo", stage_transport="peer")


def subset_cases(box: Box) -> Iterator[Case]:
    """Make only the last two visible, also named in reverse; ordinals stay in PCI bus order."""
    last = [box.size - 2, box.size - 1]
    uuids = [box.machine.devices[device].uuid for device in last]
    for what, order in (("last two", last), ("last two, reversed", last[::-1])):
        place = box.place(order)
        shown = place.environ.get("CUDA_VISIBLE_DEVICES", "CPU workers")
        yield Case(f"CUDA_VISIBLE_DEVICES={shown} ({what})", place, uuids=tuple(uuids))
    yield Case('-n "1:8": all on the second of two', box.place(last), arguments=("-n", "1:8"), uuids=(uuids[1],))


def greedy_tokens(place: Place, model: Path, case: Case | None = None) -> list[list[int]]:
    """Serve a model and give the greedy continuations of all prompts, asked at once, then that of one asked alone.

    Steps of one row have kernels of their own.
    """
    arguments, environ = (case.options(model.parent), case.environ) if case else ((), {})
    server = serving(place, model, *FP32, *arguments, environ=environ)
    with server, Client(server.wait_ready(START_S), silence_timeout_s=60.0) as client:
        streams = [client.stream(ids, max_tokens=NEW_TOKENS, ignore_eos=True) for ids in PROMPTS]
        found = [list(stream.completion().token_ids) for stream in streams]
        alone = client.stream(PROMPTS[ALONE], max_tokens=2 * NEW_TOKENS, ignore_eos=True)
        return [*found, list(alone.completion().token_ids)]


def layout_problems(box: Box, case: Case, model: Path) -> list[str]:
    """Say in what the chosen layout is not the one that the case is about. Only GPUs have the ways that cases name."""
    options = case.options(model.parent)
    layout = plan_of(case.place, "-m", str(model), *FP32, *options, environ=case.environ)
    found = [str(rank["uuid"]) for rank in layout["ranks"]]  # type: ignore[attr-defined]
    problems = []
    if case.uuids and tuple(found) != case.uuids:
        problems.append(f"ranks have {found}, not {list(case.uuids)}")
    wanted = {"mode": case.mode, "transport": case.transport, "stage_transport": case.stage_transport}
    ways = ("mode",) if box.kind != "gpus" else tuple(wanted)
    return problems + [
        f"{key} {layout[key]}, not {wanted[key]}" for key in ways if wanted[key] not in ("", layout[key])
    ]


def differing(expected: list[list[int]], found: list[list[int]]) -> list[str]:
    """Name the prompts whose tokens differ, and from which token on."""
    texts = []
    for prompt, one, other in zip([*PROMPTS, PROMPTS[ALONE]], expected, found, strict=True):
        if one != other:
            same = next((i for i, pair in enumerate(zip(one, other, strict=False)) if pair[0] != pair[1]), len(other))
            texts.append(f"prompt of {len(prompt)}: token {same}")
    return texts


def run(box: Box, report: Report, folder: Path, at_once: int = 1, pattern: str = "") -> None:
    """Compare every layout with one device, ``at_once`` servers side by side; then ask for what must be refused.

    Only cases whose name has ``pattern``, a regular expression, are compared.
    """
    models = {
        "own KV heads": write_weights(folder / "own", TINY),
        "2 KV heads": write_weights(folder / "few", TINY_FEW_KV),
        "experts": write_weights(folder / "experts", TINY_EXPERTS),
    }
    if box.size < 2:
        report.skip(SECTION, "every layout", "one device: nothing to compare")
    every = [*cases(box), *sum_cases(box), *unequal_cases(box)] if box.size >= 2 else []
    chosen = [case for case in every if re.search(pattern, case.what)]
    with ThreadPoolExecutor(at_once) as pool:
        expected = {
            name: pool.submit(greedy_tokens, box.first(1), models[name])
            for name in dict.fromkeys(case.model for case in chosen)
        }
        for first in range(0, len(chosen), at_once):
            some = [case for case in chosen[first : first + at_once] if report.has_time(SECTION, case.what)]
            answers = [(case, pool.submit(examine, box, case, models[case.model])) for case in some]
            for case, answer in answers:
                compare(report, case, expected[case.model], answer)
    refusals(box, report, models["own KV heads"])


def examine(box: Box, case: Case, model: Path) -> tuple[list[str], list[list[int]]]:
    """Return what is wrong with the layout of a case, and its tokens."""
    return layout_problems(box, case, model), greedy_tokens(case.place, model, case)


def compare(
    report: Report,
    case: Case,
    expected: "Future[list[list[int]]]",
    answer: "Future[tuple[list[str], list[list[int]]]]",
) -> None:
    """Report whether a case gave the tokens of one device."""
    wanted = f"{len(PROMPTS)} x {NEW_TOKENS} tokens of one device"
    with report.guard(SECTION, case.what, wanted):
        problems, found = answer.result()
        problems += differing(expected.result(), found)
        report.check(SECTION, case.what, wanted, "; ".join(problems) or "equal", not problems)


def refusals(box: Box, report: Report, model: Path) -> None:
    """Check exit status and text of commands that must not start anything."""
    asked = "8 heads on 3 devices"
    if box.size < 3:
        report.skip(SECTION, asked, f"{box.size} devices")
    else:
        sizes, use = r"Compatible sizes: 1, 2, 4, 8\b", r"CUDA_VISIBLE_DEVICES=\S+ \(or --tp 2\)|--workers 2"
        by_size = ("--tp", "3") if box.kind == "shared" else ()  # without NCCL they would be layer-mapped
        refuse(report, asked, box.first(3), model, by_size, (r"8 query heads % 3 = 2", sizes, use))
    two = box.first(min(2, box.size))
    every = (
        ("a map of 7 of 8 layers", ("-n", "0:7"), ("add up to 7", "8 layers")),
        ("a map and --tp", ("-n", "0:8", "--tp", "1"), ("contradict",)),
        ("a device that is not there", ("-n", "0:4;99:4"), ("not visible", "visible ordinals")),
        ("--tp 64", ("--tp", "64"), ("can be used", "compatible sizes")),
    )
    for what, arguments, texts in every:
        refuse(report, what, two, model, arguments, texts)


def refuse(
    report: Report, what: str, place: Place, model: Path, arguments: tuple[str, ...], texts: tuple[str, ...]
) -> None:
    wanted = "refused, with the way out"
    with report.guard(SECTION, what, wanted):
        answer = run_command("serve", place, "-m", str(model), *FP32, *arguments)
        missing = [text for text in texts if not re.search(text, " ".join(answer.output.split()))]
        good = answer.status != 0 and not missing and "Traceback" not in answer.output
        found = f"status {answer.status}" + (f", without {missing}" if missing else ", as it must be")
        report.check(SECTION, what, wanted, found, good, answer.output)
