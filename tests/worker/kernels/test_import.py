import subprocess
import sys


def test_worker_imports_without_triton() -> None:
    names = "worker", "worker.start.worker", "worker.kernels.attention.inputs", "worker.kernels.peers.memory"
    code = f"import sys; sys.modules['triton'] = None; import {', '.join(f'mgpu.{name}' for name in names)}"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
