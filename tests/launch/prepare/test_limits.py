"""The options about overload, as the gateway gets them."""

import pytest

from mgpu.launch.prepare.parts import client_limits, parse_weights
from mgpu.launch.settings.config import ServeConfig, load_config
from mgpu.launch.settings.values import ConfigError
from mgpu.protocol.internal.client_limits import ClientLimits


def test_the_defaults_are_those_of_the_gateway() -> None:
    assert client_limits(ServeConfig()) == ClientLimits()


def test_limits_come_from_the_same_sources_as_every_option() -> None:
    flags = {"max_client_requests": "7", "max_client_queue": "1MiB", "client_weights": "uid:1000=4, batch=0.5"}
    config, _ = load_config(flags, {"MGPU_MAX_SEQUENCES": "99", "MGPU_MAX_QUEUE": "2MiB"}, None)
    weights = {"uid:1000": 4.0, "batch": 0.5}
    assert client_limits(config) == ClientLimits(7, 1 << 20, 99, 2 << 20, weights)
    assert client_limits(config).weight_of("uid:1000") == 4.0
    assert client_limits(config).weight_of("someone else") == 1.0


@pytest.mark.parametrize("text", ["a", "=2", "a=", "a=0", "a=-1", "a=nan", "a=inf", "a=101", "a=x", "a=1,b"])
def test_a_weight_that_cannot_be_read_is_refused_with_the_range(text: str) -> None:
    with pytest.raises(ConfigError, match=r"from 0\.01 to 100"):
        parse_weights(text)


def test_a_client_has_one_weight() -> None:
    with pytest.raises(ConfigError, match="'a' twice"):
        parse_weights("a=1,a=2")
