"""The socket of the HTTP server: what may be written, who has a taken port, and what is left of a unix socket."""

import os
import socket
import stat
from pathlib import Path

import pytest

from mgpu.orchestrator.host.listening import (
    HttpAddress,
    HttpAddressError,
    HttpAddressTaken,
    HttpListener,
    listening,
    parse_address,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("127.0.0.1:8000", HttpAddress("127.0.0.1", 8000, "")),
        ("localhost:8001", HttpAddress("127.0.0.1", 8001, "")),
        ("8002", HttpAddress("127.0.0.1", 8002, "")),
        (":8003", HttpAddress("127.0.0.1", 8003, "")),
        ("http://127.0.0.1:8000/", HttpAddress("127.0.0.1", 8000, "")),
        ("*:80", HttpAddress("0.0.0.0", 80, "")),
        ("[::1]:8000", HttpAddress("::1", 8000, "")),
        ("unix:/run/x.sock", HttpAddress("", 0, "/run/x.sock")),
        ("none", None),
    ],
)
def test_addresses_are_read_as_people_write_them(text: str, expected: HttpAddress | None) -> None:
    assert parse_address(text) == expected


@pytest.mark.parametrize(
    ("text", "way_out"),
    [
        ("127.0.0.1", "such as 127.0.0.1:8000"),
        ("127.0.0.1:70000", "from 0 (any) to 65535"),
        ("127.0.0.1:-1", "from 0"),
        ("127.0.0.1:\uff18\uff10", "from 0"),
        ("myhost:8000", "`ip address` lists them"),
        ("::1:8000", "[::1]:8000"),
        ("unix:x.sock", "must be absolute"),
        (f"unix:/{'x' * 120}", "the system allows 107"),
        ("off", "or none"),
        ("", "such as"),
    ],
)
def test_an_address_that_cannot_be_used_says_what_to_write(text: str, way_out: str) -> None:
    with pytest.raises(HttpAddressError) as error:
        parse_address(text)
    assert way_out in str(error.value)
    assert error.value.exit_code == 78


def test_only_loopback_and_unix_sockets_are_loopback() -> None:
    shown = {
        text: parse_address(text) for text in ("127.0.0.2:1", "[::1]:1", "unix:/x", "0.0.0.0:1", "10.0.0.1:1", "[::]:1")
    }
    assert {text for text, address in shown.items() if address and address.is_loopback} == {
        "127.0.0.2:1", "[::1]:1", "unix:/x",
    }  # fmt: skip


def test_a_taken_port_names_who_has_it_and_a_free_one() -> None:
    with listening(HttpAddress("127.0.0.1", 0, "")) as first:
        assert first is not None
        port = first.address.port
        with pytest.raises(HttpAddressTaken) as error, listening(first.address):
            pass
    text = str(error.value)
    assert f"process {os.getpid()} (" in text
    assert "--http none" in text
    assert error.value.exit_code == 1
    offered = text.partition("--http 127.0.0.1:")[2].split()[0]
    assert port < int(offered) <= port + 100


def test_a_port_is_free_again_after_the_block() -> None:
    with listening(HttpAddress("127.0.0.1", 0, "")) as first:
        assert first is not None
    with listening(first.address) as second:
        assert second is not None
        assert second.url == f"http://127.0.0.1:{first.address.port}"


def test_an_address_of_another_machine_is_named() -> None:
    with pytest.raises(HttpAddressError, match="no such address"), listening(HttpAddress("192.0.2.1", 0, "")):
        pass


@pytest.mark.parametrize(("for_all_users", "mode"), [(False, 0o600), (True, 0o666)])
def test_a_unix_socket_is_private_unless_all_may_use_it_and_goes_at_the_end(
    tmp_path: Path, for_all_users: bool, mode: int
) -> None:
    path = tmp_path / "http.sock"
    with listening(HttpAddress("", 0, str(path)), for_all_users) as listener:
        assert listener == HttpListener(listener.socket, HttpAddress("", 0, str(path)), f"unix:{path}")  # type: ignore[union-attr]
        assert stat.S_IMODE(path.stat().st_mode) == mode
    assert list(tmp_path.iterdir()) == []


def test_a_listener_removes_its_own_file_only(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    with listening(HttpAddress("", 0, str(path))) as listener:
        assert listener is not None
        listener.remove_file()
        assert not path.exists()
        path.write_text("another program's")
        listener.remove_file()
    assert path.exists()


def test_the_file_of_a_killed_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "http.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with listening(HttpAddress("", 0, str(path))), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_unix_socket_in_use_names_the_process(tmp_path: Path) -> None:
    address = HttpAddress("", 0, str(tmp_path / "http.sock"))
    with listening(address):
        with pytest.raises(HttpAddressTaken, match=f"process {os.getpid()} "), listening(address):
            pass
        assert Path(address.path).is_socket()


def test_a_file_that_is_no_socket_stays(tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("x")
    with pytest.raises(HttpAddressError, match="no socket"), listening(HttpAddress("", 0, str(path))):
        pass
    assert path.read_text() == "x"


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(HttpAddressError, match="No such file"), listening(HttpAddress("", 0, str(tmp_path / "no/x"))):
        pass
