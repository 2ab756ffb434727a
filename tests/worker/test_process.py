"""Workers as processes: their life from the spec to the last step, and every way in which it ends."""

from collections.abc import Callable
from pathlib import Path

import pytest
from fake_orchestrator import make_spec, running
from tiny_models import TinyModel

MakeModel = Callable[[str], TinyModel]


def test_one_worker_serves_greedy_tokens(tiny_model: MakeModel, tmp_path: Path) -> None:
    model = tiny_model("llama")
    with running(make_spec(model.folder, [1]), tmp_path) as workers:
        workers.make_ready()
        assert workers.generate(model.prompt_ids, len(model.output_ids)) == model.output_ids
        workers.shut_down()


@pytest.mark.parametrize("transport", ["shared-memory", "gloo"])
@pytest.mark.parametrize("sizes", [[2], [1, 1], [2, 2], [1, 2], [2, 1]], ids=str)
def test_every_layout_gives_the_same_tokens(
    tiny_model: MakeModel, tmp_path: Path, sizes: list[int], transport: str
) -> None:
    model = tiny_model("llama")
    with running(make_spec(model.folder, sizes, transport), tmp_path) as workers:
        workers.make_ready()
        assert workers.generate(model.prompt_ids, len(model.output_ids)) == model.output_ids
        workers.shut_down()
