"""All fuzz targets by name."""

from bench.fuzz.target import Target
from bench.fuzz.targets.files import FILES
from bench.fuzz.targets.front import FRONT
from bench.fuzz.targets.http import HTTP
from bench.fuzz.targets.text import TEXT

TARGETS: dict[str, Target] = {**FRONT, **HTTP, **TEXT, **FILES}
