"""Read the layers of linear attention of a GGUF file, and the sizes of their states."""

from mgpu.protocol.checkpoint.files.untrusted import Fields, Limit
from mgpu.protocol.checkpoint.gguf.tensors import Tensors
from mgpu.protocol.model.attention_facts import LinearFacts
from mgpu.protocol.model.facts import HYBRID

_MOST_WIDTH = 64


def gguf_linear(fields: Fields, family: str, num_layers: int, tensors: Tensors) -> LinearFacts | None:
    """Return the linear layers of a hybrid family: those with a convolution; None for the others. CheckpointError."""
    if family not in HYBRID:
        return None
    layers = tuple(f"blk.{layer}.ssm_conv1d.weight" in tensors for layer in range(num_layers))
    if all(layers):
        raise fields.error("block_count", f"is {num_layers}, and none of these layers has attention")
    key_heads = fields.integer("ssm.group_count", high=Limit.HEADS)
    value_heads = fields.integer("ssm.time_step_rank", high=Limit.HEADS)
    if value_heads % key_heads:
        raise fields.error("ssm.time_step_rank", f"is {value_heads}, not a multiple of the {key_heads} key heads")
    inner = fields.integer("ssm.inner_size", high=Limit.HEADS * Limit.HEAD_DIM)
    if inner % value_heads or inner // value_heads > Limit.HEAD_DIM:
        raise fields.error("ssm.inner_size", f"is {inner}: no {value_heads} value heads of at most {Limit.HEAD_DIM}")
    return LinearFacts(
        layers=layers,
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=fields.integer("ssm.state_size", high=Limit.HEAD_DIM),
        value_dim=inner // value_heads,
        conv_width=fields.integer("ssm.conv_kernel", low=2, high=_MOST_WIDTH),
        values_are_tiled=family != "qwen3_next" and value_heads != key_heads,
    )
