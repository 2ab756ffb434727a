"""Facts about a mixture of experts: how many there are, how a router chooses them, and what they compute."""

from dataclasses import dataclass
from typing import Literal

ExpertSplit = Literal["tensor", "parallel"]
"""How the ranks of a stage share experts: each has a slice of every expert, or some experts whole."""


@dataclass(frozen=True, slots=True)
class ExpertChoice:
    """How a router of DeepSeek's kind chooses: first some groups of consecutive experts, then experts in these.

    Example: 256 experts in 8 groups of 32, of which 4 are kept: a token's 8 experts are in at most 4 groups.
    """

    scores: Literal["softmax", "sigmoid"]
    groups: int = 1
    kept_groups: int = 1
    group_best: int = 0
    """The score of a group is the sum of so many best ones in it; 0: there are no groups."""
    has_correction: bool = False
    """True if a learned number is added to the score of each expert for the choice, but not for the weights."""
    scale: float = 1.0
    """Factor on the weights of the chosen experts."""


@dataclass(frozen=True, slots=True)
class Clamp:
    """gpt-oss' gate: ``(up + 1) * gate * sigmoid(alpha * gate)``, gate and up clamped to ``limit`` before."""

    alpha: float
    limit: float


@dataclass(frozen=True, slots=True)
class ExpertFacts:
    """The feed-forward networks of a mixture of experts, of which a router chooses a few for each token."""

    count: int
    active: int
    """Experts that the router chooses for a token."""
    width: int
    """Feed-forward width of one expert."""
    sparse_layers: tuple[bool, ...]
    """One flag per layer: True if it has experts, False if its feed-forward network is dense."""
    normalizes: bool
    """True if the weights of a token's chosen experts are divided by their sum."""
    router_bias: bool = False
    bias: bool = False
    """True if every projection of an expert has a bias."""
    shared_width: int = 0
    """Width of the network that every token goes through beside its experts; 0: there is none."""
    shared_gate: bool = False
    """True if that network's output is multiplied by a learned share of each token."""
    clamp: Clamp | None = None
    is_branch: bool = False
    """True if experts and the network of ``shared_width`` have norms of their own, and the router scales (Gemma 4)."""
    choice: ExpertChoice | None = None
    """How the router chooses; None: the most probable experts by a softmax over all."""
    weighs_inputs: bool = False
    """True if the weight of a token's only expert is a factor on its input, not on its output (Llama 4)."""

    @property
    def shared_name(self) -> str:
        """What the tensors of the network of ``shared_width`` are called, behind those of the layer's network."""
        return "" if self.is_branch else "shared_expert."
