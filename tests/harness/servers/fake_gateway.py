"""A gateway process that only relays: link messages to and from the test, which binds FAKE_GATEWAY."""

import os
import shutil
import signal
import sys

import zmq

from mgpu.protocol.internal.gateway_messages import (
    LINK,
    Alive,
    EngineInfo,
    GatewayFailure,
    GatewayReady,
    GatewaySpec,
    Ping,
    StateKnown,
)


def main() -> int:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    size = int.from_bytes(sys.stdin.buffer.read(4), "little")
    spec = LINK.decode(sys.stdin.buffer.read(size))
    assert isinstance(spec, GatewaySpec)
    if spec.info is not None and os.path.exists(stuck := os.environ.get("FAKE_GATEWAY_STUCK", "")):
        os.unlink(stuck)  # the next one is well
        signal.pause()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    link, test = context.socket(zmq.DEALER), context.socket(zmq.DEALER)
    for socket, endpoint in ((link, spec.link), (test, os.environ["FAKE_GATEWAY"])):
        socket.setsockopt(zmq.LINGER, 1000)
        socket.connect(endpoint)
    if "FAKE_GATEWAY_MISTAKE" in os.environ:
        link.send(LINK.encode(GatewayFailure("no usable tokenizer", "", is_mistake=True)))
    link.send(LINK.encode(GatewayReady(spec.bind)))
    poller = zmq.Poller()
    for source in (link, test, 0):
        poller.register(source, zmq.POLLIN)
    while True:
        ready = dict(poller.poll())
        if link in ready:
            data = link.recv()
            message = LINK.decode(data)
            if isinstance(message, Ping):
                link.send(LINK.encode(Alive()))
                continue
            test.send(data)
            if isinstance(message, EngineInfo) and "FAKE_GATEWAY_SILENT" not in os.environ:
                link.send(LINK.encode(StateKnown(message.state)))
            if isinstance(message, EngineInfo) and message.state == "stopped":
                break
        if test in ready:
            data = test.recv()
            if data == b"die":
                os._exit(9)
            if data == b"abort":
                os.abort()
            if data == b"spin":
                while True:
                    pass
            if data == b"fail":
                link.send(LINK.encode(GatewayFailure("told to fail", "Traceback of the gateway")))
            else:
                link.send(data)
        if 0 in ready:
            shutil.rmtree(spec.runtime_dir, ignore_errors=True)
            break
    context.destroy(linger=1000)
    return 0


if __name__ == "__main__":
    sys.exit(main())
