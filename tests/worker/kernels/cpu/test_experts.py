"""All experts of a layer by one call against products of one expert after the other."""

import ctypes

import pytest
import torch
from torch import Tensor

from mgpu.protocol.model.expert_facts import Clamp, ExpertFacts
from mgpu.protocol.model.placement import ExpertShard
from mgpu.protocol.model.weight_format import DENSE, LayerFormats, WeightFormat, weight_format
from mgpu.worker.kernels.cpu.experts import has_kernels
from mgpu.worker.layers.experts import host_stream
from mgpu.worker.layers.experts.experts import Experts
from mgpu.worker.layers.experts.host_stream import HostStream
from mgpu.worker.layers.experts.router import Routing
from mgpu.worker.layers.linear import Storage

pytestmark = pytest.mark.skipif(not has_kernels(), reason="needs a C compiler")
COUNT, ACTIVE, HIDDEN = 6, 3, 96
MXFP4 = WeightFormat("fp4", 32, scale_bytes=1, source="MXFP4")
FORMS = {
    "dense": DENSE, "int4": weight_format("4"), "int8": weight_format("8"), "MXFP4": MXFP4,
    "mixed": LayerFormats(gate_up=MXFP4, down=DENSE),
}  # fmt: skip


def make(form: WeightFormat | LayerFormats, experts: range, width: int, activation: str, is_oss: bool) -> Experts:
    """Return experts with random weights, packed or not, before they are finished."""
    clamp = Clamp(1.7, 0.5) if is_oss else None
    facts = ExpertFacts(COUNT, ACTIVE, width, (True,), normalizes=True, bias=is_oss, clamp=clamp)
    of_layer = form if isinstance(form, LayerFormats) else LayerFormats(gate_up=form, down=form)
    storage = Storage(torch.bfloat16, torch.device("cpu"), DENSE, of_layer)
    made = Experts(facts, HIDDEN, activation, ExpertShard(experts, range(width)), storage)
    generator = torch.Generator().manual_seed(1)
    for matrices in (made.gate_up, made.down):
        matrices.init_dummy(generator)
        if matrices.bias is not None:
            matrices.bias.normal_(generator=generator)
    return made


def routing_of(tokens: int) -> Routing:
    generator = torch.Generator().manual_seed(2)
    chosen = torch.stack([torch.randperm(COUNT, generator=generator)[:ACTIVE] for _ in range(tokens)])
    return Routing(chosen, torch.rand(tokens, ACTIVE, generator=generator))


def rows_of(tokens: int) -> Tensor:
    return torch.randn(tokens, HIDDEN, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)


def computed(
    form: str,
    tokens: int,
    experts: range = range(COUNT),
    width: int = 64,
    activation: str = "silu",
    is_oss: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return what the kernel computes, and what torch does."""
    made = make(FORMS[form], experts, width, activation, is_oss)
    expected = made(rows_of(tokens), routing_of(tokens))
    made.finalize()
    assert made.kernel is not None
    return made(rows_of(tokens), routing_of(tokens)).float(), expected.float()


@pytest.mark.parametrize("tokens", [1, 2, 5, 40])
@pytest.mark.parametrize("form", FORMS)
def test_sums_are_those_of_one_expert_after_the_other(form: str, tokens: int) -> None:
    found, expected = computed(form, tokens)
    assert (found - expected).norm() < 0.025 * expected.norm()


@pytest.mark.parametrize("is_oss", [False, True])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_gates_biases_and_experts_of_other_ranks(activation: str, is_oss: bool) -> None:
    for experts in (range(COUNT), range(2, 5), range(5, 6)):
        found, expected = computed("dense", 9, experts, activation=activation, is_oss=is_oss)
        assert (found - expected).norm() < 0.025 * expected.norm()


def test_widths_that_are_no_multiple_of_a_tile() -> None:
    found, expected = computed("dense", 9, width=23)
    assert (found - expected).norm() < 0.025 * expected.norm()


def test_a_row_is_the_same_alone_and_beside_others() -> None:
    made = make(MXFP4, range(COUNT), 64, "silu", is_oss=False)
    made.finalize()
    x_TD, (ids, weights) = rows_of(21), routing_of(21)
    together = made(x_TD, Routing(ids, weights))
    assert torch.equal(together[13:14], made(x_TD[13:14], Routing(ids[13:14], weights[13:14])))


def test_a_stream_calls_it_between_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's functions are played by memmove and by a call: addresses and sizes must be right."""
    called: list[str] = []

    def call(name: str, *arguments: int) -> None:
        called.append(name)
        if name == "cuLaunchHostFunc":
            ctypes.CFUNCTYPE(None, ctypes.c_void_p)(arguments[1])(arguments[2])
        else:
            ctypes.memmove(*arguments[:3])

    monkeypatch.setattr(host_stream, "_call", call)
    monkeypatch.setattr(host_stream, "_stream_of", lambda device: 0)
    stream = HostStream(torch.device("cpu"))
    layers = [make(FORMS[form], range(COUNT), 64, "silu", is_oss=False) for form in ("dense", "int8")]
    for layer in layers:
        layer.finalize()
    for tokens in (40, 1, 7, 7, 64):
        for layer in layers:
            assert layer.kernel is not None
            x_TD, routing = rows_of(tokens), routing_of(tokens)
            assert torch.equal(stream.compute(layer.kernel, x_TD, *routing), layer(x_TD, routing))
    assert called[:5] == ["cuMemcpyDtoHAsync_v2"] * 3 + ["cuLaunchHostFunc", "cuMemcpyHtoDAsync_v2"]
    jobs = len(stream._jobs)
    stream.compute(layers[0].kernel, rows_of(7), *routing_of(7))
    assert len(stream._jobs) == jobs == 8
