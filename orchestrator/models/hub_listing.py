"""Ask the hub which files a repository has: patiently, and with the user's token."""

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mgpu import __version__
from mgpu.orchestrator.models.hub_cache import repository_folder
from mgpu.orchestrator.models.hub_errors import HubAnswer, NotTheHub, may_pass
from mgpu.orchestrator.models.hub_names import HubName
from mgpu.orchestrator.models.hub_transfer import RemoteFile, pause_before_retry

_TIMEOUT_S = 10.0
_sleep = time.sleep
Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit, as the hub describes it."""

    name: HubName
    commit: str
    files: dict[str, RemoteFile]
    folder: Path
    """In the cache."""

    @property
    def snapshot(self) -> Path:
        return self.folder / "snapshots" / self.commit

    def blob(self, file: RemoteFile) -> Path:
        """Return where the cache keeps the bytes of a file: under their digest, or as part of the commit."""
        flat = f"{self.commit}-{file.name.replace('/', '--')}"
        return self.folder / "blobs" / (file.sha256 or file.git_sha1 or flat)


class Hub:
    """The hub, asked about one repository."""

    def __init__(self, name: HubName, report: Report, tries: int) -> None:
        """``tries``: further attempts to reach the hub at all."""
        from huggingface_hub.utils import get_session

        self._name, self._report, self._tries = name, report, tries
        self.session = get_session()
        self.headers = _headers()

    def describe(self, cache: Path) -> Repository:
        """Ask the hub which files there are, at which commit; ``cache`` is where they belong."""
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
        return Repository(self._name, commit, files, repository_folder(cache, self._name.repo))

    def _ask(self, url: str) -> dict[str, Any]:
        """Return the JSON object at an address of the hub, patiently."""
        tries = 0
        while True:
            try:
                response = self.session.get(
                    url, params={"blobs": True}, headers=self.headers, timeout=_TIMEOUT_S, follow_redirects=True
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
                self.pause(wait_s)
                tries += 1

    def pause(self, seconds: float) -> None:
        """Sleep before the hub is asked again, and say so if it takes long."""
        if seconds >= 2:
            self._report(f"{self._name}: the hub asks to wait {seconds:.0f} s")
        _sleep(seconds)


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
