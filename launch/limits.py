"""Translate the options about overload into what the gateway goes by; a reload does the same again."""

from mgpu.launch.config import ConfigError, ServeConfig
from mgpu.protocol.internal.client_limits import MAX_WEIGHT, MIN_WEIGHT, ClientLimits

LIMIT_OPTIONS = ("max_client_requests", "max_client_queue", "max_sequences", "max_queue", "client_weights")


def client_limits(config: ServeConfig) -> ClientLimits:
    """Give the limits of ``config``. ConfigError when the weights cannot be read."""
    return ClientLimits(
        client_requests=config.max_client_requests,
        client_queue_bytes=config.max_client_queue,
        sequences=config.max_sequences,
        queue_bytes=config.max_queue,
        weights=parse_weights(config.client_weights),
    )


def parse_weights(text: str) -> dict[str, float]:
    """Read ``NAME=WEIGHT,NAME=WEIGHT``. ConfigError says which pair is wrong and what is allowed."""
    weights: dict[str, float] = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (part.strip() for part in pair.rpartition("="))
        try:
            weight = float(number)
        except ValueError:
            weight = -1.0
        if not name or not MIN_WEIGHT <= weight <= MAX_WEIGHT:
            raise ConfigError(
                f"--client-weights has {pair!r}; write NAME=WEIGHT with a weight from {MIN_WEIGHT:g} to "
                f'{MAX_WEIGHT:g}, such as "uid:1000=4,uid:1001=0.5"'
            )
        if name in weights:
            raise ConfigError(f"--client-weights names {name!r} twice")
        weights[name] = weight
    return weights
