"""The order in which sequences go back to the workers."""

from array import array

from mgpu.orchestrator.scheduler.crash_suspects import FATAL_CRASHES
from mgpu.orchestrator.scheduler.sequence import Sequence
from mgpu.orchestrator.scheduler.waiting import WaitingLine
from mgpu.protocol.internal.worker_messages import RowSampling


def begun(turn: int, crashes: int = 0) -> Sequence:
    seq = Sequence(turn, array("i", [1]), 1, 9, frozenset(), RowSampling(), b"", (0, turn))
    seq.turn, seq.crashes = turn, crashes
    return seq


def test_after_a_crash_suspects_go_first_and_the_others_in_their_old_order() -> None:
    line = WaitingLine()
    innocent = [begun(0), begun(1), begun(4)]
    suspects = [begun(2, FATAL_CRASHES), begun(3, FATAL_CRASHES + 1)]
    line.bring_back([innocent[2], suspects[1], innocent[0], suspects[0], innocent[1]])
    assert [line.take_first() for _ in range(5)] == [*suspects, *innocent]


def test_one_that_ended_in_line_is_never_first() -> None:
    line = WaitingLine()
    line.bring_back([begun(0), begun(1)])
    first = line.first()
    assert first is not None
    first.finished = True
    assert line.first() is not first
