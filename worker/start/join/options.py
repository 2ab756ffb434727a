"""The options of a worker that joins, apart from what they need: a worker of one machine imports them too."""

import argparse

JOIN_TIMEOUT_S = 600.0


def add_options(parser: argparse.ArgumentParser) -> None:
    """Declare the options of a worker that joins."""
    join = parser.add_argument_group("to join a server over tcp (docs/several-hosts.md)")
    join.add_argument("--join", metavar="tcp://HEAD:PORT", help="address of --join of `mgpu-launch serve`")
    join.add_argument("--keys", metavar="FILE", help="key file of this host, of `mgpu-launch keygen --worker NAME`")
    join.add_argument("-m", "--model", metavar="MODEL", help="the model's folder or .gguf file on this host")
    join.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto", help="auto: a GPU if there are any")
    join.add_argument(
        "--join-timeout",
        type=float,
        default=JOIN_TIMEOUT_S,
        metavar="SECONDS",
        help=f"how long to call a server that does not answer [default: {JOIN_TIMEOUT_S:g}]",
    )
