"""The options of a server on several hosts, as far as they can be wrong by themselves."""

from mgpu.launch.settings.config import ServeConfig
from mgpu.launch.settings.values import ConfigError

_OF_ONE_MACHINE = ("replicas", "workers", "oversubscribe", "topology")
"""Options that say how this machine's processes are made."""


def check_hosts(config: ServeConfig, only_plans: bool = False) -> None:
    """Raise ConfigError if options for several hosts are incomplete, or contradict others.

    A plan needs no address and no keys: nobody joins it.
    """
    if not config.nodes and not config.join:
        return
    if not config.nodes:
        raise ConfigError("--join waits for workers on other hosts: say on how many, such as --nodes 2")
    if not config.join and not only_plans:
        raise ConfigError(f"--nodes {config.nodes} needs the address where workers join: --join tcp://ADDRESS:5570")
    if config.join and not config.join.startswith("tcp://"):
        raise ConfigError(f"--join {config.join}: write tcp://ADDRESS:PORT, with an address of this host or * for all")
    if not config.keys and not only_plans:
        raise ConfigError(
            "--join needs --keys FOLDER, since workers see all requests: `mgpu-launch keygen` makes the folder, and "
            "`mgpu-launch keygen --worker NAME` the key of a host"
        )
    for name in _OF_ONE_MACHINE:
        if getattr(config, name) != getattr(ServeConfig(), name):
            raise ConfigError(
                f"--{name} does not go with --nodes: the launcher of the hosts decides how many workers there are; "
                "-n and --tp place layers on them"
            )
