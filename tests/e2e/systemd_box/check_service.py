"""What runs inside the box: the installed service under a real systemd, and what it does when things break."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif("IN_THE_BOX" not in os.environ, reason="runs in the box of test_systemd_box.py")

LAUNCHER = "/opt/mgpu/bin/mgpu-launch"
CONFIG = (
    'model = "/var/lib/mgpu/models/model.gguf"\ndevice = "cpu"\nworkers = 3\nmax_seq_len = 1024\ndrain_timeout = 120\n'
)
DEADLINE_S = 60.0
STOP_S = 4


class Service:
    """One instance of the installed unit."""

    def __init__(self, name: str) -> None:
        self.unit = f"mgpu@{name}.service"
        self.config = Path(f"/etc/mgpu/{name}.toml")

    def ask(self, setting: str) -> str:
        return run("systemctl", "show", "-P", setting, self.unit).stdout.strip()

    def start(self) -> subprocess.CompletedProcess[str]:
        return run("systemctl", "start", self.unit)

    def stop(self) -> None:
        run("systemctl", "stop", self.unit)

    @property
    def pid(self) -> int:
        return int(self.ask("MainPID"))

    def processes(self) -> list[int]:
        cgroup = Path("/sys/fs/cgroup" + self.ask("ControlGroup")) / "cgroup.procs"
        return [int(line) for line in cgroup.read_text().split()]

    def workers(self) -> list[int]:
        return [pid for pid in self.processes() if b"mgpu.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()]

    def wait_restarted(self, old_pid: int) -> None:
        wait_until(lambda: self.ask("ActiveState") == "active" and self.pid not in (0, old_pid))

    def journal(self) -> str:
        return run("journalctl", "--no-pager", "-u", self.unit).stdout


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=200)


def generate_command(max_tokens: int) -> tuple[str, ...]:
    ask = (LAUNCHER, "generate", "The first primes are", "--max-tokens", str(max_tokens))
    return ("runuser", "-u", "mgpu", "--", *ask)


def generate(max_tokens: int) -> "subprocess.Popen[str]":
    return subprocess.Popen(generate_command(max_tokens), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def assert_serves() -> None:
    done = run(*generate_command(4))
    assert done.returncode == 0, done.stderr


def wait_until(done: Callable[[], bool]) -> None:
    """Poll what systemd announces to nobody without a bus."""
    deadline_s = time.monotonic() + DEADLINE_S
    while not done():
        assert time.monotonic() < deadline_s, "waited in vain"
        time.sleep(0.05)


@pytest.fixture(scope="module")
def installed() -> None:
    """Install as the documentation says, with deadlines that suit a test."""
    done = run(LAUNCHER, "install-service", "one")
    assert done.returncode == 0, done.stderr
    for command in (("systemd-sysusers", "mgpu.conf"), ("systemd-tmpfiles", "--create", "mgpu.conf")):
        assert run(*command).returncode == 0
    drop_in = Path("/etc/systemd/system/mgpu@.service.d/short.conf")
    drop_in.parent.mkdir()
    short = ("TimeoutStartSec=2", f"TimeoutStopSec={STOP_S}", "WatchdogSec=6", "RestartSec=500ms")
    drop_in.write_text("\n".join(("[Service]", *short)) + "\n")
    assert run("systemctl", "daemon-reload").returncode == 0


@pytest.fixture
def service(installed: None) -> Iterator[Service]:
    """A running instance; the start takes longer than TimeoutStartSec, so that it needs the extensions."""
    service = Service("one")
    service.config.write_text(CONFIG)
    started = service.start()
    assert started.returncode == 0, started.stderr + service.journal()
    yield service
    service.stop()
    run("systemctl", "reset-failed", service.unit)


def test_the_hardened_service_serves_and_says_so(service: Service) -> None:
    assert service.ask("StatusText").startswith("serving model on ipc:///run/mgpu/")
    assert len(service.workers()) == 3
    assert_serves()
    for pid in service.processes():
        if pid != service.pid:
            assert b"NOTIFY_SOCKET" not in Path(f"/proc/{pid}/environ").read_bytes()


def test_an_idle_service_feeds_its_watchdog(service: Service) -> None:
    pid, fed = service.pid, service.ask("WatchdogTimestampMonotonic")
    for _ in range(5):
        wait_until(lambda: service.ask("WatchdogTimestampMonotonic") != fed)  # noqa: B023
        fed = service.ask("WatchdogTimestampMonotonic")
    assert (service.pid, service.ask("NRestarts")) == (pid, "0")


def test_a_parent_that_hangs_is_replaced_and_the_journal_shows_where_it_hung(service: Service) -> None:
    pid = service.pid
    os.kill(pid, signal.SIGSTOP)
    service.wait_restarted(pid)
    assert "Watchdog timeout" in service.journal()
    assert "in _sleep" in service.journal()
    assert_serves()


def test_a_worker_that_hangs_under_work_starves_the_watchdog(service: Service) -> None:
    pid = service.pid
    os.kill(service.workers()[-1], signal.SIGSTOP)
    client = generate(400)
    wait_until(lambda: "stalled" in service.ask("StatusText"))
    service.wait_restarted(pid)
    client.communicate(timeout=DEADLINE_S)
    assert_serves()


def test_sigkill_of_the_parent_leaves_nothing_and_restarts(service: Service) -> None:
    pid, family = service.pid, set(service.processes())
    os.kill(pid, signal.SIGKILL)
    service.wait_restarted(pid)
    assert not family & set(service.processes())
    assert len(list(Path("/run/mgpu").iterdir())) == 1, "the dead server's folder was swept"
    assert_serves()


def test_a_stop_waits_for_the_last_request_beyond_timeout_stop_sec(service: Service) -> None:
    client = generate(600)
    wait_until(lambda: "1 running" in service.ask("StatusText"))
    began_s = time.monotonic()
    service.stop()
    assert time.monotonic() - began_s > STOP_S
    output, _ = client.communicate(timeout=DEADLINE_S)
    assert client.returncode == 0, output
    assert service.ask("Result") == "success"


def test_a_mistake_in_the_configuration_is_not_tried_again(service: Service) -> None:
    service.stop()
    service.config.write_text("modle = 'x'\n")
    assert service.start().returncode != 0
    wait_until(lambda: service.ask("ActiveState") == "failed")
    assert (service.ask("ExecMainStatus"), service.ask("NRestarts")) == ("78", "0")
    assert "did you mean 'model'" in service.journal()


def test_two_instances_do_not_disturb_each_other(service: Service) -> None:
    other = Service("two")
    other.config.write_text(CONFIG.replace("workers = 3\n", ""))
    assert other.start().returncode == 0
    service.stop()
    assert_serves()
    other.stop()
    assert list(Path("/run/mgpu").iterdir()) == []


@pytest.mark.parametrize("kind", ["absent", "folder"])
def test_keys_reach_the_service_and_nobody_else(service: Service, kind: str) -> None:
    service.stop()
    keys, client = Path("/etc/mgpu/one.keys"), "/root/alice.client"
    expected = ["keys 1 400 mgpu"]
    if kind == "folder":
        for arguments in ((), ("--client", "alice")):
            assert run(LAUNCHER, "keygen", "--out", str(keys), *arguments).returncode == 0
        (keys / "alice.client").rename(client)
        expected += [f"keys_{name} {size} 400 mgpu" for name, size in sorted(key_files(keys))]
        with service.config.open("a") as config:
            config.write('bind = "tcp://127.0.0.1:5555"\n')
    assert service.start().returncode == 0, service.journal()
    listing = run("nsenter", "-t", str(service.pid), "-m", "find", f"/run/credentials/{service.unit}", "-type", "f",
                  "-printf", "%f %s %m %u\n")  # fmt: skip
    assert sorted(listing.stdout.splitlines()) == expected
    if kind == "folder":
        ask = (LAUNCHER, "status", "--endpoint", "tcp://127.0.0.1:5555")
        assert run(*ask).returncode == 69
        assert run(*ask, "--keys", client).returncode == 0
        assert run("systemctl", "reload", service.unit).returncode == 0
        wait_until(lambda: "reloaded; 1 client keys" in service.journal())
        assert run(*ask, "--keys", client).returncode == 0
        service.config.write_text(CONFIG)
    run("rm", "-rf", str(keys))


def key_files(folder: Path) -> Iterator[tuple[str, int]]:
    """Return names, as systemd makes credentials of them, and sizes."""
    for path in folder.rglob("*"):
        if path.is_file():
            yield str(path.relative_to(folder)).replace("/", "_"), path.stat().st_size
