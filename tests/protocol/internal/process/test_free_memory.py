from mgpu.protocol.internal.process.free_memory import release_free_memory


def test_releasing_works_here() -> None:
    release_free_memory()
