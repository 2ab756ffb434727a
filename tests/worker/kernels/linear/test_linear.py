"""Kernels of linear attention against the plain form of the rule."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from harness.kernels.kernel_checks import relative_error, tolerance
from harness.models.tiny_models import TinyModel
from harness.ranks.rank_threads import ThreadGroup, run_ranks
from harness.ranks.stage_driver import Row, Stages, make_batch
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.model.attention_facts import LinearFacts
from mgpu.worker.attention import rule_check
from mgpu.worker.attention.rule_check import rule_problem
from mgpu.worker.kernels.linear import rule
from mgpu.worker.kernels.linear import scan as scan_module
from mgpu.worker.kernels.linear.convolve import convolve_decoding, convolve_prompts, empty_outputs
from mgpu.worker.kernels.linear.inputs import RuleInputs, RuleWeights, StateRows, owners_of
from mgpu.worker.kernels.linear.project import project_and_convolve
from mgpu.worker.kernels.linear.scan import rule_scan
from mgpu.worker.kernels.linear.step import rule_step
from mgpu.worker.kernels.products.gemv import GemvTiling

KEYS, SHARED, WIDTH = 2, 2, 4
K, V = (128, 128) if torch.cuda.is_available() else (16, 32)
HEADS, CHANNELS = KEYS * SHARED, 2 * KEYS * K + KEYS * SHARED * V
SLOTS = 6


class Case:
    """A layer with random weights, states of several rows, and the product of a step's projections."""

    def __init__(self, device: torch.device, dtype: torch.dtype, tokens: int) -> None:
        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, device=device)

        self.weights = RuleWeights(
            draw(CHANNELS, WIDTH).mul_(0.5).to(dtype), draw(V).to(dtype), draw(HEADS), draw(HEADS), 1e-6, KEYS, K, V
        )
        self.projected = draw(tokens, CHANNELS + HEADS * V + 2 * HEADS).to(dtype)
        gates = self.projected[:, CHANNELS : CHANNELS + HEADS * V].view(tokens, HEADS, V)
        self.inputs = RuleInputs(self.projected[:, :CHANNELS], self.projected[:, -2 * HEADS :], gates)
        pool, tails = draw(SLOTS, 3, HEADS, K, V), draw(SLOTS, 3, WIDTH - 1, CHANNELS).to(dtype)
        self.state, self.tail = pool[:, 1], tails[:, 1]
        self.out = torch.full((tokens, HEADS, V), 7.0, device=device, dtype=dtype)

    def expected(self, row: int, new: slice, is_new: bool) -> tuple[Tensor, Tensor, Tensor]:
        """Return outputs, state and tail of one row's tokens, in float32 and by the plain rule."""
        zero = 0.0 if is_new else 1.0
        state = torch.where(torch.tensor(is_new), 0.0, self.state[row].float().nan_to_num())
        tail = self.tail[row].float().nan_to_num() * zero
        window = torch.cat((tail, self.inputs.inputs_TC[new].float()))
        weight = self.weights.conv_CW.float().unsqueeze(1)
        mixed = F.silu(F.conv1d(window.T.unsqueeze(0), weight, groups=CHANNELS)[0]).T
        q, k, v = mixed.split([KEYS * K, KEYS * K, HEADS * V], dim=1)
        q, k = rule.queries_and_keys(q.reshape(-1, KEYS, K), k.reshape(-1, KEYS, K), HEADS)
        beta, fading = self.inputs.rates_T2H[new].float().chunk(2, dim=-1)
        g = -self.weights.log_rate_H.exp() * F.softplus(fading + self.weights.bias_H)
        out, state = rule.scan(q, k, v.reshape(-1, HEADS, V), g, beta.sigmoid(), state)
        normed = F.rms_norm(out, (V,), self.weights.norm_V.float(), self.weights.eps)
        return normed * F.silu(self.inputs.gates_THV[new].float()), state, window[len(window) - WIDTH + 1 :]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoding_rows_equal_the_rule(device: torch.device, dtype: torch.dtype) -> None:
    case, rows = Case(device, dtype, 4), [3, 0, 5, 1]
    lens = [9, 0, 1, 2]  # the second only pads the step, the third is new
    case.state[5], case.tail[5] = torch.nan, torch.nan
    before = case.state[0].clone(), case.tail[0].clone()
    expected = [case.expected(row, slice(at, at + 1), lens[at] == 1) for at, row in enumerate(rows)]
    mixed = empty_outputs(case.projected, CHANNELS)
    step = StateRows(torch.tensor(rows, device=device), torch.tensor(lens, dtype=torch.int32, device=device))
    convolve_decoding(case.inputs.inputs_TC, case.tail, case.weights.conv_CW, step, mixed)
    rule_step(mixed, case.inputs, case.state, case.weights, step, case.out)
    for at, row in enumerate(rows):
        if lens[at]:
            for found, wanted in zip((case.out[at], case.state[row], case.tail[row]), expected[at], strict=True):
                assert relative_error(found, wanted.squeeze(0)) < tolerance(dtype)
    assert not case.out[1].any()
    assert torch.equal(case.state[0], before[0])
    assert torch.equal(case.tail[0], before[1])


@pytest.mark.parametrize(("context", "dtype"), [(0, torch.float32), (1, torch.bfloat16), (9, torch.float32)])
def test_a_single_row_is_projected_and_convolved_at_once(
    device: torch.device, dtype: torch.dtype, context: int
) -> None:
    case = Case(device, dtype, 1)
    x, weight = torch.randn(1, 80, device=device).to(dtype), torch.randn(CHANNELS + 7, 80, device=device).to(dtype)
    weight *= 80**-0.5
    rows = StateRows(torch.tensor([4], device=device), torch.tensor([context], dtype=torch.int32, device=device))
    if context == 1:
        case.tail[4] = torch.nan
    tail = case.tail.clone()
    product = F.linear(x.float(), weight.float()).to(dtype)
    mixed = empty_outputs(product, CHANNELS)
    convolve_decoding(product[:, :CHANNELS], tail, case.weights.conv_CW, rows, mixed)
    found = project_and_convolve(x, weight, case.weights.conv_CW, case.tail, rows, GemvTiling(64, 64, 1))
    assert relative_error(found[:, CHANNELS:], product[:, CHANNELS:]) < tolerance(dtype)
    if context:
        assert relative_error(found[:, :CHANNELS], mixed) < 2 * tolerance(dtype)
        assert relative_error(case.tail[4], tail[4]) < tolerance(dtype)
    assert torch.equal(case.tail[:4], tail[:4])
    assert context or torch.equal(case.tail[4], tail[4])


@pytest.mark.parametrize(
    ("dtype", "shared"),
    [
        (torch.float32, 227 << 10),
        (torch.float32, 99 << 10),
        pytest.param(torch.bfloat16, 227 << 10, marks=pytest.mark.gpu),
    ],
)
def test_prompts_equal_the_rule(
    device: torch.device, dtype: torch.dtype, shared: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scan_module, "shared_bytes", lambda device: shared)
    """Behind two tokens of rows that decode: a new prompt of two chunks, three tokens more, two tokens, and padding."""
    if device.type == "cpu" and dtype == torch.bfloat16:
        pytest.skip("the interpreter is slow, and has no bfloat16 of its own")
    counts, lens, rows = [0, 66, 3, 2], [0, 66, 80, 2], [3, 5, 0, 2]
    total = 2 + sum(counts)
    case = Case(device, dtype, total + 3)
    case.state[5], case.tail[5], case.state[2], case.tail[2] = (torch.nan,) * 4
    starts = torch.tensor([2, 2, 68, 71, 73], dtype=torch.int32, device=device)
    expected = {
        at: case.expected(rows[at], slice(int(starts[at]), int(starts[at + 1])), counts[at] == lens[at])
        for at in range(1, 4)
    }
    mixed = empty_outputs(case.projected, CHANNELS)
    step = StateRows(
        torch.tensor(rows, device=device), torch.tensor(lens, dtype=torch.int32, device=device), starts,
        owners_of(starts, total + 3),
    )  # fmt: skip
    assert step.owners_T is not None
    assert step.owners_T.tolist() == [-1] * 2 + [1] * 66 + [2] * 3 + [3] * 2 + [-1] * 3
    convolve_prompts(case.inputs.inputs_TC, case.tail, case.weights.conv_CW, step, mixed)
    rule_scan(mixed, case.inputs, case.state, case.weights, step, case.out)
    for at, wanted in expected.items():
        new = slice(int(starts[at]), int(starts[at + 1]))
        for found, right in zip((case.out[new], case.state[rows[at]], case.tail[rows[at]]), wanted, strict=True):
            assert relative_error(found, right) < tolerance(dtype)
    assert (case.out[:2] == 7.0).all()
    assert (case.out[total:] == 7.0).all()


def test_a_stage_by_kernels_equals_transformers(tiny_model: Callable[[str], TinyModel], device: torch.device) -> None:
    model = tiny_model("qwen3.5")
    ids = model.prompt_ids

    def work(group: ThreadGroup) -> tuple[Tensor, Tensor, Tensor]:
        stages = Stages(read_checkpoint(model.folder), group, [range(3)], device=device)
        [stage] = stages.stages
        stage.assume_kernels()
        stage.max_positions = 32
        rows = [Row([9, 2, 11, 4]), Row([1, 0, 3, 5])]
        first = stages.step(make_batch([(rows[0], ids[:5]), (rows[1], ids[:2])], 4, device=device))
        second = stages.step(make_batch([(rows[1], ids[2:3]), (rows[0], ids[5:7])], 4, device=device))
        return first, second, stages.step(make_batch([(rows[0], ids[7:8])], 4, device=device))

    first, second, third = run_ranks(1, work)[0]
    torch.testing.assert_close(third.cpu(), model.logits[[7]], atol=1e-4, rtol=0)
    torch.testing.assert_close(first.cpu(), model.logits[[4, 1]], atol=1e-4, rtol=0)
    torch.testing.assert_close(second.cpu(), model.logits[[2, 6]], atol=1e-4, rtol=0)


def test_the_check_at_the_start_finds_a_fault(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    linear = LinearFacts((True,), 1, 2, 16, 16, conv_width=4)
    assert rule_problem(device, linear, torch.float32) is None
    monkeypatch.setattr(rule_check, "compute", lambda inputs, *parts: torch.zeros_like(inputs.gates_THV))
    assert "is off by" in str(rule_problem.__wrapped__(device, linear, torch.float32))
    assert "powers of two" in str(rule_problem(device, replace(linear, key_dim=24), torch.float32))
