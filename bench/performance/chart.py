"""Draw tokens per second against concurrency from what `mgpu-launch bench serve` and the peers saved, as an SVG.

    python -m bench.performance.chart mgpu.json transformers.json … -o docs/throughput.svg

Closed loops only. The dashed line is what memory allows mgpu (decoding alone, every byte read once). Bars are the least
and the greatest of the repeats.
"""

import argparse
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 800, 420, 72, 250, 62, 64
COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce", "#525252")
LIMIT_COLOUR = "#737373"


@dataclass(frozen=True, slots=True)
class Point:
    """One concurrency of one engine: median, least and greatest tokens per second."""

    clients: float
    rate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Line:
    name: str
    points: Sequence[Point]
    is_limit: bool = False
    limit_of: str = ""
    """The line whose colour this one takes; none: grey."""


@dataclass(frozen=True, slots=True)
class Scale:
    """Logarithms of both numbers to pixels: doubling the clients is always as wide, doubling the rate as high."""

    most_clients: float
    low: float
    high: float

    def x(self, clients: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * math.log(clients) / max(math.log(self.most_clients), 1e-9)

    def y(self, rate: float) -> float:
        share = (math.log10(rate) - math.log10(self.low)) / (math.log10(self.high) - math.log10(self.low))
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * share


def read_lines(path: Path) -> list[Line]:
    """Read a result; return its engine's line, and the limit if it has one. SystemExit when it is something else."""
    result = json.loads(path.read_text())
    rows = [row for row in result.get("rows", []) if row.get("load") == "closed" and row.get("tokens_per_s")]
    if not rows:
        raise SystemExit(
            f"error: {path} has no rows of closed loops; make it with mgpu-launch bench serve --concurrency"
        )
    rows.sort(key=lambda row: row["level"])
    lines = [
        Line(
            f"{result['engine']} ({result['dtype']})",
            [Point(row["level"], *(row[f"tokens_per_s{end}"] for end in ("", "_low", "_high"))) for row in rows],
        )
    ]
    if all(row.get("limit") for row in rows):
        limits = [Point(row["level"], row["limit"], row["limit"], row["limit"]) for row in rows]
        lines.append(Line("memory limit", limits, is_limit=True))
    return lines


def caption(path: Path) -> str:
    """Say what was measured, and where."""
    result = json.loads(path.read_text())
    machine = result["machine"]
    where = ", ".join(dict.fromkeys(machine["gpus"])) or machine["cpu"]
    return f"{result['model']}, {result['prompt_tokens']} in, {result['new_tokens']} out; {where}; {machine['date']}"


def scale_of(lines: Iterable[Line]) -> Scale:
    """Round the range of all points to 1, 2 or 5 times a power of ten."""
    points = [point for line in lines for point in line.points]
    low, high = min(point.low for point in points), max(point.high for point in points)
    below = max(tick for tick in ticks(low / 10, low) if tick <= low)
    return Scale(max(point.clients for point in points), below, min(t for t in ticks(high, high * 10) if t > high))


def ticks(low: float, high: float) -> list[float]:
    """List 1, 2 and 5 times powers of ten from ``low`` to ``high``."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**power for power in powers for step in (1, 2, 5) if low <= step * 10.0**power <= high]


def draw(lines: Sequence[Line], title: str) -> str:
    """Return the whole picture."""
    scale = scale_of(lines)
    engines = [line.name for line in lines if not line.is_limit]
    colours = dict(zip(engines, itertools.cycle(COLOURS), strict=False))
    parts = [_axes(lines, scale)]
    for number, line in enumerate(lines):
        colour = colours.get(line.limit_of if line.is_limit else line.name, LIMIT_COLOUR)
        parts.append(_line(line, scale, colour, TOP + 14 + 20 * number))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="#404040">\n<rect width="100%" height="100%" fill="white"/>\n'
        f'<text x="{LEFT}" y="22">{escape(title)}</text>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _axes(lines: Sequence[Line], scale: Scale) -> str:
    bottom, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts = []
    for rate in ticks(scale.low, scale.high):
        y = scale.y(rate)
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#e5e5e5"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{rate:,g}</text>')
    for clients in sorted({point.clients for line in lines for point in line.points}):
        x = scale.x(clients)
        parts.append(f'<path d="M{x:.1f} {bottom}v5" stroke="#404040"/>')
        parts.append(f'<text x="{x:.1f}" y="{bottom + 20}" text-anchor="middle">{clients:g}</text>')
    parts.append(f'<path d="M{LEFT} {bottom}H{right}" stroke="#404040"/>')
    parts.append(f'<text x="{(LEFT + right) / 2}" y="{bottom + 44}" text-anchor="middle">concurrent requests</text>')
    parts.append(f'<text x="{LEFT}" y="{TOP - 12}">output tokens per second</text>')
    return "\n".join(parts)


def _line(line: Line, scale: Scale, colour: str, legend_y: float) -> str:
    dash = ' stroke-dasharray="6 4"' if line.is_limit else ""
    where = [(scale.x(point.clients), scale.y(point.rate)) for point in line.points]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in where)
    parts = [f'<path d="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>']
    for (x, y), point in zip(where, line.points, strict=True):
        if not line.is_limit:
            parts.append(f'<path d="M{x:.1f} {scale.y(point.low):.1f}V{scale.y(point.high):.1f}" stroke="{colour}"/>')
            parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{colour}"/>')
    x = WIDTH - RIGHT + 14
    parts.append(f'<path d="M{x} {legend_y}h20" stroke="{colour}" stroke-width="2"{dash}/>')
    parts.append(f'<text x="{x + 26}" y="{legend_y + 4}">{escape(line.name)}</text>')
    return "\n".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("-o", "--output", type=Path, required=True)
    options = parser.parse_args()
    lines = [line for path in options.results for line in read_lines(path)]
    options.output.write_text(draw(lines, caption(options.results[0])))


if __name__ == "__main__":
    main()
