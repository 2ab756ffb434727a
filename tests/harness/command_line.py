"""Run ``mgpu-launch`` in the test's own process: an interpreter that starts takes half a CPU second each time."""

import io
import os
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from unittest.mock import patch

from mgpu.launch.cli import main


def run_command(*arguments: str, **environ: str) -> "subprocess.CompletedProcess[str]":
    """Return the status and the output of a command, in an environment without options for mgpu and CUDA.

    An exception that a user would see as a traceback is the test's.
    """
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("MGPU_", "CUDA_"))}
    argv, output, errors = ["mgpu-launch", *arguments], io.StringIO(), io.StringIO()
    with (
        patch.dict(os.environ, kept | environ, clear=True),
        patch.object(sys, "argv", argv),
        redirect_stdout(output),
        redirect_stderr(errors),
    ):
        try:
            main()
        except SystemExit as ended:
            status = ended.code
    assert isinstance(status, int)
    return subprocess.CompletedProcess(argv, status, output.getvalue(), errors.getvalue())
