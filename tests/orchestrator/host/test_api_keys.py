"""The file of API keys: what is read, what is refused, and that no key is ever shown."""

from hashlib import sha256
from pathlib import Path

import pytest

from mgpu.orchestrator.host.api_keys import ApiKeysError, read_api_keys
from mgpu.protocol.internal.http_spec import ApiKey

SECRET = "sk-0123456789abcdef"


def write(folder: Path, text: str, mode: int = 0o600) -> Path:
    file = folder / "keys"
    file.write_text(text)
    file.chmod(mode)
    return file


def test_names_and_digests_are_read(tmp_path: Path) -> None:
    file = write(tmp_path, f"# ours\n\nalice {SECRET}\nbob@x.y   {SECRET}2\n", 0o640)
    assert read_api_keys(file) == [
        ApiKey("alice", sha256(SECRET.encode()).digest()),
        ApiKey("bob@x.y", sha256(f"{SECRET}2".encode()).digest()),
    ]
    assert SECRET not in repr(read_api_keys(file))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (SECRET, "line 1: a line is a name"),
        ("\nalice short", "line 2: the key of alice has 5 characters, at least 16"),
        (f"alice {SECRET}\nalice {SECRET}x", "line 2: alice has a key already"),
        (f"alice {SECRET}\nbob {SECRET}", "two names have the same key"),
        (f"al ice {SECRET}", "line 1: a line is a name"),
        (f"alice {SECRET}ü", "line 1: a line is a name"),
        ("x" * 2_000_000, "more than 1048576 bytes"),
    ],
)
def test_a_damaged_file_is_refused_without_showing_a_key(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(ApiKeysError) as error:
        read_api_keys(write(tmp_path, text))
    assert words in str(error.value)
    assert SECRET not in str(error.value)


@pytest.mark.parametrize("mode", [0o644, 0o660, 0o602])
def test_a_file_that_others_may_read_or_change_is_refused_with_the_way_out(tmp_path: Path, mode: int) -> None:
    file = write(tmp_path, f"alice {SECRET}", mode)
    with pytest.raises(ApiKeysError, match=f"chmod 600 {file}"):
        read_api_keys(file)


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ApiKeysError, match="No such file"):
        read_api_keys(tmp_path / "none")
    with pytest.raises(ApiKeysError, match=r"regular file|directory"):
        read_api_keys(tmp_path)
