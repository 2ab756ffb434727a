"""One attack and what it did: the numbers, and the bounds that make a row good."""

from dataclasses import dataclass, field

GROWTH_BYTES = 96 << 20
"""Memory that a process may keep after an attack: allocators keep some of what they were given."""
GROWTH_DESCRIPTORS = 4
"""Processes for text are started when they are first needed, each with a socket and a descriptor of the process."""
LOG_BYTES_PER_S = 1000
MOST_FIRST_TOKEN, LEAST_RATE = 3.0, 0.6
"""Bounds of the ratios: median first token, tokens per second."""
COLUMNS = (
    "attack | transport | x | attacker: CPU s, MB, connections | first token, median (worst) | tokens/s "
    "| gateways | counted | lost | different | log B/s | MiB more | descriptors more | good"
)


@dataclass
class Row:
    """What one attack did."""

    attack: str
    transport: str
    strength: int
    cost: dict[str, float] = field(default_factory=dict)
    first_token_ratio: float = 0.0
    worst_first_token_ratio: float = 0.0
    rate_ratio: float = 0.0
    gateways: int = 0
    """Replaced meanwhile."""
    counted_restarts: int = 0
    """Restarts that `--max-restarts` counts."""
    lost: int = 0
    different: int = 0
    log_bytes_per_s: float = 0.0
    grown_bytes: int = 0
    grown_descriptors: int = 0
    load: float = 0.0
    """Of the machine, just before: other programs make the ratios worse."""
    problems: list[str] = field(default_factory=list)

    @property
    def is_good(self) -> bool:
        return not self.problems

    def judge(self) -> None:
        """Turn every broken bound into a problem."""
        for name, value, most in (
            ("first token", self.first_token_ratio, MOST_FIRST_TOKEN),
            ("counted restarts", self.counted_restarts, 0),
            ("lost streams", self.lost, 0),
            ("different streams", self.different, 0),
            ("log, bytes per second", self.log_bytes_per_s, LOG_BYTES_PER_S),
            ("bytes kept", self.grown_bytes, GROWTH_BYTES),
            ("descriptors kept", self.grown_descriptors, GROWTH_DESCRIPTORS),
        ):
            if value > most:
                self.problems.append(f"{name}: {value:.3g}, at most {most:g}")
        if self.rate_ratio < LEAST_RATE:
            self.problems.append(f"tokens per second: x {self.rate_ratio:.2f}, at least {LEAST_RATE}")

    @property
    def line(self) -> str:
        cost = self.cost
        spent = f"{cost.get('cpu_s', 0):.1f}, {cost.get('nbytes', 0) / 1e6:.1f}, {cost.get('connections', 0)}"
        return (
            f"| {self.attack} | {self.transport} | {self.strength} | {spent} | x {self.first_token_ratio:.1f} "
            f"({self.worst_first_token_ratio:.1f}) | x {self.rate_ratio:.2f} | {self.gateways} | "
            f"{self.counted_restarts} | {self.lost} | {self.different} | {self.log_bytes_per_s:.0f} | "
            f"{self.grown_bytes / 2**20:.0f} | {self.grown_descriptors} | {'yes' if self.is_good else 'NO'} |"
        )
