import subprocess
import sys


def test_worker_imports_without_triton() -> None:
    code = "import sys; sys.modules['triton'] = None; import mgpu.worker, mgpu.worker.state.batch, mgpu.worker.kernels"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
