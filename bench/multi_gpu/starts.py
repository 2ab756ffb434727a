"""Time whole servers on several GPUs: from start to ready, from the death of a rank to ready again, and their rates.

    python -m bench.multi_gpu.starts --case "TP 2=" --case "TP 2 fp8=--quant fp8"           # seconds until ready
    python -m bench.multi_gpu.starts --case "TP 2=--standby" --kills 2 --save FILE          # and to recover
    python -m bench.multi_gpu.starts --case "NCCL=MGPU_PEER_REDUCE=0" --rows 1,64 --prefill # and tokens per second
    python -m bench.multi_gpu.starts --case "two=--tp 2" --kills 1 --rows 1 --rehearse      # CPU workers, a small model

A case is a name and what follows `mgpu-launch serve`, variables first. Weights are random. A rank is killed while a
stream runs, and again only once the processes of the next start, if there are any, wait for their turn.
"""

import argparse
import re
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

from bench.model_shapes import SHAPES, SMALL_SHAPES, write_config
from bench.multi_gpu.box import START_S, Box, find_box, serving
from bench.options import numbers
from bench.waiting import wait_until
from mgpu import Client
from mgpu.launch.bench.probe import Probe
from mgpu.launch.bench.report import Report
from mgpu.launch.server_process import ServerDied, ServerProcess
from mgpu.protocol.checkpoint.read import read_checkpoint

_PHASES = re.compile(r"(?:ready|recovered) in ([0-9.]+) s.*?\[(.*)\]")
_RECOVERY_S, _SETTLE_S, _STILL_S = 60.0, 25.0, 1.0


@dataclass(frozen=True, slots=True)
class Case:
    """One server to start."""

    name: str
    options: tuple[str, ...]
    environ: dict[str, str]


def read_case(text: str) -> Case:
    """Read ``NAME=VARIABLE=VALUE … --option …``."""
    name, _, rest = text.partition("=")
    words = rest.split()
    variables = [word for word in words if re.fullmatch(r"[A-Z][A-Z0-9_]*=.*", word)]
    options = tuple(word for word in words if word not in variables)
    return Case(name, options, dict(word.split("=", 1) for word in variables))


def workers_of(server: ServerProcess) -> dict[int, psutil.Process]:
    """Return the worker processes of a server by id, those that wait for their turn among them."""
    children = psutil.Process(server.process.pid).children(recursive=True)
    return {child.pid: child for child in children if "mgpu.worker" in child.cmdline()}


def settle(server: ServerProcess, ready: set[int]) -> bool:
    """Wait until the processes of the next start do nothing any more; return whether there are any."""
    if not wait_until(lambda: workers_of(server).keys() - ready, _SETTLE_S):
        return False
    used, since_s, deadline_s = 0.0, time.monotonic(), time.monotonic() + _SETTLE_S
    while time.monotonic() < min(since_s + _STILL_S, deadline_s):
        waiting = [process for pid, process in workers_of(server).items() if pid not in ready]
        now = sum(sum(process.cpu_times()[:2]) for process in waiting)
        if now > used + 0.05:
            used, since_s = now, time.monotonic()
        time.sleep(0.1)
    return True


def phases(server: ServerProcess, which: str) -> tuple[float, str]:
    """Return what the log says of the last start or recovery: seconds, and those of its phases."""
    lines = [line for line in server.output().splitlines() if f"{which} in" in line]
    found = _PHASES.search(lines[-1]) if lines else None
    return (float(found[1]), found[2]) if found else (0.0, "")


def kill(server: ServerProcess, client: Client, turn: int, workers: list[psutil.Process]) -> tuple[float, float]:
    """Kill a rank under a stream; return the seconds until ready again, and the longest pause of the stream."""
    stream = client.stream([5, 6, 7, 8], max_tokens=2000, ignore_eos=True)
    next(stream)
    restarts = client.health().restarts
    last_s, pause_s = time.monotonic(), 0.0
    began_s = last_s
    workers[turn % len(workers)].kill()
    for _ in stream:
        now_s = time.monotonic()
        pause_s, last_s = max(pause_s, now_s - last_s), now_s
        if pause_s > 0.2 or now_s - began_s > _RECOVERY_S:
            break
    stream.close()
    health = client.health()
    if health.restarts <= restarts:
        raise ServerDied("the workers were not replaced", server.output())
    return health.last_recovery_s, pause_s


class Starts:
    """Measures one case after the other."""

    def __init__(self, box: Box, model: Path, report: Report, arguments: argparse.Namespace) -> None:
        self.box = box
        self.model = model
        self.vocab_size = read_checkpoint(model, "dummy").facts.vocab_size
        self.report = report
        self.arguments = arguments

    def run(self, case: Case) -> None:
        """Start a server, ask it, kill its ranks."""
        began_s = time.monotonic()
        options = ("--load-format", "dummy", "--max-seq-len", "4096", *case.options)
        with serving(self.box.first(self.arguments.devices), self.model, *options, environ=case.environ) as server:
            endpoint = server.wait_ready(START_S)
            ready_s = time.monotonic() - began_s
            self._add(case, "ready", ready_s, phases(server, "ready")[1])
            workers = [process for _, process in sorted(workers_of(server).items())]
            with Client(endpoint, silence_timeout_s=_RECOVERY_S) as client:
                self._rates(case, client)
                for turn in range(self.arguments.kills):
                    has_standby = "--no-standby" not in case.options
                    has_standby = has_standby and settle(server, {process.pid for process in workers})
                    seconds, pause_s = kill(server, client, turn, workers)
                    note = f"{phases(server, 'recovered')[1]}; pause {pause_s:.2f} s; standby: {has_standby}"
                    self._add(case, "recovery", seconds, note)
                    workers = self._ready_ones(server, len(workers))
            for line in server.output().splitlines():
                if "partial sums" in line or "layout:" in line:
                    print("     ", line[20:200], flush=True)

    def _ready_ones(self, server: ServerProcess, count: int) -> list[psutil.Process]:
        found = sorted(workers_of(server).items(), key=lambda item: item[1].create_time())
        return [process for _, process in found[:count]]

    def _rates(self, case: Case, client: Client) -> None:
        probe = Probe(client, self.vocab_size, seed=7)
        seconds = 0.1 if self.arguments.rehearse else 1.0
        for batch in self.arguments.rows:
            probe.decode_rate(batch, 128, 0.0)
            self._rate(case, f"batch {batch}", [probe.decode_rate(batch, 128, seconds)[0] for _ in range(3)])
        if self.arguments.prefill:
            prompts = (2, 64) if self.arguments.rehearse else (16, 2048)
            self._rate(case, "prefill {} x {}".format(*prompts), [probe.prefill_rate(*prompts) for _ in range(4)][1:])

    def _rate(self, case: Case, what: str, rates: list[float]) -> None:
        least, middle, most = sorted(rates)
        assert middle == statistics.median(rates)
        self.report.add({"case": case.name, "what": what, "value": round(middle, 1), "least": round(least, 1),
                         "most": round(most, 1), "unit": "tokens/s"})  # fmt: skip

    def _add(self, case: Case, what: str, seconds: float, note: str) -> None:
        options = " ".join([*(f"{name}={value}" for name, value in case.environ.items()), *case.options])
        self.report.add({"case": case.name, "what": what, "value": round(seconds, 2), "unit": "s", "note": note,
                         "options": options})  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", type=read_case, required=True, metavar="NAME=OPTIONS")
    parser.add_argument("--shape", choices=SHAPES, default="8B")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--kills", type=int, default=0, help="how often a rank is killed")
    parser.add_argument("--rows", type=numbers, default=[], help="batches whose rate is measured, such as 1,64")
    parser.add_argument("--prefill", action="store_true", help="measure 16 prompts of 2,048 tokens, too")
    parser.add_argument("--budget", type=float, default=1e9, help="seconds after which no other case is begun")
    parser.add_argument("--save", type=Path)
    parser.add_argument("--rehearse", action="store_true")
    arguments = parser.parse_args()
    box = find_box(arguments.rehearse, arguments.devices, 0)
    shape = (SMALL_SHAPES if box.kind == "cpu" else SHAPES)[arguments.shape]
    packages = "triton", "nvidia-nccl-cu12", "nvidia-nccl-cu13"
    shown = "case", "what", "value", "unit"
    report = Report("starts", "mgpu", shown, arguments.save, *packages, shape=arguments.shape)
    began_s = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        starts = Starts(box, write_config(Path(folder) / "model", shape), report, arguments)
        for case in arguments.case:
            if time.monotonic() - began_s > arguments.budget:
                print(f"{case.name}: left out, no time", flush=True)
                continue
            try:
                starts.run(case)
            except Exception as error:  # the next case can still be measured
                print(f"{case.name}: {type(error).__name__}: {str(error)[-1500:]}", flush=True)


if __name__ == "__main__":
    main()
