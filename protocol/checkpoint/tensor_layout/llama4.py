"""Take the experts of Llama 4 apart: stored transposed, `gate_up_proj` [E, D, 2 F] and `down_proj` [E, F, D].

All gates come before all ups.
"""

from dataclasses import replace

from mgpu.protocol.checkpoint.files.tensors import TensorEntry, check_shape
from mgpu.protocol.model.facts import ModelFacts


def llama4_tensors(facts: ModelFacts, name: str, entry: TensorEntry) -> dict[str, TensorEntry] | None:
    """Return the matrices of a tensor of all experts; None if it is another. CheckpointError for a wrong shape."""
    head, _, stacked = name.rpartition(".")
    if stacked not in ("gate_up_proj", "down_proj") or facts.experts is None:
        return None
    hidden, width, count = facts.hidden_size, facts.experts.width, facts.experts.count
    outputs, inputs = (2 * width, hidden) if stacked == "gate_up_proj" else (hidden, width)
    check_shape(entry, (count, inputs, outputs))
    nbytes = entry.nbytes // count
    found = {}
    for expert in range(count):
        whole = replace(
            entry, shape=(outputs, inputs), offset=entry.offset + expert * nbytes, nbytes=nbytes, is_transposed=True,
            stored_columns=outputs,
        )  # fmt: skip
        if stacked == "down_proj":
            found[f"{head}.{expert}.down_proj.weight"] = whole
            continue
        half = replace(whole, shape=(width, inputs), nbytes=nbytes // 2)
        step = width * nbytes // (outputs * inputs)  # in a row of the file, from the first gate to the first up
        found[f"{head}.{expert}.gate_proj.weight"] = half
        found[f"{head}.{expert}.up_proj.weight"] = replace(half, offset=half.offset + step)
    return found
