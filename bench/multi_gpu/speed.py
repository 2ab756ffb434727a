"""Speed of the three model shapes: tensor parallelism by size, then against layer mapping and against replicas."""

import shutil
import statistics
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.model_shapes import SHAPES, SMALL_SHAPES, write_config, write_weights
from bench.multi_gpu.box import START_S, Box, Place, plan_of, serving
from bench.multi_gpu.report import Report
from mgpu import Client
from mgpu.launch.bench.probe import Probe
from mgpu.orchestrator.placement.split.layer_map import even_stages, map_text
from mgpu.protocol.checkpoint.read import read_checkpoint

SECTION = "speed"
DECODE_TARGETS = {
    ("8B", 1): 240.0, ("8B", 2): 390.0, ("8B", 4): 620.0, ("8B", 8): 800.0,
    ("32B", 4): 180.0,
    ("70B", 4): 92.0, ("70B", 8): 150.0,
}  # fmt: skip
"""Tokens per second of one stream in bf16 on H200, by model and tensor-parallel size."""
READY_TARGETS_S = {"70B": 40.0}
"""Seconds from start to ready, weights in the page cache."""
SILENCE_S = 60.0
"""Longest wait for a server to say something, or for other servers to come to the same measurement."""
FORMATS = {"fp8": ("--quant", "fp8"), "int4": ("--quant", "4")}


@dataclass(frozen=True, slots=True)
class Effort:
    """How much is measured."""

    batches: tuple[int, ...]
    context: int
    seconds: float
    repeat: int
    prefill: tuple[int, int]
    """How many prompts at once, and how long each is."""


REAL = Effort((1, 64, 256), 128, 1.5, 3, (16, 2048))
REHEARSED = Effort((1, 4, 8), 16, 0.1, 1, (2, 64))


@dataclass(frozen=True)
class Model:
    """One shape in a folder of its own."""

    name: str
    folder: Path
    vocab_size: int
    num_layers: int


class Speed:
    """Everything that is measured of speed, on one box."""

    def __init__(self, box: Box, report: Report, folder: Path, names: Sequence[str], sizes: Sequence[int]) -> None:
        self.box = box
        self.report = report
        self.folder = folder
        self.effort = REHEARSED if report.rehearsal else REAL
        self.sizes = [size for size in box.sizes if size in sizes]
        self.shapes = SMALL_SHAPES if box.kind == "cpu" else SHAPES
        self.models = [self._model(name) for name in names]

    def _model(self, name: str) -> Model:
        folder = write_config(self.folder / name, self.shapes[name])
        facts = read_checkpoint(folder, "dummy").facts
        return Model(name, folder, facts.vocab_size, facts.num_layers)

    def run(self) -> None:
        """Measure what has targets first."""
        for model in self.models:
            for size in reversed(self.sizes):
                self.tensor_parallel(model, size)
        for model in self.models:
            if (count := max(self.sizes, default=1)) > 1:
                self.layer_mapped(model, count)
                self.replicas(model, count)
            self.formats(model)

    def tensor_parallel(self, model: Model, size: int) -> None:
        by_size = () if self.box.kind == "gpus" else ("--tp", str(size))
        self._measure(model, f"{model.name} TP {size}", self.box.first(size), by_size,
                      DECODE_TARGETS.get((model.name, size)))  # fmt: skip

    def layer_mapped(self, model: Model, count: int) -> None:
        """Batch 1 keeps one stage busy at a time; larger batches go round in as many parts as there are stages."""
        layers = map_text(even_stages(model.num_layers, range(count)))
        self._measure(model, f"{model.name} {count} stages", self.box.first(count), ("-n", layers))

    def formats(self, model: Model) -> None:
        """Measure the quantized forms at every size."""
        for name, options in FORMATS.items():
            for size in reversed(self.sizes):
                by_size = () if self.box.kind == "gpus" else ("--tp", str(size))
                self._measure(model, f"{model.name} {name} TP {size}", self.box.first(size), (*options, *by_size))

    def _measure(
        self, model: Model, what: str, place: Place, options: tuple[str, ...], target: float | None = None
    ) -> None:
        if not self._can_run(what, place, model, options):
            return
        with self.report.guard(SECTION, what):
            began_s = time.monotonic()
            with serving(place, model.folder, *self._options(), *options) as server:
                endpoint = server.wait_ready(START_S)
                self.report.number(SECTION, f"{what}, ready (random weights)", time.monotonic() - began_s, "s")
                self._decode(what, model, [endpoint], self.effort.batches, target)
                self._prefill(what, model, endpoint)

    def _options(self) -> tuple[str, ...]:
        return "--load-format", "dummy", "--max-seq-len", "4096"

    def _can_run(self, what: str, place: Place, model: Model, options: tuple[str, ...]) -> bool:
        if not self.report.has_time(SECTION, what):
            return False
        try:
            plan_of(place, "-m", str(model.folder), "--max-seq-len", "4096", *options)
        except ValueError as error:
            self.report.skip(SECTION, what, str(error))
            return False
        return True

    def _decode(
        self, what: str, model: Model, endpoints: Sequence[str], batches: Sequence[int], target: float | None = None
    ) -> None:
        """Measure decoding, each server with its share of the batch, all at once."""
        for batch in batches:
            asked = f"{what}, decode, batch {batch}"
            with self.report.guard(SECTION, asked):
                rate = self._decode_rate(model, endpoints, batch)
                self.report.number(SECTION, asked, rate, "tok/s", least=target if batch == 1 else None)

    def _decode_rate(self, model: Model, endpoints: Sequence[str], batch: int) -> float:
        """Return tokens per second of all servers together, the median of the repetitions."""
        effort, share, together = self.effort, batch // len(endpoints), threading.Barrier(len(endpoints))

        def measure(endpoint: str) -> list[float]:
            with ExitStack() as stack:
                stack.callback(together.abort)  # whoever fails must not be waited for; at the end nobody waits
                client = stack.enter_context(Client(endpoint, silence_timeout_s=SILENCE_S))  # of this thread alone
                bench = Probe(client, model.vocab_size, seed=batch)
                bench.decode_rate(share, effort.context, 0.0)  # the first use of a batch size makes its graph
                rates = []
                for _ in range(effort.repeat):
                    together.wait(SILENCE_S)
                    rates.append(bench.decode_rate(share, effort.context, effort.seconds)[0])
                return rates

        with ThreadPoolExecutor(len(endpoints)) as pool:
            by_server = list(pool.map(measure, endpoints))
        return float(statistics.median(sum(rates) for rates in zip(*by_server, strict=True)))

    def _prefill(self, what: str, model: Model, endpoint: str) -> None:
        count, length = self.effort.prefill
        with Client(endpoint, silence_timeout_s=SILENCE_S) as client:
            bench = Probe(client, model.vocab_size, seed=3)
            rates = [bench.prefill_rate(count, length) for _ in range(self.effort.repeat + 1)][1:]
        self.report.number(SECTION, f"{what}, prefill {count} x {length}", statistics.median(rates), "tok/s")

    def replicas(self, model: Model, count: int) -> None:
        """Measure as many whole models as there are devices, each with its share of the batch."""
        what = f"{model.name} {count} replicas"
        if self.box.kind == "shared":
            self.report.skip(SECTION, what, "each takes a whole GPU, and they share one")
            return
        places = [self.box.place([device]) for device in range(count)]
        if not self._can_run(what, places[0], model, ()):
            return
        with self.report.guard(SECTION, what), ExitStack() as stack:
            began_s = time.monotonic()
            servers = [stack.enter_context(serving(place, model.folder, *self._options())) for place in places]
            endpoints = [server.wait_ready(START_S) for server in servers]
            self.report.number(SECTION, f"{what}, all ready (random weights)", time.monotonic() - began_s, "s")
            self._decode(what, model, endpoints, [batch for batch in self.effort.batches if batch >= count])

    def ready_from_page_cache(self, names: Sequence[str]) -> None:
        """Write the weights of shapes to the disk, which leaves them in the page cache, and start from them."""
        for model in (model for model in self.models if model.name in names):
            size = max(self.sizes, default=1)
            what = f"{model.name} TP {size}, ready from page cache"
            by_size = () if self.box.kind == "gpus" else ("--tp", str(size))
            if not self._can_run(what, self.box.first(size), model, by_size):
                continue
            needed = sum(entry.nbytes for entry in read_checkpoint(model.folder, "dummy").tensors.values())
            if (free := shutil.disk_usage(self.folder).free) < 1.05 * needed:
                self.report.skip(SECTION, what, f"{needed / 1e9:.0f} GB of weights, {free / 1e9:.0f} GB of disk")
                continue
            with self.report.guard(SECTION, what):
                folder = write_weights(self.folder / f"{model.name}-weights", self.shapes[model.name])
                began_s = time.monotonic()
                with serving(self.box.first(size), folder, "--max-seq-len", "4096", *by_size) as server:
                    server.wait_ready(START_S)
                    self.report.number(SECTION, what, time.monotonic() - began_s, "s",
                                       most=READY_TARGETS_S.get(model.name))  # fmt: skip
                shutil.rmtree(folder)
