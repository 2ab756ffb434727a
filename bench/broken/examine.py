"""Serve a broken model as far as that goes without processes: read it, plan for it, load it; say what was wrong."""

import shutil
import time
import traceback
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from bench.broken.breakages import Breakage
from bench.broken.models import Model, write_model
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.placement.machine.devices import DeviceInfo, Machine
from mgpu.orchestrator.placement.planner import LayoutOptions, plan
from mgpu.protocol.checkpoint.read import Checkpoint, CheckpointError, read_checkpoint
from mgpu.protocol.model.placement import RankPlace
from mgpu.worker.models.build import build_stage, load_weights
from mgpu.worker.ranks.collectives import SingleRank

MOST_S = 5.0
"""CPU time for one broken model: many times what a busy machine needs."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Verdict:
    """How a broken model was received. ``problem``: why that is wrong; empty if it is right."""

    refusal: str
    was_loaded: bool
    problem: str


def examine(model: Model, breakage: Breakage, folder: Path) -> Verdict:
    """Break a model in an empty folder, which is emptied again."""
    began_s = time.process_time()
    refusal, was_loaded, problem = "", False, ""
    try:
        path = write_model(breakage.change(model), folder)
        breakage.spoil(folder)
        checkpoint = read_checkpoint(path)
        _plan(checkpoint)
        was_loaded = True
        _load(checkpoint)
    except (CheckpointError, UserError) as error:
        refusal = str(error)
    except Exception:  # a crash is what is looked for
        problem = traceback.format_exc(limit=-4)
    finally:
        for each in folder.iterdir():
            each.unlink() if each.is_file() else shutil.rmtree(each)
    took_s = time.process_time() - began_s
    if not problem and took_s > MOST_S:
        problem = f"took {took_s:.1f} s of CPU time"
    if not problem and not refusal and breakage.is_fatal:
        problem = "was loaded as if it were whole"
    if not problem and refusal and (missing := _unnamed(refusal, breakage, folder)):
        problem = f"the refusal does not name {missing}: {refusal}"
    return Verdict(refusal, was_loaded, problem)


def _unnamed(refusal: str, breakage: Breakage, folder: Path) -> str:
    """Return what a refusal should name and does not: the file or the folder, and the tensor."""
    if str(folder) not in refusal:
        return "its file"
    return breakage.tensor if breakage.tensor not in refusal else ""


def _plan(checkpoint: Checkpoint) -> None:
    """Plan for GPUs and CPU workers, several sizes each; a size may be refused."""
    for kind in ("cuda", "cpu"):
        for count in (1, 2, 4):
            devices = tuple(
                DeviceInfo(at, kind, f"{kind} {at}", 8 << 30, 8 << 30, capability=(9, 0) if kind == "cuda" else None)  # type: ignore[arg-type]
                for at in range(count)
            )
            links = tuple(tuple("self" if a == b else "none" for b in range(count)) for a in range(count))
            with suppress(UserError):
                plan(checkpoint.facts, Machine(devices, links, "", True), LayoutOptions(tp=count))  # type: ignore[arg-type]


def _load(checkpoint: Checkpoint) -> None:
    """Load the weights packed, as on a GPU, and a GGUF file also widened, as on a CPU."""
    kinds = [checkpoint.facts]
    if checkpoint.source.format == "gguf" and checkpoint.facts.formats:
        kinds.append(replace(checkpoint.facts, formats=()))
    for facts in kinds:
        place = RankPlace(0, 0, 0, 1, 0)
        stage = build_stage(facts, place, range(facts.num_layers), SingleRank(), torch.float32, _CPU)
        load_weights(stage, replace(checkpoint, facts=facts), lambda count: None)
