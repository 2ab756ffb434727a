"""Break a real server under load, over and over, and count what its clients lose: `make chaos`.

Every stream is compared, token for token, with a run of the same request that nothing disturbed. The defaults are a
short form of a few minutes; `--long` is what docs/reliability.md shows.

    python -m bench.chaos [--long] [--model demo] [--workers 3] [--streams 16] [--save FOLDER] [--kills 8] [--stops 1]
                          [--gateway-kills 5] [--parent-kills 2] [--sigterms 1] [--gone-clients 40] [--bad-inputs 1000]
                          [--soak-minutes 1] [--one-server]
"""

import argparse
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bench.chaos.bad_inputs import send_bad_inputs
from bench.chaos.ends import check_no_blocks, kill_loading_parents, kill_parents, leave, terminate, terminate_server
from bench.chaos.kills import (
    kill_decoding_workers,
    kill_gateways,
    kill_idle_workers,
    kill_loading_workers,
    kill_workers_in_prompts,
    stop_workers,
)
from bench.chaos.load import Job, Standstill, Streams, make_jobs, undisturbed
from bench.chaos.server import Server, ServerOptions
from bench.chaos.soak import soak
from bench.chaos.table import Report, Row
from mgpu.launch.bench.report import describe, heading

SHORT = {
    "kills": 8,
    "stops": 1,
    "gateway_kills": 5,
    "parent_kills": 2,
    "sigterms": 1,
    "gone_clients": 40,
    "bad_inputs": 1000,
}
LONG = {
    "kills": 200,
    "stops": 10,
    "gateway_kills": 50,
    "parent_kills": 50,
    "sigterms": 10,
    "gone_clients": 1000,
    "bad_inputs": 20_000,
}
SOAK_MINUTES = {False: 1.0, True: 30.0}

Fault = Callable[[Server, Streams], Row]
Answers = dict[Job, tuple[int, ...]]


def faults(options: argparse.Namespace) -> Iterator[Fault]:
    """Yield the faults that a server survives, in the order in which they are injected."""
    if options.soak_minutes:
        yield partial(soak, minutes=options.soak_minutes)
    if options.stops:
        yield partial(stop_workers, count=options.stops, hang_timeout_s=options.hang_timeout)
    if options.gateway_kills:
        yield partial(kill_gateways, count=options.gateway_kills)
    if options.gone_clients:
        yield partial(leave, count=options.gone_clients)
    if options.bad_inputs:
        yield partial(send_bad_inputs, count=options.bad_inputs)
    each, rest = divmod(options.kills, 4)
    if each:
        yield partial(kill_idle_workers, count=each)
        yield partial(kill_workers_in_prompts, count=each)
    if each + rest:
        yield partial(kill_decoding_workers, count=each + rest)
    if each:
        yield partial(kill_loading_workers, count=each)


def rows(options: argparse.Namespace) -> Iterator[Row]:
    """Run everything that was asked for, one fault after another."""
    server_options = ServerOptions(options.model, options.workers, options.hang_timeout)
    if options.one_server:
        yield from rows_of_server(options, server_options, list(faults(options)), {}, end=bool(options.sigterms))
    else:
        expected: Answers = {}
        for fault in faults(options):
            yield from rows_of_server(options, server_options, [fault], expected)
    if options.parent_kills:
        yield kill_parents(server_options, options.parent_kills)
    if options.parent_kills > 1:
        yield kill_loading_parents(server_options, max(1, options.parent_kills // 5))
    if options.sigterms and not options.one_server:
        yield terminate(server_options, options.sigterms)


def rows_of_server(
    options: argparse.Namespace,
    server_options: ServerOptions,
    wanted: list[Fault],
    expected: Answers,
    end: bool = False,
) -> Iterator[Row]:
    """Do all that is ``wanted`` to one server. ``expected`` is filled by the first one, which is undisturbed then."""
    with Server(server_options) as server:
        if not expected:
            expected |= undisturbed(server.endpoint, make_jobs(options.streams + 8, options.answer_tokens))
        for fault in wanted:
            yield under_load(server, expected, options.streams, fault)
        if end:
            yield terminate_server(server)


def under_load(server: Server, expected: Answers, count: int, fault: Fault) -> Row:
    """Do it under streams, then look for what it left behind in the server that went on."""
    parent = server.parent
    descriptors = parent.num_fds()
    with Streams(server.endpoint, expected, count) as streams:
        streams.wait_for_pieces(count)
        rss_kb = parent.memory_info().rss // 1024
        row = fault(server, streams)
        rss_after_kb = parent.memory_info().rss // 1024
    row.add(streams.tally)
    check_no_blocks(server, row)
    left = parent.num_fds() - descriptors
    if left > 0:
        row.problems.append(f"the parent has {left} more descriptors than before")
    row.notes.append(f"RSS of the parent {rss_kb} KB before, {rss_after_kb} KB after")
    return row


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="the counts of the table in docs/reliability.md")
    parser.add_argument("--only", action="store_true", help="leave out every fault that is not named by an option")
    parser.add_argument(
        "--one-server", action="store_true", help="one for all that it survives, and for one SIGTERM at its end"
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--workers", type=int, default=3)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--answer-tokens", type=int, default=40)
    parser.add_argument("--hang-timeout", type=float, default=10.0)
    for name in SHORT:
        parser.add_argument("--" + name.replace("_", "-"), type=int)
    parser.add_argument("--soak-minutes", type=float)
    parser.add_argument("--save", type=Path, help="folder for chaos.txt and chaos.json")
    options = parser.parse_args()
    defaults = {**(LONG if options.long else SHORT), "soak_minutes": SOAK_MINUTES[options.long]}
    for name, value in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, 0 if options.only else value)
    options.save = options.save or Path("bench/results") / time.strftime("chaos-%Y%m%d-%H%M%S")
    return options


def main() -> None:
    options = parse()
    facts = describe("pyzmq", "msgpack")
    shape = f"{options.model}, {options.workers} CPU workers, {options.streams} streams"
    report = Report(options.save, facts | {"options": shape}, f"{heading(facts)} | {shape}")
    try:
        for row in rows(options):
            report.add(row)
    except Standstill as error:
        raise SystemExit(str(error)) from None
    report.close()
    assert threading.active_count() == 1, "a stream did not end"
    if not report.is_good:
        raise SystemExit("something was lost, repeated, changed or left behind")


if __name__ == "__main__":
    main()
