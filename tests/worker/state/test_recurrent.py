"""States of linear layers are copied between rows, those of all layers at once."""

import torch

from harness.specs import make_facts
from mgpu.protocol.model.attention_facts import LinearFacts
from mgpu.protocol.model.placement import TensorPart
from mgpu.worker.state.kv_cache import KvCache

FACTS = make_facts(
    q=4, kv=2, layers=3, hidden=64, head_dim=16, linear=LinearFacts((True, False, True), 2, 4, 8, 16, conv_width=4)
)


def test_copying_takes_all_layers_and_leaves_other_rows() -> None:
    types = torch.bfloat16, torch.bfloat16
    cache = KvCache.of_layers(FACTS, range(3), TensorPart(0, 2), (5, 16, 4), types, torch.device("cpu"))
    states = [layer.states for layer in cache.layers if layer.states is not None]
    assert [layer.k_NBJK.shape[0] for layer in cache.layers] == [0, 5, 0]
    assert [each.state_NHKV.shape for each in states] == [(4, 2, 8, 16)] * 2
    assert [each.tail_NWC.shape for each in states] == [(4, 3, 48)] * 2
    for place, each in enumerate(states):
        for row in range(4):
            each.state_NHKV[row], each.tail_NWC[row] = 10 * place + row, 10 * place + row
    cache.copy_states([0, 1], [3, 2])
    for place, each in enumerate(states):
        held = [10 * place + row for row in (0, 1, 1, 0)]
        assert each.state_NHKV[:, 0, 0, 0].tolist() == each.tail_NWC[:, 0, 0].tolist() == held
