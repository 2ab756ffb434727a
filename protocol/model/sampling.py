"""How a model's makers want it sampled, for requests that do not say."""

from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class SamplingDefaults:
    """Values of the request's fields of the same names; None: the field's own default."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None

    def given(self) -> dict[str, float]:
        """Return what the model says."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {value:g}" for name, value in self.given().items())
        return listed or "temperature 0 (greedy)"
