"""The tensors of one step, as the model sees them."""

from dataclasses import dataclass, replace
from typing import NamedTuple

from torch import Tensor

# T tokens of the step, R rows (requests) in it, S rows that sample, B blocks of the longest table


@dataclass(frozen=True, slots=True)
class StepRows:
    """The rows of a step, as layers with states see them."""

    rows_R: Tensor
    """Which row of the worker each one is. int64."""
    starts: Tensor
    """int32 [R + 1]: the first token of each."""
    context_lens: Tensor
    """int32 [R]: the tokens of each after this step."""
    counts_host: list[int]
    """Tokens of each in this step."""
    contexts_host: list[int]


class InPages(NamedTuple):
    """The same step in layers that keep blocks in sight only, each in a page."""

    slots: Tensor
    """int64 [T]."""
    tables: Tensor
    """int32 [R, B]; entries before what a row sees are arbitrary but valid page numbers."""


@dataclass(slots=True)
class StepBatch:
    """R rows whose tokens of this step are concatenated; all tensors are on the worker's device.

    Row r has tokens ``query_starts[r]:query_starts[r + 1]``. They are its last ones: after this step its context has
    ``context_lens[r]`` tokens, the new ones included.
    """

    rows: Tensor
    """int64 [R]: which row of the worker each one is."""
    token_ids: Tensor
    """int64 [T]; has a meaning on the first stage only."""
    positions: Tensor
    """int64 [T]: position of each token in its request."""
    slots: Tensor
    """int64 [T]: where a token's key and value go: block * block_size + offset."""
    query_starts: Tensor
    """int32 [R + 1]."""
    context_lens: Tensor
    """int32 [R]."""
    block_tables: Tensor
    """int32 [R, B]; entries past a row's context are arbitrary but valid block numbers."""
    logit_rows: Tensor
    """int64 [S]: index into T of the last token of each row that samples."""
    query_lens_host: list[int]
    """Tokens per row, on the host."""
    context_lens_host: list[int]
    """``context_lens`` on the host, so that the host need not wait for the device."""
    in_pages: InPages | None = None
    """None: all layers keep all blocks."""

    def for_pages(self) -> "StepBatch | None":
        """Return the step as layers with pages see it; None if no layer has them."""
        if self.in_pages is None:
            return None
        return replace(self, slots=self.in_pages.slots, block_tables=self.in_pages.tables, in_pages=None)

    @property
    def step_rows(self) -> StepRows:
        return StepRows(self.rows, self.query_starts, self.context_lens, self.query_lens_host, self.context_lens_host)
