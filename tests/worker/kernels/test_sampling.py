import pytest
import torch

from mgpu.worker.kernels.sample import sample
from mgpu.worker.kernels.step_inputs import DecodeInputs, prepare_decode
from mgpu.worker.sampling.noise import gumbel, row_keys, token_factors


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_greedy_choice_is_the_first_largest_logit(device: torch.device, dtype: torch.dtype) -> None:
    logits = torch.randn(3, 9000, device=device).to(dtype)
    logits[0, 17] = logits[0, 8000] = 9.0
    logits[2, 100:] = -torch.inf  # padding of the vocabulary
    values, ids = sample(logits, first_id=1000)
    expected = torch.tensor([17, int(logits[1].argmax()), int(logits[2].argmax())], dtype=torch.int32)
    assert torch.equal(ids.cpu(), expected + 1000)
    assert torch.equal(values, logits.float().max(-1).values)


def test_drawn_tokens_equal_those_of_the_torch_sampler(device: torch.device) -> None:
    logits = torch.randn(5, 9000, device=device)
    table = torch.randint(-(2**31), 2**31 - 1, (6, 7), dtype=torch.int32, device=device)
    seeds, temperatures = table[:, 3:5], table.view(torch.float32)[:, 1]
    temperatures.copy_(torch.tensor([0.0, 0.7, 1.3, 0.0, 2.0, 1.0]))
    rows = torch.tensor([4, 1, 3, 2, 5], device=device)
    positions = torch.tensor([5, 100, 3, 77, 1], device=device)
    tokens = torch.zeros(6, 200, dtype=torch.int32, device=device)
    values, ids = sample(
        logits,
        first_id=500,
        rows_S=rows,
        positions_S=positions,
        temperatures=temperatures,
        seeds=seeds,
        tokens=tokens,
    )
    noise = gumbel(row_keys(seeds[rows], positions), token_factors(500, 9000, device))
    drawn = (temperatures[rows] > 0)[:, None]
    scores = torch.where(drawn, logits / temperatures[rows][:, None] + noise, logits)
    assert torch.equal(ids.long(), scores.argmax(-1) + 500)
    assert torch.allclose(values, scores.max(-1).values, atol=1e-5)
    assert torch.equal(tokens[rows, positions], ids)


def test_rows_that_fill_up_a_batch_write_no_token(device: torch.device) -> None:
    tokens = torch.full((2, 4), -1, dtype=torch.int32, device=device)
    rows, positions = torch.tensor([1, 1], device=device), torch.tensor([2, 0], device=device)
    sample(torch.randn(2, 50, device=device), rows_S=rows, positions_S=positions, tokens=tokens)
    assert (tokens == -1).sum() == 7
    assert tokens[1, 2] >= 0


def test_temperatures_need_their_rows() -> None:
    with pytest.raises(ValueError, match="rows_S"):
        sample(torch.zeros(1, 8), temperatures=torch.ones(1))


def test_decode_inputs_come_from_the_persistent_rows(device: torch.device) -> None:
    table = torch.randint(0, 99, (8, 99), dtype=torch.int32, device=device)
    blocks, tokens = table[:, 3:9], table[:, 9:]
    rows, starts = torch.tensor([3, 7, 1, 0], device=device), torch.tensor([33, 80, 0, 5], device=device)
    inputs = DecodeInputs.create(4, 6, device)
    inputs.block_tables.fill_(-1)
    prepare_decode(rows, starts, torch.tensor([3], device=device), tokens, blocks, 16, inputs)
    active, used = rows[:3], starts[:3]
    pages = blocks[active, used // 16].long()
    assert torch.equal(inputs.token_ids[:3], tokens[active, used].long())
    assert inputs.positions.tolist() == [33, 80, 0, 0]
    assert inputs.slots.tolist() == [*(pages * 16 + used % 16).tolist(), -1]
    assert inputs.context_lens.tolist() == [34, 81, 1, 0]
    for i, count in enumerate((3, 6, 1)):
        assert torch.equal(inputs.block_tables[i, :count], blocks[rows[i], :count])
        assert (inputs.block_tables[i, count:] == -1).all()
    assert inputs.token_ids[3] == 0


def test_layers_that_keep_blocks_in_sight_only_have_tables_of_their_own(device: torch.device) -> None:
    table = torch.zeros((4, 99), dtype=torch.int32, device=device)
    blocks, tokens = table[:, 3:9], table[:, 9:]
    blocks.copy_(torch.arange(24, dtype=torch.int32).view(4, 6))
    pages = torch.arange(100, 200, dtype=torch.int32, device=device)
    rows, starts = torch.tensor([3, 1, 0], device=device), torch.tensor([32, 33, 7], device=device)
    appended, new_pages = torch.tensor([77, -1, 88], device=device), torch.tensor([5, 0, 6], device=device)
    inputs = DecodeInputs.create(3, 6, device, has_pages=True)
    count = torch.tensor([2], device=device)
    prepare_decode(rows, starts, count, tokens, blocks, 16, inputs, appended, pages, new_pages)
    assert inputs.page_slots is not None
    assert inputs.page_tables is not None
    assert inputs.page_slots.tolist() == [5 * 16, 108 * 16 + 1, -1]
    assert inputs.page_tables[:2, :3].tolist() == [[118, 119, 5], [106, 107, 108]]
    assert inputs.block_tables[:2, :3].tolist() == [[18, 19, 77], [6, 7, 8]]
    assert [page for block, page in enumerate(pages.tolist()) if page != 100 + block] == [5], "noted for later steps"


def test_new_blocks_are_appended_before_they_are_used(device: torch.device) -> None:
    table = torch.zeros((4, 99), dtype=torch.int32, device=device)
    blocks, tokens = table[:, 3:9], table[:, 9:]
    blocks.copy_(torch.arange(24, dtype=torch.int32).view(4, 6))
    rows, starts = torch.tensor([3, 1, 0], device=device), torch.tensor([32, 33, 7], device=device)
    appended = torch.tensor([77, -1, 88], device=device)
    inputs = DecodeInputs.create(3, 6, device)
    prepare_decode(rows, starts, torch.tensor([2], device=device), tokens, blocks, 16, inputs, appended)
    assert inputs.slots.tolist() == [77 * 16, 8 * 16 + 1, -1]
    assert inputs.block_tables[:2, :3].tolist() == [[18, 19, 77], [6, 7, 8]]
    assert blocks[3].tolist() == [18, 19, 77, 21, 22, 23]
    assert blocks[:3].flatten().tolist() == list(range(18))
