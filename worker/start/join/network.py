"""Find the address and the interface by which this host reaches others, so that ranks listen where they are reached."""

import contextlib
import fcntl
import ipaddress
import socket
import struct

_SIOCGIFADDR = 0x8915


def own_address(host: str, port: int) -> str:
    """Return this host's address on the way to another one; empty if there is no way. Sends nothing."""
    with contextlib.suppress(OSError, UnicodeError):
        for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM):
            with contextlib.suppress(OSError), socket.socket(family, kind, protocol) as probe:
                probe.connect(place)
                return str(probe.getsockname()[0])
    return ""


def interface_for(*hosts: str) -> str:
    """Return the interface by which the first of ``hosts`` is reached that is not this host's loopback.

    ``lo`` if all are on the loopback: then all ranks are on one host. Empty if no interface has the address.
    """
    addresses = [address for host in hosts if (address := own_address(host, 9))]
    outside = [address for address in addresses if not ipaddress.ip_address(address.partition("%")[0]).is_loopback]
    return _interface_of(outside[0]) if outside else "lo"


def _interface_of(address: str) -> str:
    if ":" in address:
        return _interface_of_ipv6(address.partition("%")[0])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                packed = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(packed[20:24]) == address:
                    return name
    return ""


def _interface_of_ipv6(address: str) -> str:
    wanted = ipaddress.ip_address(address).packed.hex()
    with contextlib.suppress(OSError), open("/proc/net/if_inet6", encoding="ascii") as lines:
        for line in lines:
            digits, *_, name = line.split()
            if digits == wanted:
                return name
    return ""
