"""Whether all replicas serve the same model.

A request that goes on at another replica must find the same model there. The first that the router knew decides, as
long as any replica serves that. Versions of mgpu may differ for a while: replicas are upgraded one after the other.
"""

import logging
from collections.abc import Sequence

from mgpu.orchestrator.router.replica import Replica

log = logging.getLogger(__name__)


class Agreement:
    """Takes replicas out that serve something else."""

    def __init__(self) -> None:
        self._served = ""
        self._versions: set[str] = set()

    def check(self, replicas: Sequence[Replica]) -> None:
        """Note the differences of replicas, and log what is new."""
        told = [(replica, served) for replica in replicas if (served := replica.served)]
        if told and self._served not in {served for _, served in told}:
            self._served = told[0][1]
        for replica, served in told:
            difference = ""
            if served != self._served:
                count = sum(each == self._served for _, each in told)
                difference = (
                    f"serves {served}, and {count} of {len(told)} replicas serve {self._served}: it gets no requests; "
                    "start it with the same model, or take it out of the list"
                )
            if difference != replica.difference:
                replica.difference = difference
                log.log(
                    logging.ERROR if difference else logging.INFO, "%s %s", replica.name, difference or "fits again"
                )
        self._check_versions(replicas)

    def _check_versions(self, replicas: Sequence[Replica]) -> None:
        health = {replica.name: replica.health for replica in replicas}
        known = {name: each.version for name, each in health.items() if each is not None}
        versions = set(known.values())
        if len(versions) > 1 and versions != self._versions:
            words = ", ".join(f"{name} runs {version or 'an older version'}" for name, version in known.items())
            log.warning(
                "replicas run different versions of mgpu (%s): a request that goes on elsewhere may get other tokens; "
                "start the older ones again",
                words,
            )
        self._versions = versions
