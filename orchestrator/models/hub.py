"""Fetch a model of the hub into the local cache: only the files that mgpu needs, resumed, checked, with progress.

huggingface_hub does the transport (addresses, mirrors, proxies, tokens) and gives the layout of the cache. Bytes of
weights come by `hub_transfer.download`, which keeps what it has when it is interrupted. The cache's reference moves to
a new commit only when all its files are there, so a cached model is whole.
"""

import os
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path

from mgpu.orchestrator.errors import HubUnreachable, ModelError
from mgpu.orchestrator.models.download_progress import DownloadProgress, size_text, terminal_of_errors
from mgpu.orchestrator.models.hub_cache import (
    CachedModel,
    find_cached,
    read_weight_map,
    reference_file,
)
from mgpu.orchestrator.models.hub_errors import NotTheHub, may_pass, reason_of
from mgpu.orchestrator.models.hub_files import INDEX, Part, gguf_files, is_gguf_wanted, small_files, weight_files
from mgpu.orchestrator.models.hub_headers import fetch_header
from mgpu.orchestrator.models.hub_listing import Hub, Report, Repository
from mgpu.orchestrator.models.hub_names import HubName
from mgpu.orchestrator.models.hub_transfer import RemoteFile, download, partial_bytes

_AT_ONCE = 4
"""Files that are downloaded at the same time."""
_SPARE_BYTES = 64 << 20
"""Space that a download leaves on the disk."""


def fetch_model(name: HubName, part: Part, report: Report, offline: bool = False) -> CachedModel:
    """Return a model, from the local cache if the hub fails or must not be asked.

    HubUnreachable when the hub may answer later, else ModelError.
    """
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    if offline or constants.HF_HUB_OFFLINE:
        try:
            return find_cached(cache, name, part)
        except ModelError as error:
            raise ModelError(f"{error}. The hub is not asked: --offline or HF_HUB_OFFLINE is set") from error
    report(f"looking up {name} on the hub")
    try:
        return _Fetch(cache, name, report, _has(cache, name, part)).run(part)
    except Exception as error:  # proxies, addresses and servers fail in the HTTP library's own ways
        return _cached_instead(cache, name, part, report, error)


def fetch_file(name: HubName, sha256: str, target: Path, report: Report) -> None:
    """Download one file that is known beforehand to ``target``. ModelError if the hub lists another file there."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        raise ModelError("HF_HUB_OFFLINE is set")
    _Fetch(target.parent, name, report, has_cached=True).bring_file(sha256, target)


def _has(cache: Path, name: HubName, part: Part) -> bool:
    try:
        find_cached(cache, name, part)
    except ModelError:
        return False
    return True


def _cached_instead(cache: Path, name: HubName, part: Part, report: Report, error: Exception) -> CachedModel:
    """Return the model of the cache, and say why. Raise the error of the hub if there is none."""
    if isinstance(error, ModelError) and not isinstance(error, HubUnreachable):
        raise error
    reason = reason_of(name, error)
    try:
        cached = find_cached(cache, name, part)
    except ModelError:
        kind = HubUnreachable if may_pass(error) else ModelError
        raise kind(f"{name}: not a folder here, and the hub did not give it: {reason}") from error
    report(f"{name}: taken from the hub cache at revision {cached.revision[:12]}, because the hub failed: {reason}")
    return cached


class _Fetch:
    """One attempt to bring a model here."""

    def __init__(self, cache: Path, name: HubName, report: Report, has_cached: bool) -> None:
        self._cache, self._name, self._report = cache, name, report
        self._hub = Hub(name, report, tries=0 if has_cached else 2)  # a cached model need not wait for more
        self._is_cancelled = threading.Event()

    def run(self, part: Part) -> CachedModel:
        repository = self._hub.describe(self._cache)
        if is_gguf_wanted(self._name, repository.files):
            sizes = {file.name: file.size for file in repository.files.values()}
            wanted = gguf_files(self._name, repository.files, sizes)
            if part == "config" and not all((repository.snapshot / path).is_file() for path in wanted):
                return CachedModel(self._bring_headers(repository, wanted), repository.commit)
            self._bring(repository, wanted)
            found = repository.snapshot / wanted[0]
        else:
            self._bring(repository, small_files(self._name, repository.files, part))
            if part == "all":
                index = repository.snapshot / INDEX
                weight_map = read_weight_map(index) if index.is_file() else None
                self._bring(repository, weight_files(self._name, repository.files, weight_map))
            found = repository.snapshot
        self._note_commit(repository)
        return CachedModel(found, repository.commit)

    def bring_file(self, sha256: str, target: Path) -> None:
        """Download the file of the name to ``target``, in place of what is there."""
        file = self._hub.describe(self._cache).files.get(self._name.file)
        if file is None or file.sha256 != sha256:
            raise ModelError(f"{self._name}: the hub has another file")
        scratch = target.with_name(f".{target.name}.hub")
        progress = DownloadProgress(target.name, file.size, self._report, terminal_of_errors())
        progress.skip(partial_bytes(scratch, file.size))
        try:
            download(self._hub.session, file, self._hub.headers, scratch, progress.add, self._hub.pause)
        finally:
            progress.clear()
        os.replace(scratch, target)

    def _bring(self, repository: Repository, wanted: list[str]) -> None:
        """Have files in the snapshot. What is in the cache already is not asked for again."""
        absent = [repository.files[path] for path in wanted if not (repository.snapshot / path).is_file()]
        unknown = [file.name for file in absent if file.size < 0]
        if unknown:
            raise NotTheHub(self._name.repo, f"a list without the size of {unknown[0]}")
        needed = sum(file.size for file in absent)
        kept = sum(partial_bytes(repository.blob(file), file.size) for file in absent)
        if not absent:
            return
        _check_space(self._name, self._cache, needed - kept)
        progress = DownloadProgress(str(self._name), needed, self._report, terminal_of_errors())
        progress.skip(kept)
        try:
            self._bring_all(repository, absent, progress)
        finally:
            progress.clear()
        if needed > 50e6:
            progress.finish()

    def _bring_headers(self, repository: Repository, wanted: list[str]) -> Path:
        """Have files with the headers of GGUF files, in which all else is a hole. Return the first."""
        folder = repository.folder / "mgpu-headers" / repository.commit
        with _writing(self._cache):
            for path in wanted:
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.is_file():
                    self._report(f"{self._name}: reading the header of {path}")
                    fetch_header(self._hub.session, repository.files[path], self._hub.headers, target, self._hub.pause)
        return folder / wanted[0]

    def _bring_all(self, repository: Repository, files: list[RemoteFile], progress: DownloadProgress) -> None:
        def on_bytes(count: int) -> None:
            if self._is_cancelled.is_set():
                raise ModelError("the download was stopped")
            progress.add(count)

        def bring(file: RemoteFile) -> None:
            blob = repository.blob(file)
            with _writing(self._cache):
                blob.parent.mkdir(parents=True, exist_ok=True)
                if not blob.is_file():
                    download(self._hub.session, file, self._hub.headers, blob, on_bytes, self._hub.pause)
                _link(repository.snapshot / file.name, blob)

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            tasks = [pool.submit(bring, file) for file in files]
            try:
                for task in tasks:
                    task.result()
            except BaseException:  # Ctrl-C too: the others end with their next bytes
                self._is_cancelled.set()
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _note_commit(self, repository: Repository) -> None:
        """Let the cache's reference name the commit, now that its files are there. A closed cache stays as it is."""
        reference = reference_file(self._cache, self._name)
        if self._name.revision == repository.commit:
            return
        with suppress(OSError):
            if reference.is_file() and reference.read_text() == repository.commit:
                return
            reference.parent.mkdir(parents=True, exist_ok=True)
            scratch = reference.with_name(f".{reference.name}.{os.getpid()}")
            scratch.write_text(repository.commit)
            os.replace(scratch, reference)


def _link(path: Path, blob: Path) -> None:
    """Let a file of the snapshot link to its bytes, by a relative path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    scratch.symlink_to(os.path.relpath(blob, path.parent))
    os.replace(scratch, path)


@contextmanager
def _writing(cache: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ModelError(
            f"the hub cache {cache} cannot be written: {error.strerror or error}; HF_HOME names another folder"
        ) from error


def _check_space(name: HubName, cache: Path, needed: int) -> None:
    """Raise ModelError if the disk of the cache has no room for the download."""
    with _writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(cache).free
    if needed + _SPARE_BYTES > free:
        raise ModelError(
            f"{name}: {size_text(needed)} are to be downloaded and {cache} has {size_text(free)} free; free some, or "
            "set HF_HOME to a folder on a larger disk"
        )
