"""When the engine returns memory to the system."""

from mgpu.orchestrator.engine.free_memory import INTERVAL_S, MANY, FreeMemory


class Engine:
    def __init__(self) -> None:
        self.now_s, self.released = 100.0, 0
        self.memory = FreeMemory(lambda: self.now_s, self._release)

    def _release(self) -> None:
        self.released += 1

    def look(self, *counts: int) -> int:
        for count in counts:
            self.memory.look(count)
        return self.released


def test_memory_is_released_when_most_of_many_have_gone() -> None:
    engine = Engine()
    assert engine.look(10, 4 * MANY, 2 * MANY) == 0
    assert engine.look(2 * MANY - 1) == 1
    assert engine.look(MANY, 10) == 1, "once in a while"
    engine.now_s += INTERVAL_S
    assert engine.look(10) == 2


def test_few_that_come_and_go_release_nothing() -> None:
    engine = Engine()
    for _ in range(100):
        engine.now_s += INTERVAL_S
        engine.look(MANY - 1, 0)
    assert engine.released == 0
