"""Read from config.json which layers have linear attention, and the sizes of its states."""

from mgpu.protocol.checkpoint.files.untrusted import Fields, Limit
from mgpu.protocol.model.attention_facts import LinearFacts
from mgpu.protocol.model.facts import HYBRID

_MOST_WIDTH = 64


def linear_facts(fields: Fields, family: str, num_layers: int) -> LinearFacts | None:
    """Return the linear layers of a hybrid family, with the defaults of transformers; None for the others."""
    if family not in HYBRID:
        return None
    key_heads = fields.integer("linear_num_key_heads", 16, high=Limit.HEADS)
    value_heads = fields.integer("linear_num_value_heads", 32, high=Limit.HEADS)
    if value_heads % key_heads:
        raise fields.error("linear_num_value_heads", f"is {value_heads}, not a multiple of the {key_heads} key heads")
    return LinearFacts(
        layers=_linear_layers(fields, num_layers),
        key_heads=key_heads,
        value_heads=value_heads,
        key_dim=fields.integer("linear_key_head_dim", 128, high=Limit.HEAD_DIM),
        value_dim=fields.integer("linear_value_head_dim", 128, high=Limit.HEAD_DIM),
        conv_width=fields.integer("linear_conv_kernel_dim", 4, low=2, high=_MOST_WIDTH),
    )


def _linear_layers(fields: Fields, num_layers: int) -> tuple[bool, ...]:
    kinds = fields.list_of("layer_types", str, num_layers)
    if kinds is None:
        interval = fields.integer("full_attention_interval", 4)
        if interval > num_layers:
            raise fields.error(
                "full_attention_interval", f"is {interval}: none of the {num_layers} layers would have attention"
            )
        return tuple((layer + 1) % interval != 0 for layer in range(num_layers))
    for kind in kinds:
        if kind not in ("linear_attention", "full_attention"):
            raise fields.error(
                "layer_types", f"has {str(kind)[:40]!r}; supported here: linear_attention, full_attention"
            )
    if "full_attention" not in kinds:
        raise fields.error("layer_types", f"has {num_layers} linear_attention and no full_attention")
    return tuple(kind == "linear_attention" for kind in kinds)
