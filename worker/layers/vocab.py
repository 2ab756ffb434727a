"""Token embedding and language-model head, split over the ranks by vocabulary rows.

The vocabulary is padded so that every rank holds the same number of rows; padding rows are zero and their logits -inf.
Ranks with unequal shares of the heads have such shares of the vocabulary too, which then needs no padding.
"""

# T tokens, S rows that sample, D model dim, W vocabulary rows of this rank

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.model.placement import TensorPart
from mgpu.protocol.model.weight_format import DENSE, WeightFormat
from mgpu.worker.kernels.cpu.tiles import TiledWeight, multiply, tiled
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.products.choose import dense_product, embed_kernel, packed_head_product, packed_rows
from mgpu.worker.layers.products.cpu_matmul import pack
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.quantization.packing import PackedWeight
from mgpu.worker.quantization.random_packed import random_packed
from mgpu.worker.ranks.collectives import TensorParallelGroup

_TIED_COPY_BYTES = 256 << 20
"""A tied head larger than this is not worth a second copy in the CPU's packed layout (5 % of a step of 8 rows)."""


class VocabParallel(Module):
    """One rank's rows of a [vocabulary, D] matrix, as embedding, as head, or as both when they are tied."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        group: TensorParallelGroup,
        dtype: torch.dtype,
        device: torch.device,
        part: TensorPart | None = None,
        form: WeightFormat = DENSE,
    ) -> None:
        slices = (part or TensorPart(group.rank, group.size)).vocabulary(vocab_size)
        rows = len(slices[group.rank])
        self.group = group
        self.start = slices[group.rank].start
        self.padded_size = slices[-1].stop
        """Rows of all ranks together."""
        self.num_valid = max(0, min(rows, vocab_size - self.start))
        self.packed_head: Tensor | None = None
        self._multiply = dense_product(device)
        self._embed_rows = embed_kernel(device)
        self._form, self._shape = form, (rows, hidden_size)
        self.packed: PackedWeight | TiledWeight | None = None
        """The rows as a GGUF file has them, repacked on some CPUs; ``weight`` is empty then."""
        is_dense = form.quant == "none"
        self.weight = torch.empty(self._shape if is_dense else (0, hidden_size), dtype=dtype, device=device)
        if not is_dense:
            self._widen, self._multiply_packed = packed_rows(device), packed_head_product(device, form)

    @property
    def is_packed(self) -> bool:
        return self._form.quant != "none"

    def embed(self, token_ids_T: Tensor) -> Tensor:
        """Look the tokens up: each rank has its own rows and zeros elsewhere; the sum over ranks is the embedding."""
        if self.group.size == 1:
            return self._look_up(token_ids_T)
        return self.group.all_reduce(self._look_up_own(token_ids_T))

    def _look_up_own(self, token_ids_T: Tensor) -> Tensor:
        """Return this rank's rows, and zeros for the tokens of other ranks."""
        if self.packed is None and self._embed_rows is not None:
            return self._embed_rows(token_ids_T, self.weight, self.start, self.num_valid)
        local_T = token_ids_T - self.start
        is_mine_T = (local_T >= 0) & (local_T < self.num_valid)
        x_TD = self._look_up(local_T.where(is_mine_T, 0))
        # where, not a product: the row that stands in for a foreign token may hold anything.
        return x_TD.where(is_mine_T.unsqueeze(1), 0.0)

    def _look_up(self, rows_T: Tensor) -> Tensor:
        """Return some of this rank's rows."""
        if self.packed is None:
            return F.embedding(rows_T, self.weight)
        if isinstance(self.packed, TiledWeight):
            return self.packed.rows(rows_T, self.weight.dtype)
        return self._widen(self.packed.changed(lambda tensor: tensor.index_select(0, rows_T)), self.weight.dtype)

    def logits(self, x_SD: Tensor) -> Tensor:
        """Return this rank's logits [S, W] in the model's dtype."""
        if isinstance(self.packed, TiledWeight):
            logits_SW = multiply(x_SD, self.packed)
        elif self.packed is not None:
            logits_SW = self._multiply_packed(x_SD, self.packed, None)
        else:
            logits_SW = self._multiply(x_SD, self.weight if self.packed_head is None else self.packed_head, None)
        if self.num_valid < logits_SW.shape[1]:
            logits_SW[:, self.num_valid :] = -torch.inf
        return logits_SW

    def load(self, reader: WeightReader, name: str) -> None:
        """Read this rank's rows; zero the padding."""
        if self.is_packed:
            self._load_packed(reader, f"{name}.weight")
            return
        if self.num_valid:
            reader.fill_rows(self.weight[: self.num_valid], f"{name}.weight", self.start)
        self.weight[self.num_valid :].zero_()

    def _load_packed(self, reader: WeightReader, name: str) -> None:
        """Read the rows packed. A rank of padding alone reads one row, for its format, and drops it."""
        first = self.start if self.num_valid else 0
        read = reader.packed_rows([(name, range(first, first + max(1, self.num_valid)))])
        missing = self._shape[0] - self.num_valid
        self.packed = read.changed(
            lambda tensor: (
                torch.cat((tensor[: self.num_valid], tensor.new_zeros((missing, *tensor.shape[1:]))))
                if missing
                else tensor
            )
        )

    def init_dummy(self, generator: torch.Generator) -> None:
        if self.is_packed:
            self.packed = random_packed(self._form, self._shape[:1], self._shape[1], generator)
            return
        self.weight.normal_(0.0, self.weight.shape[1] ** -0.5, generator=generator)
        self.weight[self.num_valid :].zero_()

    def finalize_head(self, is_embedding_too: bool) -> None:
        """Repack the loaded rows for `logits`; if `embed` needs dense ones too, keep them beside the packed ones."""
        if isinstance(self.packed, PackedWeight) and self.weight.dtype == torch.bfloat16 and _is_on_cpu(self.packed):
            self.packed = tiled(self.packed) or self.packed
        if self.packed is not None or (is_embedding_too and self.weight.nbytes > _TIED_COPY_BYTES):
            return
        packed = pack(self.weight)
        if packed is self.weight:
            return
        self.packed_head = packed
        if not is_embedding_too:
            self.weight = torch.empty(0, dtype=packed.dtype)

    def weight_bytes(self) -> int:
        """Return the memory of the rows in all layouts that they are held in."""
        held = self.weight.numel() + (0 if self.packed_head is None else self.packed_head.numel())
        return held * self.weight.dtype.itemsize + (0 if self.packed is None else self.packed.nbytes)


def _is_on_cpu(weight: PackedWeight) -> bool:
    return weight.words.device.type == "cpu"
