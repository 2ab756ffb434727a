"""Check what a server needs of the machine besides GPUs: limits, folders, memory."""

import os
import platform
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

import psutil

import mgpu
from mgpu.launch.completion import hub_cache
from mgpu.launch.doctor.finding import Finding, fail, ok, warn
from mgpu.launch.pages.versions import installed
from mgpu.launch.prepare.preflight import LEAST_FILES
from mgpu.orchestrator.errors import UserError
from mgpu.orchestrator.host.runtime_dir import RuntimeDir
from mgpu.orchestrator.placement.machine.control_groups import cpu_quota, memory_limits
from mgpu.orchestrator.processes.task_limits import TASKS_NEEDED, least_task_limit
from mgpu.protocol.cache_root import cache_root

GIB = 1 << 30
LOW_MEMORY = 2 * GIB
LOW_DISK = 20 * GIB
LOW_SHARED_MEMORY = 256 << 20
"""NCCL keeps about 10 MiB there for each pair of GPUs of a process that talk by it; Docker's default is 64 MiB."""
GOOD_FILES = 4096
LOW_MEMLOCK = 8 << 20
_OPTIONAL = {"gguf": "GGUF files with quantized tensors", "huggingface_hub": "models of the hub"}


def check_software() -> Iterator[Finding]:
    """Check Python and the packages."""
    yield ok("software", f"mgpu {mgpu.__version__}, Python {platform.python_version()}, torch {installed('torch')}")
    if installed("torch") == "not installed":
        yield fail("software", "torch is not installed, so no worker can run", "pip install torch")
    for name, use in _OPTIONAL.items():
        if installed(name) == "not installed":
            yield warn("software", f"the package {name} is not installed: no {use}", f"pip install {name}")


def check_limits(cuda: bool) -> Iterator[Finding]:
    """Check the limits of this user's processes, which `serve` inherits."""
    yield _files(*resource.getrlimit(resource.RLIMIT_NOFILE))
    limit = least_task_limit()
    if limit is None:
        yield ok("processes", "no limit")
    elif limit.left < TASKS_NEEDED:
        level = fail if limit.left < TASKS_NEEDED // 4 else warn
        yield level(
            "processes",
            f"{limit.name} allows {limit.most} processes and threads, and {limit.used} run already",
            f"a server starts some hundreds of threads: {limit.way_out}",
        )
    else:
        yield ok("processes", f"{limit.name} allows {limit.most} processes and threads, {limit.used} run")
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if cuda and locked != resource.RLIM_INFINITY and locked < LOW_MEMLOCK:
        yield warn(
            "locked memory",
            f"a process may lock {locked >> 10} KiB; some drivers need more for memory that GPUs read",
            "ulimit -l unlimited, LimitMEMLOCK=infinity in a unit, --ulimit memlock=-1 for a container",
        )
    else:
        amount = "no limit" if locked == resource.RLIM_INFINITY else f"{locked >> 10} KiB"
        yield ok("locked memory", amount)


def _files(soft: int, hard: int) -> Finding:
    most = hard if hard != resource.RLIM_INFINITY else 1 << 30
    if most < LEAST_FILES:
        return fail(
            "open files",
            f"a process may have {most} open files, and a server needs {LEAST_FILES}",
            "ulimit -n 4096, LimitNOFILE=4096 in a unit, --ulimit nofile=4096 for a container",
        )
    if soft < GOOD_FILES and most < GOOD_FILES:
        return warn(
            "open files",
            f"a process may have {most} open files; each client needs one or two",
            "for more clients: ulimit -n 4096, LimitNOFILE=4096 in a unit",
        )
    return ok("open files", f"{soft:,} (at most {'unlimited' if hard == resource.RLIM_INFINITY else f'{hard:,}'})")


def check_shared_memory(num_gpus: int, folder: Path = Path("/dev/shm")) -> Iterator[Finding]:
    """Check /dev/shm, which NCCL uses between GPUs. mgpu's own shared memory needs no folder."""
    try:
        facts = os.statvfs(folder)
    except OSError as error:
        text, free = f"{folder} cannot be used: {error.strerror}", -1
    else:
        free = facts.f_bavail * facts.f_frsize
        text = f"{folder} has {free / GIB:.2f} GiB free"
        if facts.f_flag & os.ST_RDONLY:
            text, free = f"{folder} is read-only", -1
    if num_gpus < 2:
        yield ok("shared memory", f"{text}; only NCCL between GPUs needs it")
    elif free < LOW_SHARED_MEMORY:
        yield warn("shared memory", f"{text}; NCCL may need it", "start the container with --shm-size=1g or --ipc=host")
    else:
        yield ok("shared memory", text)


def check_memory(root: Path = Path("/")) -> Iterator[Finding]:
    """Check memory and CPU time, and the limits of control groups on them."""
    memory = psutil.virtual_memory()
    total, free = int(memory.total), int(memory.available)
    limits = memory_limits(root)
    least = min((each for each in limits if each.limit_bytes < total), key=lambda each: each.limit_bytes, default=None)
    if least is not None:
        free = min([free, *(max(0, each.limit_bytes - each.used_bytes) for each in limits)])
        text = f"{free / GIB:.1f} GiB free of the {least.limit_bytes / GIB:.1f} GiB that a control group allows"
        text += f" (the machine has {total / GIB:.1f})"
    else:
        text = f"{free / GIB:.1f} of {total / GIB:.1f} GiB free, no limit of a control group"
    if free < LOW_MEMORY:
        yield warn("memory", text, "each worker takes about 1 GiB of it; raise MemoryMax= or --memory, or free some")
    else:
        yield ok("memory", text)
    cores, quota = len(os.sched_getaffinity(0)), cpu_quota(root)
    text = f"{cores} cores" + ("" if quota is None else f", of which a control group allows the time of {quota:g}")
    if quota is not None and quota < 1:
        yield warn("CPU", text, "the gateway and the engine need a core; raise CPUQuota= or --cpus")
    else:
        yield ok("CPU", text)


def check_folders(environ: Mapping[str, str]) -> Iterator[Finding]:
    """Check the folders of models, and the one that holds the sockets of servers."""
    for what, folder in (("cache", cache_root(environ)), ("hub cache", hub_cache(environ))):
        yield _cache(what, folder)
    try:
        with RuntimeDir(environ) as runtime:
            yield ok("runtime folder", str(runtime.base))
    except (UserError, OSError) as error:
        yield fail("runtime folder", str(error), "MGPU_RUNTIME_DIR=/a/short/path/that/you/can/write/to")


def _cache(what: str, folder: Path) -> Finding:
    here = next((each for each in (folder, *folder.parents) if each.exists()), Path("/"))
    if not os.access(here, os.W_OK | os.X_OK) or not here.is_dir():
        variable = "MGPU_CACHE" if what == "cache" else "HF_HOME"
        return warn(
            what, f"{folder} cannot be written to: nothing can be downloaded", f"set {variable}=/another/folder"
        )
    free = shutil.disk_usage(here).free
    text = f"{folder}: {free / GIB:.1f} GiB free"
    return warn(what, text, "a model of 8B parameters takes 16 GB") if free < LOW_DISK else ok(what, text)
