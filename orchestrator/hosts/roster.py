"""Who has joined: which ranks are there, who may take part, and who is lost. No sockets, so it is tested without any.

A rank that is there twice is told apart from one that was started again by waiting: the second is refused as soon as
the first is heard again, and takes its place as soon as the first is lost. Example: rank 1 is known, and at 20.0 s
another process says that it is rank 1. The first says hello at 20.7 s: the second is refused. Had the first been killed
at 19 s, its connection would be gone by 20.5 s, and the second's next hello, at 21.0 s, is taken.
"""

import re
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from mgpu.orchestrator.errors import UserError
from mgpu.protocol.internal.counted import counted
from mgpu.protocol.internal.host_messages import Hello
from mgpu.protocol.model.fingerprint import ModelPrint

_MOST_REFUSALS = 4
"""Refusals that the error of the deadline repeats."""


class HostsError(UserError):
    """The hosts that joined do not fit the options."""


class HostsMissing(UserError):
    """Ranks have not joined in time. They may come later: EX_TEMPFAIL."""

    exit_code = 75


@dataclass(frozen=True, slots=True)
class Expected:
    """What all hosts must have in common with the orchestrator's."""

    host: str
    version: str
    commit: str
    model: ModelPrint
    needs_weights: bool


@dataclass(slots=True)
class Member:
    """A rank that has joined."""

    hello: Hello
    heard_s: float
    """By the orchestrator's monotonic clock."""
    joined_s: float


@dataclass(slots=True)
class Roster:
    """The ranks of a launcher, by their numbers."""

    nodes: int
    expected: Expected
    silence_s: float
    clock_s: Callable[[], float] = time.monotonic
    members: dict[int, Member] = field(default_factory=dict)
    fixed_world_size: int = 0
    """Set once a plan exists; until then those who have joined first decide."""
    refusals: list[str] = field(default_factory=list)
    _seconds: dict[bytes, float] = field(default_factory=dict)
    """When a process first claimed a rank that is taken, by incarnation."""

    @property
    def world_size(self) -> int:
        """How many ranks there must be; 0: nobody has said it yet."""
        return self.fixed_world_size or next((each.hello.world_size for each in self.members.values()), 0)

    @property
    def is_whole(self) -> bool:
        """True if every rank is there."""
        return 0 < self.world_size == len(self.members)

    def missing(self) -> list[int]:
        """Return the ranks that are not there."""
        return [rank for rank in range(self.world_size) if rank not in self.members]

    def take(self, hello: Hello) -> str:
        """Note what an agent says. Return why it is refused; empty if it is a member, or must wait."""
        now_s = self.clock_s()
        member = self.members.get(hello.rank)
        if member is not None and member.hello.incarnation == hello.incarnation:
            member.hello, member.heard_s = hello, now_s
            return ""
        problem = self._problem(hello) or self._taken(hello, member, now_s)
        if problem:
            self._seconds.pop(hello.incarnation, None)
            self.refusals = [*self.refusals, problem][-_MOST_REFUSALS:]
        elif member is None:
            self._seconds.pop(hello.incarnation, None)
            self.members[hello.rank] = Member(hello, now_s, now_s)
        return problem

    def drop(self, rank: int) -> None:
        """Forget a member that is lost."""
        self.members.pop(rank, None)

    def silent(self) -> list[Member]:
        """Return the members of which nothing was heard for too long."""
        oldest_s = self.clock_s() - self.silence_s
        return [member for member in self.members.values() if member.heard_s < oldest_s]

    def hosts(self) -> list[str]:
        """Return the node numbers of those who are there, in order."""
        return sorted({member.hello.node for member in self.members.values()}, key=lambda node: (len(node), node))

    def _taken(self, hello: Hello, member: Member | None, now_s: float) -> str:
        """Return why a second process of a rank is refused; empty while that is not known, or if there is no first."""
        if member is None:
            return ""
        since_s = self._seconds.setdefault(hello.incarnation, now_s)
        if member.heard_s <= since_s:
            return ""
        return (
            f"{hello.name}: this rank has joined already, as process {member.hello.pid} on host {member.hello.host}. "
            "End one of them; each process needs a RANK of its own"
        )

    def _problem(self, hello: Hello) -> str:
        """Return what makes a process no rank of this server; empty if it can be one."""
        expected, ours, name = self.expected, self.expected.host, hello.name
        if hello.version != expected.version:
            return f"{name}: it has mgpu {hello.version}, and host {ours} {expected.version}: install the same on both"
        if hello.commit and expected.commit and hello.commit != expected.commit:
            return (
                f"{name}: its mgpu is commit {hello.commit}, and that of host {ours} {expected.commit}: check out the "
                "same on both"
            )
        if problem := self._other_model(hello):
            return problem
        if self.world_size and hello.world_size != self.world_size:
            return (
                f"{name}: its WORLD_SIZE is {hello.world_size}, and that of this server is {self.world_size}: start "
                f"{self.world_size} processes in all"
            )
        if not 0 <= hello.rank < hello.world_size:
            return f"{name}: ranks are 0 to {hello.world_size - 1} with WORLD_SIZE={hello.world_size}"
        if hello.world_size < self.nodes:
            return f"{name}: WORLD_SIZE={hello.world_size} is too small for --nodes {self.nodes}"
        return self._other_group(hello)

    def _other_group(self, hello: Hello) -> str:
        name, first = hello.name, next(iter(self.members.values()), None)
        if hello.node not in self.hosts() and len(self.hosts()) >= self.nodes:
            hosts = ", ".join(sorted({each.hello.host for each in self.members.values()}))
            return (
                f"{name}: it would be host number {self.nodes + 1}, and --nodes is {self.nodes} (joined: {hosts}): "
                f"type --nodes {self.nodes + 1}, or start fewer"
            )
        if first is None:
            return ""
        if hello.device.kind != first.hello.device.kind:
            return (
                f"{name}: it runs on {hello.device.kind}, and {first.hello.name} on {first.hello.device.kind}: give "
                "all the same --device"
            )
        if hello.master != first.hello.master:
            return (
                f"{name}: its MASTER_ADDR:MASTER_PORT is {hello.master or 'not set'}, and that of {first.hello.name} "
                f"is {first.hello.master or 'not set'}: set the same on all hosts"
            )
        return ""

    def _other_model(self, hello: Hello) -> str:
        theirs, ours = hello.model, self.expected.model
        where = f"{hello.name}: its model in {theirs.path} is another one than that of host {self.expected.host} in "
        way_out = "; copy the same files to both"
        if theirs.config != ours.config:
            return f"{where}{ours.path}: the configuration is {theirs.config} there and {ours.config} here{way_out}"
        if self.expected.needs_weights and theirs.tensors != ours.tensors:
            return (
                f"{where}{ours.path}: the tensors are {theirs.tensors or 'missing'} there and {ours.tensors} "
                f"here{way_out}"
            )
        return ""


def missing_text(roster: Roster, endpoint: str, waited_s: float) -> str:
    """Return the error for ranks that have not come in time: who is missing, and what to type on their hosts."""
    ranks, missing = roster.world_size, roster.missing()
    address = re.sub(r"//(0\.0\.0\.0|\[::\]|\*)", "//HEAD", endpoint)
    verb, them, place = ("has", "it", "its host") if len(missing) == 1 else ("have", "them", "their hosts")
    who = f"{_ranks(missing)} of {ranks} {verb} not joined" if ranks else "no rank has joined"
    joined = ", ".join(roster.members[rank].hello.name for rank in sorted(roster.members))
    after = f" (joined: {joined})" if joined else ""
    per_node = max(1, ranks // roster.nodes) if ranks else 1
    start = (
        f"torchrun --nnodes {roster.nodes} --nproc-per-node {per_node} --node-rank N --master-addr HOST "
        f"--master-port 29500 -m mgpu.worker --join {address} --keys NAME.worker -m MODEL"
    )
    refused = "".join(f"\nrefused: {text}" for text in roster.refusals)
    return (
        f"{who} {endpoint} within {waited_s:g} s (--join-timeout){after}. Start {them} on {place}, such as: "
        f"{start}{refused}"
    )


def wrong_nodes_text(roster: Roster) -> str:
    """Return the error for ranks that are all there, on fewer hosts than were asked for."""
    hosts = sorted({each.hello.host for each in roster.members.values()})
    return (
        f"all {counted(roster.world_size, 'rank')} have joined from {counted(len(roster.hosts()), 'host')} "
        f"({', '.join(hosts)}), and --nodes is {roster.nodes}: type --nodes {len(roster.hosts())}, or start "
        "processes on the other hosts too"
    )


def _ranks(ranks: Iterable[int]) -> str:
    numbers = list(map(str, ranks))
    return f"rank {numbers[0]}" if len(numbers) == 1 else f"ranks {', '.join(numbers)}"
