"""Fetch a model of the hub into the local cache: only the files that mgpu needs, resumed, checked, with progress.

huggingface_hub does the transport (addresses, mirrors, proxies, tokens) and gives the layout of the cache. Bytes of
weights come by `hub_transfer.download`, which keeps what it has when it is interrupted. The cache's reference moves to
a new commit only when all its files are there, so a cached model is whole.
"""

import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgpu import __version__
from mgpu.orchestrator.errors import HubUnreachable, ModelError
from mgpu.orchestrator.models.download_progress import DownloadProgress, size_text, terminal_of_errors
from mgpu.orchestrator.models.hub_cache import (
    CachedModel,
    find_cached,
    read_weight_map,
    reference_file,
    repository_folder,
)
from mgpu.orchestrator.models.hub_errors import HubAnswer, NotTheHub, may_pass, reason_of
from mgpu.orchestrator.models.hub_files import INDEX, Part, gguf_files, is_gguf_wanted, small_files, weight_files
from mgpu.orchestrator.models.hub_headers import fetch_header
from mgpu.orchestrator.models.hub_names import HubName
from mgpu.orchestrator.models.hub_transfer import (
    RemoteFile,
    download,
    partial_bytes,
    pause_before_retry,
)

_AT_ONCE = 4
"""Files that are downloaded at the same time."""
_SPARE_BYTES = 64 << 20
"""Space that a download leaves on the disk."""
_TIMEOUT_S = 10.0
_sleep = time.sleep
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class _Repository:
    """A repository at one commit, as the hub describes it."""

    name: HubName
    commit: str
    files: dict[str, RemoteFile]
    folder: Path
    """In the cache."""

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshots" / self.commit


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
        from huggingface_hub.utils import get_session

        self._cache, self._name, self._report = cache, name, report
        self._session = get_session()
        self._headers = _headers()
        self._is_cancelled = threading.Event()
        self._tries = 0 if has_cached else 2
        """Further attempts to reach the hub at all. A cached model need not wait for them."""

    def run(self, part: Part) -> CachedModel:
        repository = self._describe()
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
        file = self._describe().files.get(self._name.file)
        if file is None or file.sha256 != sha256:
            raise ModelError(f"{self._name}: the hub has another file")
        scratch = target.with_name(f".{target.name}.hub")
        progress = DownloadProgress(target.name, file.size, self._report, terminal_of_errors())
        progress.skip(partial_bytes(scratch, file.size))
        try:
            download(self._session, file, self._headers, scratch, progress.add, self._pause)
        finally:
            progress.clear()
        os.replace(scratch, target)

    def _describe(self) -> _Repository:
        """Ask the hub which files there are, at which commit."""
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import validate_repo_id

        validate_repo_id(self._name.repo)
        revision = self._name.revision or "main"
        url = f"{constants.ENDPOINT}/api/models/{self._name.repo}/revision/{revision.replace('/', '%2F')}"
        answer = self._ask(url)
        commit, siblings = answer.get("sha"), answer.get("siblings")
        if not isinstance(commit, str) or not commit.isalnum() or not isinstance(siblings, list):
            raise NotTheHub(url, "an answer without commit and files")
        files = {}
        for each in siblings:
            if not isinstance(each, dict) or not isinstance(path := each.get("rfilename"), str) or not _is_inside(path):
                continue
            lfs = each.get("lfs")
            size = each.get("size")
            files[path] = RemoteFile(
                path,
                hf_hub_url(self._name.repo, path, revision=commit, endpoint=constants.ENDPOINT),
                size if isinstance(size, int) else -1,
                sha256=_digest(lfs.get("sha256") if isinstance(lfs, dict) else "", 64),
                git_sha1="" if isinstance(lfs, dict) else _digest(each.get("blobId"), 40),
            )
        return _Repository(self._name, commit, files, repository_folder(self._cache, self._name.repo))

    def _ask(self, url: str) -> dict[str, Any]:
        """Return the JSON object at an address of the hub, patiently."""
        tries = 0
        while True:
            try:
                response = self._session.get(
                    url, params={"blobs": True}, headers=self._headers, timeout=_TIMEOUT_S, follow_redirects=True
                )
                if response.status_code != 200:
                    code = response.headers.get("X-Error-Code", "")
                    raise HubAnswer(response.status_code, response.headers, code)
                try:
                    value = response.json()
                except ValueError as error:
                    raise NotTheHub(url, "an answer that is not JSON") from error
                if not isinstance(value, dict):
                    raise NotTheHub(url, "an answer that is no JSON object")
                return value
            except Exception as error:  # of the HTTP library, too
                is_asked_to_wait = isinstance(error, HubAnswer) and error.status == 429
                wait_s = pause_before_retry(error, tries) if may_pass(error) else None
                if wait_s is None or (tries >= self._tries and not is_asked_to_wait):
                    raise
                self._pause(wait_s)
                tries += 1

    def _pause(self, seconds: float) -> None:
        if seconds >= 2:
            self._report(f"{self._name}: the hub asks to wait {seconds:.0f} s")
        _sleep(seconds)

    def _bring(self, repository: _Repository, wanted: list[str]) -> None:
        """Have files in the snapshot. What is in the cache already is not asked for again."""
        absent = [repository.files[path] for path in wanted if not (repository.snapshot / path).is_file()]
        unknown = [file.name for file in absent if file.size < 0]
        if unknown:
            raise NotTheHub(self._name.repo, f"a list without the size of {unknown[0]}")
        needed = sum(file.size for file in absent)
        kept = sum(partial_bytes(_blob(repository, file), file.size) for file in absent)
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

    def _bring_headers(self, repository: _Repository, wanted: list[str]) -> Path:
        """Have files with the headers of GGUF files, in which all else is a hole. Return the first."""
        folder = repository.folder / "mgpu-headers" / repository.commit
        with _writing(self._cache):
            for path in wanted:
                target = folder / path
                target.parent.mkdir(parents=True, exist_ok=True)
                if not target.is_file():
                    self._report(f"{self._name}: reading the header of {path}")
                    fetch_header(self._session, repository.files[path], self._headers, target, self._pause)
        return folder / wanted[0]

    def _bring_all(self, repository: _Repository, files: list[RemoteFile], progress: DownloadProgress) -> None:
        def on_bytes(count: int) -> None:
            if self._is_cancelled.is_set():
                raise ModelError("the download was stopped")
            progress.add(count)

        def bring(file: RemoteFile) -> None:
            blob = _blob(repository, file)
            with _writing(self._cache):
                blob.parent.mkdir(parents=True, exist_ok=True)
                if not blob.is_file():
                    download(self._session, file, self._headers, blob, on_bytes, self._pause)
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

    def _note_commit(self, repository: _Repository) -> None:
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


def _headers() -> dict[str, str]:
    """Return the user's token and this program's name. Those of the hub's package tell more about the machine."""
    from huggingface_hub import constants, get_token

    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    return {"User-Agent": f"mgpu/{__version__}"} | ({"Authorization": f"Bearer {token}"} if token else {})


def _is_inside(path: str) -> bool:
    """Return True if a path that the hub lists stays inside the snapshot."""
    return bool(path) and all(part not in ("", ".", "..") for part in path.split("/")) and "\0" not in path


def _digest(text: object, digits: int) -> str:
    """Return a digest that the hub lists; '' unless it has so many digits. It becomes the name of a file."""
    return text if isinstance(text, str) and re.fullmatch(rf"[0-9a-f]{{{digits}}}", text) else ""


def _blob(repository: _Repository, file: RemoteFile) -> Path:
    """Return where the cache keeps the bytes of a file: under their digest, or as part of the commit."""
    flat = f"{repository.commit}-{file.name.replace('/', '--')}"
    return repository.folder / "blobs" / (file.sha256 or file.git_sha1 or flat)


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
