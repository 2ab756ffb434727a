"""Linear attention by the gated delta rule: projections, a short convolution, the rule, and a gated norm.

Split by heads: a rank has some key heads with the value heads that share them, their channels of the convolution and
their columns of the output projection.
"""

# T tokens, R rows that decode, D model dim, H value heads of this rank, G key heads of this rank, K key dim,
# V value dim, C channels of this rank, W inputs of the convolution before the newest one

import torch
import torch.nn.functional as F
from torch import Tensor

from mgpu.protocol.checkpoint.read import CheckpointError
from mgpu.protocol.model.attention_facts import LinearFacts
from mgpu.protocol.model.facts import ModelFacts
from mgpu.protocol.model.placement import key_head_range
from mgpu.worker.attention.interface import StepAttention
from mgpu.worker.kernels.linear import rule
from mgpu.worker.kernels.linear.inputs import RuleInputs, RuleWeights, StateRows, StepStates
from mgpu.worker.kernels.use import uses_kernels
from mgpu.worker.layers.activations import Activations, scaled
from mgpu.worker.layers.linear import ColumnParallelLinear, RowParallelLinear, RowSlice, Storage
from mgpu.worker.layers.module import Module
from mgpu.worker.layers.partial_sum import Delta
from mgpu.worker.loaders.reader import WeightReader
from mgpu.worker.ranks.collectives import TensorParallelGroup
from mgpu.worker.state.batch import StepRows
from mgpu.worker.state.recurrent import LayerStates


class LinearConstants(Module):
    """The small weights of one rank's heads: convolution, rates of fading, and the norm of a head's output."""

    def __init__(self, facts: LinearFacts, heads: range, storage: Storage) -> None:
        self._facts, self._heads = facts, heads
        self.shared = facts.value_heads // facts.key_heads
        count, device = len(heads) * self.shared, storage.device
        channels = 2 * len(heads) * facts.key_dim + count * facts.value_dim
        self.weight = torch.empty((channels, facts.conv_width), dtype=storage.dtype, device=device)
        self.norm = torch.empty(facts.value_dim, dtype=storage.dtype, device=device)
        self.bias_H = torch.empty(count, dtype=torch.float32, device=device)
        self.log_rate_H = torch.empty(count, dtype=torch.float32, device=device)

    def log_fading(self, a_TH: Tensor) -> Tensor:
        """Return g, the logarithm of what is left of a state, float32."""
        return -self.log_rate_H.exp() * F.softplus(a_TH.float() + self.bias_H)

    def load(self, reader: WeightReader, prefix: str) -> None:
        facts, heads = self._facts, self._heads
        keys, values = len(heads) * facts.key_dim, len(self.bias_H) * facts.value_dim
        first_key, first_value = heads.start * facts.key_dim, heads.start * self.shared
        all_keys = facts.key_heads * facts.key_dim
        starts = first_key, all_keys + first_key, 2 * all_keys + first_value * facts.value_dim
        for part, start in zip(torch.split(self.weight, [keys, keys, values]), starts, strict=True):
            reader.fill_rows(part, f"{prefix}.conv1d.weight", start)
        reader.fill_rows(self.norm, f"{prefix}.norm.weight")
        reader.fill_rows(self.bias_H, f"{prefix}.dt_bias", first_value)
        reader.fill_rows(self.log_rate_H, f"{prefix}.A_log", first_value)
        if reader.stores_rates:
            reader.after(lambda: self._take_logarithms(f"{prefix}.A_log"))

    def _take_logarithms(self, name: str) -> None:
        """Turn rates below zero into logarithms. CheckpointError for others."""
        self.log_rate_H.neg_().log_()
        if torch.isnan(self.log_rate_H).any():
            raise CheckpointError(f"tensor {name!r} holds a rate above zero: the file is corrupt; download it again")

    def init_dummy(self, generator: torch.Generator) -> None:
        """Draw weights that keep the scale of their input, and rates from slow to fast."""
        self.weight.normal_(0.0, self._facts.conv_width**-0.5, generator=generator)
        self.norm.fill_(1.0)
        self.bias_H.fill_(1.0)
        self.log_rate_H.copy_(torch.linspace(0.01, 16.0, len(self.log_rate_H)).log())

    def weight_bytes(self) -> int:
        return sum(each.nbytes for each in (self.weight, self.norm, self.bias_H, self.log_rate_H))


class LinearAttention(Module):
    """Gated delta rule over the states of the step's rows."""

    def __init__(self, facts: ModelFacts, group: TensorParallelGroup, storage: Storage) -> None:
        linear = facts.linear
        assert linear is not None, "the model has linear layers"
        heads = key_head_range(linear, group.rank, group.size)
        self.constants = LinearConstants(linear, heads, storage)
        shared = self.constants.shared
        self.num_keys, self.num_values = len(heads), len(heads) * shared
        self.key_dim, self.value_dim, self.eps = linear.key_dim, linear.value_dim, facts.rms_norm_eps
        value_rows = shared * linear.value_dim
        wide = ("query", self.key_dim), ("key", self.key_dim), ("value", value_rows), ("gate", value_rows)
        slices = _slices(heads, wide)
        narrow = _slices(heads, (("beta", shared), ("decay", shared)))
        self.rates: ColumnParallelLinear | None = None
        """Projects what gates and fades the state, if the larger projection is quantized: then it stays dense."""
        if (held := storage.of_qkv()).form.quant == "none":
            slices += narrow
        else:
            dense = Storage(storage.dtype, storage.device)
            self.rates = ColumnParallelLinear(facts.hidden_size, narrow, False, dense)
        counts = (3 * len(heads), len(heads)) if held.parts else ()  # gates are a tensor of their own in the file
        self.project = ColumnParallelLinear(facts.hidden_size, slices, False, held, counts)
        self._has_kernels = uses_kernels(storage.device)
        columns = range(heads.start * value_rows, heads.stop * value_rows)
        self.tiles = shared if linear.values_are_tiled else 1
        """Value heads of a key head, if the output projection takes the first ones of all key heads first."""
        self.out = RowParallelLinear(
            columns, facts.hidden_size, False, group, storage.of_out(), _tiled_columns(linear, heads)
        )

    def __call__(self, x_TD: Activations, step: StepAttention, states: LayerStates) -> Delta:
        assert isinstance(x_TD, Tensor), "the norm before linear attention does not quantize"
        row = self._single_row(x_TD, step)
        projected = scaled(self.project(x_TD)) if row is None else self._project_single_row(x_TD, row, states)
        rates = projected if self.rates is None else scaled(self.rates(x_TD))
        inputs_TC, gate_THV = self._inputs_and_gates(projected)
        rates = rates[:, -2 * self.num_values :]
        if step.states is not None:
            inputs = RuleInputs(inputs_TC, rates, gate_THV)
            return self._output(self._by_kernels(inputs, step.states, states, row is not None))
        assert step.rows is not None, "only kernels are captured"
        beta_TH, fading_TH = rates.chunk(2, dim=-1)
        fadings = beta_TH.float().sigmoid(), self.constants.log_fading(fading_TH)
        out_THV = self._plain(inputs_TC, *fadings, step.rows, states)
        normed_THV = F.rms_norm(out_THV, (self.value_dim,), self.constants.norm.float(), self.eps)
        gated_THV = normed_THV * F.silu(gate_THV.float())
        return self._output(gated_THV.to(x_TD.dtype))

    def _output(self, gated_THV: Tensor) -> Delta:
        """Return the projection of all heads, which are brought into the order of its columns."""
        if self.tiles > 1:
            of_keys = gated_THV.view(len(gated_THV), self.num_keys, self.tiles, self.value_dim)
            gated_THV = of_keys.transpose(1, 2)
        return self.out.partial(gated_THV.flatten(1))

    def _single_row(self, x_TD: Tensor, step: StepAttention) -> StateRows | None:
        """Return the only row of a step, which decodes, if one kernel can project and convolve it."""
        if not self._has_kernels or self.rates is not None or step.states is None or len(x_TD) != 1:
            return None
        return step.states.decode if step.states.prompts is None else None

    def _project_single_row(self, x_1D: Tensor, row: StateRows, states: LayerStates) -> Tensor:
        from mgpu.worker.kernels.linear.project import project_and_convolve

        weight = self.project.held
        assert isinstance(weight, Tensor), "packed projections have their rates apart"
        return project_and_convolve(x_1D, weight, self.constants.weight, states.tail_NWC, row)

    def _by_kernels(self, inputs: RuleInputs, step: StepStates, states: LayerStates, is_convolved: bool) -> Tensor:
        """Return gated outputs [T, H, V] and bring the states of the rows up to date."""
        from mgpu.worker.kernels.linear.compute import compute  # imports triton, which machines without a GPU may lack

        own = self.constants
        sizes = self.num_keys, self.key_dim, self.value_dim
        weights = RuleWeights(own.weight, own.norm, own.bias_H, own.log_rate_H, self.eps, *sizes)
        return compute(inputs, states.state_NHKV, states.tail_NWC, weights, step, is_convolved=is_convolved)

    def _inputs_and_gates(self, projected: Tensor) -> tuple[Tensor, Tensor]:
        """Return the inputs of the convolution [T, C], and the gates of the outputs."""
        channels, values = len(self.constants.weight), self.num_values * self.value_dim
        gate = projected[:, channels : channels + values]
        return projected[:, :channels], gate.view(-1, self.num_values, self.value_dim)

    def _plain(self, inputs_TC: Tensor, beta_TH: Tensor, g_TH: Tensor, rows: StepRows, states: LayerStates) -> Tensor:
        """Return float32 outputs [T, H, V] and bring the states of the rows up to date, in plain torch."""
        out_THV = torch.empty((len(inputs_TC), self.num_values, self.value_dim), device=inputs_TC.device)
        decoding = [i for i, count in enumerate(rows.counts_host) if count == 1 and rows.contexts_host[i] > 1]
        first = 0
        for index, count in enumerate(rows.counts_host):
            end = first + count
            if count > 1 or rows.contexts_host[index] == 1:
                is_new, row = rows.contexts_host[index] == count, rows.rows_R[index]
                new = slice(first, end)
                out_THV[new] = self._scan(inputs_TC[new], beta_TH[new], g_TH[new], row, is_new, states)
            first = end
        if decoding:
            chosen = torch.tensor(decoding, device=inputs_TC.device)
            tokens_R, rows_R = rows.starts[:-1].long()[chosen], rows.rows_R[chosen].long()
            columns = inputs_TC[tokens_R], beta_TH[tokens_R], g_TH[tokens_R]
            out_THV[tokens_R] = self._step(*columns, rows_R, states)
        return out_THV

    def _step(self, inputs_RC: Tensor, beta_RH: Tensor, g_RH: Tensor, rows_R: Tensor, states: LayerStates) -> Tensor:
        """Compute one token of each row."""
        window = torch.cat((states.tail_NWC[rows_R], inputs_RC.unsqueeze(1)), dim=1)
        states.tail_NWC[rows_R] = window[:, 1:]
        mixed_RC = F.silu((window * self.constants.weight.T).sum(1))
        state_RHKV = states.state_NHKV[rows_R]
        out_RHV = rule.step(*self._heads(mixed_RC), g_RH, beta_RH, state_RHKV)
        states.state_NHKV[rows_R] = state_RHKV
        return out_RHV

    def _scan(
        self, inputs_TC: Tensor, beta_TH: Tensor, g_TH: Tensor, row: Tensor, is_new: bool, states: LayerStates
    ) -> Tensor:
        """Compute consecutive tokens of one row."""
        tail_WC, state_HKV = states.tail_NWC[row], states.state_NHKV[row]
        if is_new:  # what a row's last owner left does not count, and may be NaN
            tail_WC, state_HKV = torch.zeros_like(tail_WC), torch.zeros_like(state_HKV)
        window = torch.cat((tail_WC, inputs_TC))
        states.tail_NWC[row] = window[len(inputs_TC) :]
        weight = self.constants.weight.unsqueeze(1)
        mixed_CT = F.conv1d(window.T.unsqueeze(0), weight, groups=len(weight))[0]
        out_THV, states.state_NHKV[row] = rule.scan(*self._heads(F.silu(mixed_CT).T), g_TH, beta_TH, state_HKV)
        return out_THV

    def _heads(self, mixed_TC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of the convolution's outputs, in float32."""
        keys = self.num_keys * self.key_dim
        q, k, v = torch.split(mixed_TC, [keys, keys, self.num_values * self.value_dim], dim=1)
        q_TGK, k_TGK = (each.reshape(-1, self.num_keys, self.key_dim) for each in (q, k))
        v_THV = v.reshape(-1, self.num_values, self.value_dim).float()
        return *rule.queries_and_keys(q_TGK, k_TGK, self.num_values), v_THV

    def load(self, reader: WeightReader, prefix: str) -> None:
        self.project.load(reader, prefix)
        if self.rates is not None:
            self.rates.load(reader, prefix)
        self.constants.load(reader, prefix)
        self.out.load(reader, f"{prefix}.out_proj")


def _tiled_columns(linear: LinearFacts, heads: range) -> tuple[range, ...]:
    """Return the columns of a rank's heads in an output projection whose value heads are tiled; else none."""
    if not linear.values_are_tiled:
        return ()
    size, shared = linear.value_dim, linear.value_heads // linear.key_heads
    firsts = [each * linear.key_heads for each in range(shared)]
    return tuple(range((first + heads.start) * size, (first + heads.stop) * size) for first in firsts)


def _slices(heads: range, parts: tuple[tuple[str, int], ...]) -> tuple[RowSlice, ...]:
    """Return whole tensors of some heads: those of one part, then those of the next."""
    return tuple(RowSlice(f"{part}.{head}", range(rows)) for part, rows in parts for head in heads)
