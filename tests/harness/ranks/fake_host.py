"""A host that joins as ``python -m mgpu.worker --join`` does, with the fake worker of this harness."""

import argparse
import sys

from mgpu.worker.start.join.command import run_joined
from mgpu.worker.start.join.options import add_options

if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    add_options(parser)
    sys.exit(run_joined(parser.parse_args(), (sys.executable, "-m", "harness.servers.fake_worker")))
