"""The tools that a request offers, as parsers look at them."""

from collections.abc import Mapping, Sequence
from typing import Any


class OfferedTools:
    """Names and parameters of tools in OpenAI's form."""

    def __init__(self, tools: Sequence[Mapping[str, Any]] = ()) -> None:
        self._parameters: dict[str, Mapping[str, Any]] = {}
        for tool in tools:
            function = tool["function"]
            self._parameters[function["name"]] = function.get("parameters") or {}

    def __contains__(self, name: object) -> bool:
        return name in self._parameters

    def __bool__(self) -> bool:
        return bool(self._parameters)

    def property_of(self, tool: str, name: str) -> Mapping[str, Any]:
        """Return the schema of one parameter; an empty one if the tool does not describe it."""
        properties = self._parameters[tool].get("properties")
        found = properties.get(name) if isinstance(properties, Mapping) else None
        return found if isinstance(found, Mapping) else {}
