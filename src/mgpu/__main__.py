"""``python -m mgpu`` is the command ``mgpu-launch``."""

import importlib.util
import sys


def main() -> None:
    """Run the command line. Ctrl-C ends it without a traceback, also while modules are imported."""
    try:
        _run()
    except KeyboardInterrupt:
        sys.exit(130)


def _run() -> None:
    """Run the command line, or say what to install if even that is missing."""
    if importlib.util.find_spec("click") is None:
        print("error: mgpu-launch needs click; type: pip install mgpu, or pip install 'mgpu[serve]' to serve models",
              file=sys.stderr)  # fmt: skip
        sys.exit(78)
    from mgpu.launch.cli import main as run

    run()


if __name__ == "__main__":
    main()
