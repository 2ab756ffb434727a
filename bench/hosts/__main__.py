"""Serve from network namespaces under a real torchrun, break links and hosts, and compare every token.

    python -m bench.hosts [--hosts 3] [--delay-ms 0] [--loss 0] [--cut-s 30] [--rendezvous c10d] [--model FOLDER]
    [--map "0+1:N;2:M"]

Needs root. The delay and the loss count for each frame on its way between two hosts. Every stream is compared with the
answer of one worker.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from bench.hosts.cluster import Cluster
from bench.hosts.network import Network, why_not
from bench.random_model import write_random_model
from mgpu import Client
from mgpu.launch.bench.report import describe, heading
from mgpu.launch.server_process import ServerProcess, orderly_end

PROMPT = [*range(3, 23)]
STREAMS, TOKENS = 8, 96
USUAL = ("--device", "cpu", "--dtype", "float32", "--max-seq-len", "256", "--max-restarts", "99")


def main() -> None:
    """Run the faults one after the other and print a line for each."""
    options = _parser().parse_args()
    if problem := why_not():
        sys.exit(f"error: {problem}")
    with orderly_end(), tempfile.TemporaryDirectory() as folder:
        model = options.model or str(write_random_model(Path(folder)))
        whole = _alone(model)
        print(heading(describe("torch")))
        with (
            Network(options.hosts, options.delay_ms, options.loss) as network,
            Cluster(network, options.hosts, model, "-n", options.map, *USUAL, rendezvous=options.rendezvous) as cluster,
        ):
            began_s = time.monotonic()
            cluster.start()
            print(f"ready with {options.hosts} hosts: {time.monotonic() - began_s:.1f} s")
            last = options.hosts - 1
            faults: list[tuple[str, Callable[[], None]]] = [
                ("nothing", lambda: None),
                ("a worker is killed", lambda: cluster.processes(last, "mgpu.worker")[-1].kill()),
                ("a rank is killed", lambda: cluster.processes(last, "--join")[0].kill()),
                ("a host is killed and started again", lambda: _restart(cluster, [last])),
                (f"a link is cut for {options.cut_s:g} s", lambda: _cut(network, last, options.cut_s)),
            ]
            if options.rendezvous == "c10d":  # its launchers all end when they miss one for a minute
                faults[3] = ("all hosts are killed and started again", lambda: _restart(cluster, range(options.hosts)))
            with Client(cluster.endpoint) as client:
                for name, fault in faults:
                    _report(name, client, whole, fault, cluster)
            print(f"exit statuses of torchrun: {cluster.stop()}")


def _report(name: str, client: Client, whole: list[int], fault: Callable[[], None], cluster: Cluster) -> None:
    before = len(cluster.recoveries())
    began_s = time.monotonic()
    streams = [client.stream(PROMPT, max_tokens=TOKENS, ignore_eos=True) for _ in range(STREAMS)]
    for stream in streams:
        next(stream)
    fault()
    answers = [stream.completion().token_ids for stream in streams]
    took_s = time.monotonic() - began_s
    wrong = sum(answer != whole for answer in answers)
    recovered = ", ".join(f"{each:.1f} s" for each in cluster.recoveries()[before:]) or "none"
    print(f"{name}: {STREAMS} streams of {TOKENS} tokens in {took_s:.1f} s, {wrong} different; recoveries: {recovered}")


def _cut(network: Network, at: int, seconds: float) -> None:
    network.cut(at)
    time.sleep(seconds)
    network.mend(at)


def _restart(cluster: Cluster, hosts: Iterable[int]) -> None:
    for at in hosts:
        cluster.kill_host(at)
    for at in hosts:
        cluster.launch(at)


def _alone(model: str) -> list[int]:
    with (
        ServerProcess("-m", model, *USUAL) as server,
        Client(server.wait_ready()) as client,
    ):
        return client.generate(PROMPT, max_tokens=TOKENS, ignore_eos=True).token_ids


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m bench.hosts", description="Break hosts and links of a server.")
    parser.add_argument("--hosts", type=int, default=3, choices=(2, 3))
    parser.add_argument("--delay-ms", type=float, default=0.0)
    parser.add_argument("--loss", type=float, default=0.0)
    parser.add_argument("--rendezvous", choices=("static", "c10d"), default="static", help="of torchrun")
    parser.add_argument("--cut-s", type=float, default=30.0)
    parser.add_argument("--model", default="", help="a folder; default: three layers of random weights")
    parser.add_argument("--map", default="0+1:2;2:1", help="-n of serve")
    return parser


if __name__ == "__main__":
    main()
