"""What a request needs to be run, or run again."""

from array import array

from mgpu.orchestrator.scheduler.sequence import Sequence
from mgpu.protocol.front.fields import int32_array
from mgpu.protocol.internal.gateway_messages import Submit
from mgpu.protocol.internal.worker_messages import RowSampling


def test_a_replay_sends_prompt_and_emitted_tokens_with_the_same_sampling() -> None:
    sampling = RowSampling(temperature=0.7, seed=123)
    seq = Sequence.from_submit(Submit(5, array("i", [7, 8]).tobytes(), 4, [2], sampling, b"", 1), 3, 6)
    seq.tokens.append(9)
    seq.row, seq.blocks = 4, [1, 2]
    row = seq.to_new_row()
    assert list(int32_array(row.token_ids)) == [7, 8, 9]
    assert (row.row, row.prompt_len, row.block_ids, row.sampling) == (4, 2, [1, 2], sampling)
    assert seq.order == (1, 3)


def test_a_new_row_keeps_its_blocks_when_the_sequence_grows() -> None:
    seq = Sequence.from_submit(Submit(5, array("i", [7]).tobytes(), 4, [], RowSampling(), b"", 0), 0, 5)
    seq.blocks = [1]
    row = seq.to_new_row()
    seq.blocks.append(2)
    assert row.block_ids == [1]
