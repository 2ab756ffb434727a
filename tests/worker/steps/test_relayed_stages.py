"""Two stages that a relay connects choose the tokens of one, as CUDA graphs and kernel by kernel."""

from collections.abc import Callable

import pytest
import torch

from harness.models.tiny_models import TinyModel
from harness.ranks.step_plans import BLOCK, BLOCKS_OF_ROW, ROWS, make_plans
from mgpu.protocol.checkpoint.read import read_checkpoint
from mgpu.protocol.model.placement import RankPlace
from mgpu.worker.models.build import build_stage, load_weights
from mgpu.worker.ranks.collectives import MeasurableGroup, SingleRank
from mgpu.worker.ranks.links import Links
from mgpu.worker.ranks.relay import Relay
from mgpu.worker.state.kv_cache import KvCache
from mgpu.worker.state.rows import RowTable
from mgpu.worker.steps.model_runner import ModelRunner

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DEVICE = torch.device("cuda:0")


def make_relays(dim: int) -> tuple[list[Relay], list[torch.Tensor]]:
    """Return the relays of two stages in this process, and the memory behind them."""
    from mgpu.worker.kernels.peers.activations import ActivationReceiver, ActivationSender, InboxShape
    from mgpu.worker.kernels.peers.memory import PeerAlarm
    from mgpu.worker.kernels.peers.token_mail import Mailbox, Postman

    shape = InboxShape(64, dim, 4, torch.float32)
    inbox = torch.empty(shape.nbytes, dtype=torch.uint8, device=DEVICE)
    shape.clear(inbox)
    letters = torch.zeros(ROWS, dtype=torch.int64, device=DEVICE)
    sent, received = torch.zeros((2, shape.rows), dtype=torch.int32, device=DEVICE)
    seen = torch.zeros(1, dtype=torch.int32, pin_memory=True)
    alarm = PeerAlarm(torch.zeros(1, dtype=torch.int32, device=DEVICE), seen, 5_000_000)
    send = ActivationSender(shape, (inbox.data_ptr(),), sent)
    receive = ActivationReceiver(shape, inbox.data_ptr(), received, alarm)
    first = Relay(0, shape.rows, alarm, send, None, Mailbox(letters.data_ptr(), alarm), None)
    last = Relay(1, shape.rows, alarm, None, receive, None, Postman((letters.data_ptr(),)))
    return [first, last], [inbox, letters]


def make_runner(model: TinyModel, place: RankPlace, layers: range, num_stages: int, relay: Relay | None) -> ModelRunner:
    checkpoint = read_checkpoint(model.folder)
    facts, links = checkpoint.facts, Links(MeasurableGroup(SingleRank()), relay=relay)
    stage = build_stage(facts, place, layers, links.group, torch.float32, DEVICE)
    load_weights(stage, checkpoint, lambda count: None)
    blocks = ROWS * BLOCKS_OF_ROW
    cache = KvCache(len(layers), blocks, BLOCK, facts.num_kv_heads, facts.head_dim, torch.float32, DEVICE)
    rows = RowTable(ROWS, BLOCKS_OF_ROW * BLOCK - 1, BLOCK, blocks, DEVICE)
    return ModelRunner(stage, cache, rows, links, facts, place, num_stages)


@pytest.mark.parametrize("uses_graphs", [True, False])
def test_two_stages_choose_the_tokens_of_one(tiny_model: Callable[[str], TinyModel], uses_graphs: bool) -> None:
    model = tiny_model("llama")
    facts = read_checkpoint(model.folder).facts
    half = facts.num_layers // 2
    whole = make_runner(model, RankPlace(0, 0, 0, 1, 0), range(facts.num_layers), 1, None)
    whole._graphs = None
    relays, memory = make_relays(facts.hidden_size)
    first = make_runner(model, RankPlace(0, 0, 0, 1, 0), range(half), 2, relays[0])
    last = make_runner(model, RankPlace(1, 1, 0, 1, 0), range(half, facts.num_layers), 2, relays[1])
    for runner in (first, last):
        assert runner._graphs is not None
        if uses_graphs:
            runner._graphs.prepare()
        else:
            runner._graphs = None
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    for plan in make_plans():
        expected = whole.run(plan)
        with torch.cuda.stream(streams[0]):
            assert first.run(plan) is None
        with torch.cuda.stream(streams[1]):  # no event orders the streams: the last stage waits on the device
            chosen = last.run(plan)
        torch.cuda.synchronize()
        assert (chosen is None) == (expected is None), plan
        if chosen is not None and expected is not None:
            assert chosen.ids_S.tolist() == expected.ids_S.tolist(), plan
    assert all(len(each) for each in memory), "alive until here"
