"""Code of another library that lets the host wait for the GPU runs without graphs."""

import logging
from types import SimpleNamespace
from typing import Any

import pytest

from mgpu.worker.steps.graph_pool import NotCapturable
from mgpu.worker.steps.graphs import prepared


def test_steps_that_cannot_be_captured_run_without_graphs(caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> None:
        raise NotCapturable("called a synchronizing CUDA operation")

    waiting: Any = SimpleNamespace(prepare=fails)
    with caplog.at_level(logging.WARNING):
        assert prepared(waiting) is None
    assert "launched kernel by kernel" in caplog.text
    fine: Any = SimpleNamespace(prepare=lambda: None)
    assert prepared(fine) is fine
