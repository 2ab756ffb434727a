"""Read a topology file: YAML whose keys are layers or regular expressions, and whose values are devices and formats.

    0-16:            {device: "cuda[0]"}             # layers 0 to 15
    16-32:           {device: "cuda[1]", quant: 8}
    8-16:            {experts: cpu}                  # the experts of layers 8 to 15
    31:              {quant: none}                   # later ranges win
    /lm_head/:       {device: "cuda[0]"}             # regular expressions win over ranges

The file is composed into nodes, not objects: their scalars keep their text and their lines, and a key that is there
twice is seen. PyYAML's safe loader makes nothing but plain data of a file in any case.
"""

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING, cast, get_args

from mgpu.orchestrator.errors import PlacementError
from mgpu.orchestrator.placement.topology.rules import DeviceNames, Rule, Topology
from mgpu.protocol.model.quantization import Quant

if TYPE_CHECKING:
    from yaml.nodes import Node

MOST_BYTES = 1 << 16
_DEEPEST = 8
"""Collections inside each other. PyYAML's time grows with the square of the depth."""
_LONGEST_PATTERN = 2000
_MOST_REPEATS = 3
"""With four, a name of 45 characters takes 10 ms, and a large model has a thousand names."""
_CHOICES_PER_REPEAT = 5
"""So many alternatives can take as long as a repeat."""
_KEYS = ("device", "quant", "experts")
_SAYS = "device, quant, experts or several of them"
_RANGE = re.compile(r"([0-9]{1,6})(?:\s*-\s*([0-9]{1,6}))?", re.ASCII)
_DEVICE = re.compile(r"cuda\[[0-9]{1,4}\]|cpu(?:\[[0-9]{1,4}\])?", re.ASCII)
_NUMBER = re.compile(r"[0-9]{1,4}", re.ASCII)
_EXAMPLE = '0-16: {device: "cuda[0]", quant: 8}'
_EXPERTS_EXAMPLE = "0-16: {experts: cpu}"


def read_topology(path: Path) -> Topology:
    """Read a file. PlacementError names the line and what to write instead."""
    try:
        with path.open("rb") as file:
            data = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise PlacementError(f"--topology {path}: {error.strerror}") from error
    if len(data) > MOST_BYTES:
        raise PlacementError(f"--topology {path}: larger than {MOST_BYTES >> 10} KiB, which no topology needs")
    try:
        return parse_topology(data.decode("utf-8-sig"), str(path))
    except UnicodeDecodeError as error:
        raise PlacementError(f"--topology {path}: not UTF-8 text ({error.reason} at byte {error.start})") from error


def parse_topology(text: str, source: str) -> Topology:
    """Read the text of a file that is called ``source``. PlacementError."""
    rules = [_rule(key, value, source) for key, value in _entries(_compose(text, source), source, f"write {_EXAMPLE}")]
    if not rules:
        raise PlacementError(f"{source}: has no entries; write {_EXAMPLE}")
    return Topology(source, tuple(rules))


def _compose(text: str, source: str) -> "Node":
    try:
        import yaml
    except ImportError as error:
        raise PlacementError("--topology needs PyYAML; type: pip install pyyaml") from error
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise PlacementError(f"{source}: nested too deeply; write {_EXAMPLE}")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        at = f", line {error.problem_mark.line + 1}" if error.problem_mark else ""
        quotes = "; between braces, device names stand in quotes" if "got '['" in (error.problem or "") else ""
        raise PlacementError(f"{source}{at}: not YAML: {error.problem or error}; write {_EXAMPLE}{quotes}") from error
    except yaml.YAMLError as error:
        raise PlacementError(f"{source}: not YAML: {str(error).splitlines()[0]}") from error
    if node is None:
        raise PlacementError(f"{source}: has no entries; write {_EXAMPLE}")
    return cast("Node", node)


def _entries(node: "Node", where: str, hint: str) -> list[tuple["Node", "Node"]]:
    """Return the pairs of a mapping, no key of which is there twice."""
    from yaml.nodes import MappingNode, ScalarNode

    if not isinstance(node, MappingNode):
        raise PlacementError(f"{where}, line {_line(node)}: not a mapping; {hint}")
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, ScalarNode):
            raise PlacementError(f"{where}, line {_line(key)}: a key must be text; {hint}")
        if key.value in lines:
            raise PlacementError(
                f"{where}, line {_line(key)}: {key.value!r} is there already, in line {lines[key.value]}"
            )
        lines[key.value] = _line(key)
    return list(node.value)


def _line(node: "Node") -> int:
    return int(node.start_mark.line) + 1


def _rule(key: "Node", value: "Node", source: str) -> Rule:
    text, where = str(key.value), f"{source}, line {_line(key)}, {str(key.value)[:80]}"
    devices: DeviceNames = ()
    quant: Quant | None = None
    experts_on_cpu = False
    for name, setting in _entries(value, where, f"write {_SAYS}: {_EXAMPLE}"):
        if name.value not in _KEYS:
            near = difflib.get_close_matches(name.value, _KEYS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(_KEYS)}"
            raise PlacementError(f"{where}: unknown key {str(name.value)[:80]!r}; {hint}")
        if name.value == "device":
            devices = _devices(_scalar(setting, where, "device"), where)
        elif name.value == "quant":
            quant = _quant(_scalar(setting, where, "quant"), where)
        else:
            experts_on_cpu = _on_cpu(_scalar(setting, where, "experts"), where)
    if not devices and quant is None and not experts_on_cpu:
        raise PlacementError(f"{where}: says nothing; write {_SAYS}: {_EXAMPLE}")
    if text.startswith("/"):
        if experts_on_cpu:
            raise PlacementError(f"{where}: experts belongs to layers and not to names: write {_EXPERTS_EXAMPLE}")
        return Rule(text, _line(key), pattern=_pattern(text, where), devices=devices, quant=quant)
    first, end = _layers(text, where)
    return Rule(text, _line(key), first, end, devices=devices, quant=quant, experts_on_cpu=experts_on_cpu)


def _scalar(node: "Node", where: str, name: str) -> str:
    from yaml.nodes import ScalarNode

    if not isinstance(node, ScalarNode):
        # An unquoted [1] begins a list in YAML only at the start of a value, so what comes here was meant as one.
        raise PlacementError(f'{where}: {name} must be one value; several devices are written "cuda[0]+cuda[1]"')
    return str(node.value).strip()


def _devices(text: str, where: str) -> DeviceNames:
    names = tuple(part.strip() for part in text.split("+"))
    for name in names:
        if _DEVICE.fullmatch(name) is None:
            hint = f'; did you mean "cuda[{name}]"?' if _NUMBER.fullmatch(name) else ""
            raise PlacementError(
                f'{where}: {name[:80]!r} is no device; write "cuda[0]", "cpu", "cpu[0]", or several as '
                f'"cuda[0]+cuda[1]"{hint}'
            )
    names = tuple(re.sub(r"\[0+(?=[0-9])", "[", name) for name in names)
    if len(set(names)) < len(names):
        raise PlacementError(f"{where}: {text!r} names a device twice")
    return names


def _quant(text: str, where: str) -> Quant:
    if text not in get_args(Quant):
        raise PlacementError(f"{where}: quant {text[:80]!r} is none of {', '.join(get_args(Quant))}")
    return cast("Quant", text)


def _on_cpu(text: str, where: str) -> bool:
    """Return True for the only place where experts can be without their layer."""
    if text != "cpu":
        raise PlacementError(
            f"{where}: experts {text[:80]!r}: without their layer they can be on the CPU only, computed by the worker "
            f"of the layer: write {_EXPERTS_EXAMPLE}. Without experts, they are where the layer is"
        )
    return True


def _layers(text: str, where: str) -> tuple[int, int]:
    match = _RANGE.fullmatch(text.strip())
    if match is None:
        raise PlacementError(
            f"{where}: no layers; write START-END with the end exclusive (0-16 are layers 0 to 15), one layer (5), or "
            "/a regular expression/ over tensor names"
        )
    first = int(match[1])
    end = first + 1 if match[2] is None else int(match[2])
    if end <= first:
        swapped = f"; write {end}-{first}" if end < first else f"; layer {first} alone is written {first}"
        raise PlacementError(f"{where}: the range has {end - first} layers, since its end is exclusive{swapped}")
    return first, end


def _pattern(text: str, where: str) -> re.Pattern[str]:
    if len(text) < 3 or not text.endswith("/"):
        raise PlacementError(f"{where}: a regular expression stands between two slashes, such as /lm_head/")
    if len(text) > _LONGEST_PATTERN or _may_take_long(text):
        raise PlacementError(
            f"{where}: a regular expression may have {_LONGEST_PATTERN} characters and {_MOST_REPEATS} repeats (* + ? "
            f"{{}}), none of a group; {_CHOICES_PER_REPEAT} alternatives (|) count as a repeat"
        )
    try:
        return re.compile(text[1:-1])
    except (re.error, OverflowError) as error:
        raise PlacementError(f"{where}: not a regular expression: {error}") from error


def _may_take_long(pattern: str) -> bool:
    """Return True for patterns with so many ways to match that a search can take longer than anyone waits."""
    plain = re.sub(r"\\.", "x", pattern)
    plain = re.sub(r"([*+?}])[?+]", r"\1", plain)  # lazy and possessive repeats
    repeats = len(re.findall(r"(?<!\()[*+?{]", plain)) + -(-plain.count("|") // _CHOICES_PER_REPEAT)
    return repeats > _MOST_REPEATS or re.search(r"\)[*+{]", plain) is not None
