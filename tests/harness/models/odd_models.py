"""Small model folders of odd but real shapes, each made from a random model by one change."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from harness.models.tiny_configs import tiny_config

Tensors = dict[str, Tensor]
IDS = [1, 17, 5, 88, 3, 42, 99, 7, 64, 21, 13, 77, 2, 54, 9, 31, 100, 0, 66, 28]
"""The prompt of all models: longer than the window of those that have one."""
EAGER = {"attn_implementation": "eager", "experts_implementation": "eager"}
WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@torch.inference_mode()
def make_model(family: str, **changes: object) -> Any:
    """Return a random transformers model. ``changes`` are fields of its configuration."""
    import transformers as hf

    hf.set_seed(1)
    config: Any = tiny_config(family)
    for key, value in changes.items():
        setattr(config, key, value)
    make = hf.Mistral4ForCausalLM._from_config if family == "mistral4" else hf.AutoModelForCausalLM.from_config
    model = make(config, **EAGER).float().eval()
    for name, parameter in model.named_parameters():
        parameter.normal_(0.0, 0.3 if name.endswith(("norm.weight", "bias")) else 0.1)
        if name.endswith("norm.weight") and "gemma" not in family:
            parameter.add_(1.0)
    return model


@torch.inference_mode()
def logits_of(model: Any) -> Tensor:
    """Return what transformers computes of the prompt, float32 [T, vocabulary]."""
    logits: Tensor = model(torch.tensor([IDS])).logits[0].float()
    return logits


@torch.inference_mode()
def reference(folder: Path) -> Tensor:
    """Return what transformers computes with the files of a folder."""
    import transformers as hf

    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    return logits_of(hf.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **EAGER).eval())


@dataclass(frozen=True)
class Folder:
    """A folder that is being changed."""

    path: Path

    def config(self, **changes: object) -> None:
        """Change keys of config.json; ... removes one."""
        file = self.path / "config.json"
        values = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({key: value for key, value in values.items() if value is not ...}))

    def tensors(self) -> Tensors:
        """Return all tensors of all files."""
        found: Tensors = {}
        for file in sorted(self.path.glob("*.safetensors")):
            found |= load_file(file)
        return found

    def write(self, *shards: Tensors, names: list[str] | None = None, index: dict[str, str] | None = None) -> None:
        """Replace the weights: one whole file, or shards with an index (``index`` adds entries to it)."""
        for file in [*self.path.glob("*.safetensors"), self.path / INDEX]:
            file.unlink(missing_ok=True)
        if names is None:
            count = len(shards)
            names = [f"model-{part + 1:05}-of-{count:05}.safetensors" for part in range(count)]
            names = [WHOLE] if count == 1 else names
        weight_map = dict(index or {})
        for name, tensors in zip(names, shards, strict=True):
            save_file({key: value.contiguous() for key, value in tensors.items()}, self.path / name, {"format": "pt"})
            weight_map |= dict.fromkeys(tensors, name)
        if names != [WHOLE] or index is not None:
            (self.path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))

    def change(self, change: Callable[[str, Tensor], Tensor | None]) -> None:
        """Change each tensor, or leave it out."""
        changed = {name: change(name, tensor) for name, tensor in self.tensors().items()}
        self.write({name: tensor for name, tensor in changed.items() if tensor is not None})

    def rename(self, change: Callable[[str], str]) -> None:
        self.write({change(name): tensor for name, tensor in self.tensors().items()})

    def halves(self) -> tuple[Tensors, Tensors]:
        names = sorted(tensors := self.tensors())
        return {n: tensors[n] for n in names[::2]}, {n: tensors[n] for n in names[1::2]}


Change = Callable[[Folder], None]


@dataclass(frozen=True)
class Case:
    """A family, fields of its configuration before it is saved, and what is done to the folder then."""

    family: str
    change: Change = lambda folder: None
    fields: tuple[tuple[str, object], ...] = ()
    is_stated: bool = False
    """True: the right logits are those of the model before the change, not what transformers makes of the folder."""
    subfolder: str = ""
    """Where the model lies in the end, below the folder."""


def write_case(case: Case, folder: Path) -> tuple[Path, Tensor]:
    """Write the folder. Return where the model is, and the right logits."""
    model = make_model(case.family, **dict(case.fields))
    model.save_pretrained(folder)
    before = logits_of(model)
    case.change(Folder(folder))
    where = folder / case.subfolder
    return where, before if case.is_stated else reference(where)
