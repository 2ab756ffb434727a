"""The interface by which a host is reached: ranks listen there."""

from mgpu.worker.start.join.network import interface_for, own_address


def test_the_way_to_the_loopback_is_the_loopback() -> None:
    assert own_address("127.0.0.1", 9) == "127.0.0.1"
    assert interface_for("127.0.0.1", "localhost") == "lo"


def test_a_name_that_nobody_knows_has_no_way() -> None:
    assert own_address("no-such-host.invalid", 9) == ""
    assert interface_for("no-such-host.invalid") == "lo"


def test_an_address_of_ipv6_has_an_interface_too() -> None:
    assert interface_for("::1") == "lo"
