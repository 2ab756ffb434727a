"""Check driver, GPUs, what torch sees of them, and all-reduce between every pair."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from mgpu.launch.doctor.finding import Finding, fail, ok, warn
from mgpu.launch.doctor.probes import Answer, Probe, Trial, run_groups
from mgpu.launch.pages.versions import torch_cuda, torch_nccl
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.placement.machine.devices import DeviceInfo, Machine, find_machine, worker_environment
from mgpu.orchestrator.placement.machine.nvml import Nvml, NvmlSession
from mgpu.orchestrator.placement.machine.pair_check import NotTried, announced_pairs, try_pairs, write_record

GIB = 1 << 30
_USED_SHARE = 0.1
"""Of a GPU's memory; more is used by other processes, so less is left for a model."""
_NVIDIA_DEVICE = Path("/dev/nvidiactl")


def check_driver(environ: Mapping[str, str], nvml: Nvml | None = None) -> tuple[list[Finding], Machine | None]:
    """Check the driver and the visible GPUs; return them too, or None if there are none that can be used."""
    found: list[Finding] = []
    try:
        with NvmlSession(nvml) as session:
            inventory = session.inventory()
            version = session.driver_version()
        if not inventory.gpus:
            return [_no_gpu(inventory.problem)], None
        found += [ok("driver", version), *_cuda_versions(version)]
        machine = find_machine("auto", environ=environ, nvml=nvml)
    except UserError as error:
        return [*found, fail("GPUs", str(error), "see nvidia-smi and dmesg; a reset or a reboot may help")], None
    if machine.kind == "cpu":
        return [*found, warn("GPUs", "; ".join(machine.notes), "unset CUDA_VISIBLE_DEVICES, or name GPUs in it")], None
    return [*found, *map(_gpu, machine.devices)], machine


def _no_gpu(problem: str) -> Finding:
    if _NVIDIA_DEVICE.exists():
        advice = "the driver's device files are here: install its libraries, or start the container with --gpus all"
        return fail("driver", problem, advice)
    return ok("driver", f"no GPU ({problem}); servers run on the CPU")


def _cuda_versions(driver: str) -> Iterator[Finding]:
    built_for = torch_cuda()
    newest = driver.rpartition(" ")[2]
    if built_for[:1].isdigit() and newest[:1].isdigit() and int(newest.split(".")[0]) < int(built_for.split(".")[0]):
        yield fail(
            "CUDA",
            f"torch is built for CUDA {built_for}, and this driver runs CUDA up to {newest}",
            "install a newer driver, or a torch that is built for an older CUDA",
        )
    elif not built_for[:1].isdigit():
        yield fail("CUDA", f"CUDA of torch: {built_for}", "install a torch that is built for CUDA, see pytorch.org")
    else:
        yield ok("CUDA", f"torch is built for {built_for}, NCCL {torch_nccl()}")


def _gpu(device: DeviceInfo) -> Finding:
    used = device.total_bytes - device.free_bytes
    text = f"{device.name}, {device.free_bytes / GIB:.1f} of {device.total_bytes / GIB:.1f} GiB free"
    if used > device.total_bytes * _USED_SHARE:
        return warn(f"GPU {device.ordinal}", text, "other processes use it: see nvidia-smi")
    return ok(f"GPU {device.ordinal}", text)


def check_links(machine: Machine) -> Iterator[Finding]:
    """Check how GPUs reach each other's memory."""
    kinds: dict[str, list[str]] = {}
    for a, b in itertools.combinations(range(len(machine.devices)), 2):
        kind: str = machine.links[a][b] if machine.peers(a, b) else "none"
        kinds.setdefault(kind, []).append(f"{a}-{b}")
    for kind, pairs in kinds.items():
        if kind == "none":
            yield warn(
                "peer access",
                f"none between GPUs {', '.join(pairs)}: data goes through the host",
                "works, but slower; virtual machines and IOMMU or ACS settings often forbid it",
            )
        else:
            yield ok("peer access", f"{'NVLink' if kind == 'nvlink' else 'PCIe'} between GPUs {', '.join(pairs)}")


def check_peer_memory(machine: Machine, environ: Mapping[str, str], record: Path | None) -> Iterator[Finding]:
    """Check that data arrives as it was sent where the driver announces peer access; servers believe ``record``."""
    pairs = announced_pairs(machine, range(len(machine.devices)))
    if not pairs:
        return
    try:
        verdicts = try_pairs(machine, pairs, environ)
    except NotTried as reason:
        yield warn("peer memory", f"not tried: {reason}", "servers believe the driver then")
        return
    write_record(record, machine, verdicts)
    broken = {pair: problem for pair, problem in verdicts.items() if problem}
    for (a, b), problem in broken.items():
        yield fail(
            "peer memory",
            f"peer access between GPUs {a} and {b} is announced and does not work: {problem}",
            "servers send their data through host memory, which is slower; turn off the IOMMU or ACS",
        )
    if good := [f"{a}-{b}" for a, b in pairs if (a, b) not in broken]:
        yield ok("peer memory", f"data arrives as sent, both ways under load, between GPUs {', '.join(good)}")


def check_torch(machine: Machine | None, trial: Trial) -> Iterator[Finding]:
    """Check that torch can be imported and computes on every visible GPU."""
    settings = _environment(machine, 0, trial)[1] if machine else {**trial.environ, "CUDA_VISIBLE_DEVICES": ""}
    [[answer]] = run_groups([[Probe(("devices",), settings)]], trial)
    if answer.problem:
        yield fail("torch", answer.problem, "try: python -c 'import torch; print(torch.cuda.is_available())'")
        return
    devices = answer.values["devices"]
    wanted = 1 if machine and machine.devices[0].uuid.startswith("MIG-") else len(machine.devices) if machine else 0
    if len(devices) != wanted:
        yield fail(
            "torch",
            f"torch {answer.values['torch']} sees {len(devices)} GPUs, the driver {wanted}",
            "install a torch that is built for CUDA, and see that /dev/nvidia* may be opened",
        )
    elif wrong := [str(index) for index, each in enumerate(devices) if not each["product_is_right"]]:
        yield fail("torch", f"GPU {', '.join(wrong)} computes wrong products", "it may be defective: dcgmi diag -r 3")
    else:
        yield ok("torch", f"{answer.values['torch']} computes right on {f'{wanted} GPUs' if wanted else 'the CPU'}")


def check_pairs(machine: Machine | None, trial: Trial) -> Iterator[Finding]:
    """Check that every pair of GPUs adds random numbers up by NCCL; without GPUs, two CPU processes by gloo."""
    if machine is None:
        settings = {**trial.environ, "CUDA_VISIBLE_DEVICES": ""}
        [answers] = run_groups([_pair("gloo", [("cpu", settings)] * 2, "pair", trial)], trial)
        yield _pair_finding("gloo", "between two CPU processes", answers)
    elif machine.nccl_problem:
        yield ok("NCCL", f"not tried: {machine.nccl_problem}")
    elif len(machine.devices) == 1:
        yield ok("NCCL", "not needed: one GPU")
    else:
        places = [_environment(machine, device.ordinal, trial) for device in machine.devices]
        for pairs in rounds(len(places)):
            groups = [_pair("nccl", [places[a], places[b]], f"pair-{a}-{b}", trial) for a, b in pairs]
            for (a, b), answers in zip(pairs, run_groups(groups, trial), strict=True):
                yield _pair_finding("NCCL", f"between GPUs {a} and {b}", answers)


def rounds(count: int) -> list[list[tuple[int, int]]]:
    """Return all pairs of ``count`` players in rounds in which nobody plays twice, so that a round runs at once."""
    players = list(range(count + count % 2))  # of an odd number, one pauses in each round
    found = []
    for _ in players[1:]:
        half = len(players) // 2
        pairs = [(min(a, b), max(a, b)) for a, b in zip(players[:half], reversed(players[half:]), strict=True)]
        found.append(sorted(pair for pair in pairs if pair[1] < count))
        players.insert(1, players.pop())
    return found


def _environment(machine: Machine, ordinal: int, trial: Trial) -> tuple[str, dict[str, str]]:
    added, device = worker_environment(machine, ordinal)
    return device, {**trial.environ, "NCCL_DEBUG": "WARN", **added}


def _pair(backend: str, places: Sequence[tuple[str, dict[str, str]]], name: str, trial: Trial) -> list[Probe]:
    rendezvous = trial.folder / name
    rendezvous.unlink(missing_ok=True)
    common = ("--backend", backend, "--rendezvous", str(rendezvous), "--timeout", f"{trial.deadline_s:g}")
    return [
        Probe(("pair", *common, "--device", device, "--rank", str(rank)), settings)
        for rank, (device, settings) in enumerate(places)
    ]


def _pair_finding(check: str, where: str, answers: list[Answer]) -> Finding:
    problems = [answer.problem for answer in answers if answer.problem]
    if problems or not all(answer.values for answer in answers):
        advice = "MGPU_NO_NCCL=1 serves without it" if check == "NCCL" else "see that the loopback interface is up"
        return fail(check, f"no all-reduce {where}: {problems[0] if problems else 'it ended'}", advice)
    if wrong := sorted({size for answer in answers for size in answer.values["wrong"]}):
        return fail(
            check,
            f"wrong sums {where}, of {', '.join(map(str, wrong))} numbers",
            "peer access damages data: set NCCL_P2P_DISABLE=1 and MGPU_NO_P2P=1, or turn off the IOMMU or ACS",
        )
    return ok(check, f"right sums {where}, {min(answer.values['bytes_per_s'] for answer in answers) / 1e9:.1f} GB/s")
