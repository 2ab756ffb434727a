"""Pass Ethernet frames between TAP devices, each late and some never, where the kernel has no netem.

``python -m bench.hosts.switch --delay-ms 25 --loss 0.01 DEVICE NAMESPACE DEVICE NAMESPACE …`` makes each device and
moves it into its namespace. It prints ``ready``, and ends when its standard input does.
"""

import argparse
import fcntl
import heapq
import os
import random
import select
import struct
import subprocess
import sys
import time

_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x1002
_FRAME = 1 << 16


def open_tap(name: str) -> int:
    """Make a TAP device; return the descriptor by which its frames are read and written."""
    fd = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_HEADER))
    return fd


def pass_frames(taps: list[int], delay_s: float, loss: float) -> None:
    """Send what comes from one device to all others, ``delay_s`` later or, by chance, not at all."""
    rng, late, number = random.Random(1), list[tuple[float, int, int, bytes]](), 0
    while True:
        wait_s = max(0.0, late[0][0] - time.monotonic()) if late else None
        readable, _, _ = select.select([0, *taps], [], [], wait_s)
        if 0 in readable and not os.read(0, 64):
            return
        now_s = time.monotonic()
        for fd in set(readable) - {0}:
            frame = read_frame(fd)
            if frame and rng.random() >= loss:
                number += 1
                heapq.heappush(late, (now_s + delay_s, number, fd, frame))
        while late and late[0][0] <= time.monotonic():
            _, _, source, frame = heapq.heappop(late)
            for fd in taps:
                if fd != source:
                    write_frame(fd, frame)


def read_frame(fd: int) -> bytes:
    """Return a frame; empty while the device is down."""
    try:
        return os.read(fd, _FRAME)
    except OSError:
        return b""


def write_frame(fd: int, frame: bytes) -> None:
    """Write a frame. A device that is down, or full, drops it as a link does."""
    try:
        os.write(fd, frame)
    except OSError:
        return


def main() -> None:
    """Make the devices, and pass frames until standard input ends."""
    parser = argparse.ArgumentParser(description="Pass Ethernet frames between namespaces, late and with loss.")
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--loss", type=float, default=0.0)
    parser.add_argument("pairs", nargs="+", metavar="DEVICE NAMESPACE")
    options = parser.parse_args()
    taps = []
    for device, namespace in zip(options.pairs[::2], options.pairs[1::2], strict=True):
        taps.append(open_tap(device))
        subprocess.run(["ip", "link", "set", device, "netns", namespace, "name", "eth0"], check=True)
    print("ready", flush=True)
    pass_frames(taps, options.delay_ms / 1e3, options.loss)
    sys.exit(0)


if __name__ == "__main__":
    main()
