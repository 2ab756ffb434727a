"""How much an owner may run beside others, so that nobody's streams become much slower by it.

Owners are the first numbers of accounts (fair_queue.py). An owner has few sequences if those that run and those in line
are at most `FEW`, and its messages no flood: who keeps the gateway busy takes less of the steps.
While sequences of several owners run,

- an owner may decode so many tokens in a step that it takes `SLOWER` times as long as with those of the others alone
  (`room_beside`, measured in engine/step_costs.py), and at least as many as the smallest of the others. If its running
  sequences fill that room, it is held: its next sequences wait in line, in nobody's way.
- an owner beside others that decode has its prompts computed in portions, so that a step takes `SLOWER_BY_PROMPTS`
  times as long as without them. What is not used in one step is kept for some steps, so that a short prompt is computed
  at once.
- an owner with few has twice the room for prompts, at least `SMALL_PROMPTS` tokens, and may decode as long as a step
  has at most `SMALL_STEP` without the owners that have more. Else two short requests would hold back sixteen streams of
  another owner.
- owners with more have less room beside those with few: by the factors of `BESIDE_FEW`, which they divide. Whoever has
  a long line would else fill half of each step, because every owner may run what the others run.

Example: H decodes 8 sequences, and a step of 8 tokens takes 21 ms. One of 16 takes 28 ms, so that the room beside H is
8 tokens. A, which has hundreds in line, sends prompts of 300 tokens for one token each. Its first prompts use what is
kept for 16 steps; then 4 tokens of them are computed in each step, and H has five sixths of its speed. A with 8
sequences that decode has no room for a 9th. A decodes nothing with such prompts, so H's own prompts are computed as if
it were alone.

An owner that came alone may have all rows and blocks. Its sequences that began last are preempted for an owner with few
(step_planner.py), until that has half as many, and while there are others it leaves some room free for their next one.
What it runs beside an owner with few takes turns, if steps are too long with all of it (resting.py).

A token counts for more if it is costly to choose (`Sequence.token_cost`). An owner that runs alone has no bound. With
one owner in all, as on a server that is used over HTTP alone, nothing is different from first come, first served.
"""

from collections.abc import Callable, Collection

from mgpu.orchestrator.scheduler.sequence import Sequence

RoomBeside = Callable[[int, float], int]
"""From tokens, and how much longer a step with more may take, to how many more."""
SLOWER, SLOWER_BY_PROMPTS = 3 / 2, 4 / 3
BESIDE_FEW = 5 / 4, 6 / 5
"""The same for owners with many sequences beside those with few."""
LEAST_AT_ONCE = 8
"""Tokens that an owner with many may decode in each step beside them, of what runs already; see resting.py."""
KEPT_STEPS = 16
"""Steps for which an owner's unused room is kept."""
FEW, SMALL_STEP, SMALL_PROMPTS = 32, 32, 32
LEAST_PART = 3
"""An owner with many may always decode this part of what the smallest of those with few decodes."""
RECENT_STEPS = 32
"""An owner whose last sequence has ended counts for so many steps: its next request is on its way."""


def unlimited(_num_tokens: int = 0, _slower: float = 1.0) -> int:
    """Return the room beside any number of tokens while nothing has been measured: enough for all."""
    return 1 << 30


class RunningShares:
    """What each owner runs, in tokens of one step, and what it has kept."""

    def __init__(self) -> None:
        self.room_beside: RoomBeside = unlimited
        """For tokens that are decoded."""
        self.prompt_room_beside: RoomBeside = unlimited
        self.num_waiting: Callable[[int], int] = lambda _owner: FEW
        """How many sequences of an owner are in line."""
        self.in_line: Callable[[], set[int]] = set
        """The owners that are in line and not held."""
        self.floods: frozenset[int] = frozenset()
        """The owners whose messages keep the gateway busy."""
        self.clear()

    def clear(self) -> None:
        """Forget what runs: the workers are gone."""
        self._running: dict[int, int] = {}
        """By owner, and so are the others."""
        self._num_running: dict[int, int] = {}
        """Sequences, whatever they cost."""
        self._decoding: dict[int, int] = {}
        """Of that, what decodes or will, when its prompt is computed."""
        self._decoding_ids: set[int] = set()
        self._streams: dict[int, int] = {}
        """How many sequences are past their prompts."""
        self._stream_ids: set[int] = set()
        self._recent: dict[int, int] = {}
        """The step until which an owner counts that runs nothing now."""
        self._kept: dict[int, int] = {}
        """Tokens of prompts that may be computed now beside what others decode; who is missing has the most."""
        self._few, self._num_many = 0, 1
        """What the owners with few decode, and how many owners run that have more, when this was last counted."""
        self._total, self._smallest, self._smallest_few = 0, [0], 0
        """What all decode, the two who decode the least, and the least of those with few."""
        self._rooms: dict[int, int] = {}
        """Since then, by what the others decode."""
        self._room_of_many = self._prompt_room = self._prompt_room_of_many = unlimited()
        """Of an owner with many beside those with few; of prompts in each step, beside all that decode."""
        self._step = 0
        self.extra_cost = 0
        """What the running sequences cost in a step beyond a token each."""

    @property
    def _are_several(self) -> bool:
        return len(self._running) > 1 or bool(self._running and self._recent)

    def begin_step(self) -> None:
        """Let every owner have the room of another step."""
        self._step += 1
        if self._recent:
            self._recent = {owner: step for owner, step in self._recent.items() if step > self._step}
        if not self._are_several:
            self._kept.clear()
            return
        self._count()
        for owner in list(self._running | self._kept):
            room = self._prompt_room_of(owner)
            self._kept[owner] = min(self._kept.get(owner, KEPT_STEPS * room) + room, KEPT_STEPS * room)
            if owner not in self._running and self._kept[owner] == KEPT_STEPS * room:
                del self._kept[owner]

    def begin(self, seq: Sequence) -> None:
        """Note that a sequence has got a row."""
        owner = seq.account[0]
        self._add(self._running, owner, seq.token_cost)
        self._add(self._num_running, owner, 1)
        if seq.max_len > len(seq.tokens) + 1:
            self._decoding_ids.add(seq.sequence_id)
            self._add(self._decoding, owner, seq.token_cost)
        self._recent.pop(owner, None)
        self.extra_cost += seq.token_cost - 1
        if len(self._running) > 1:
            self._count()

    @property
    def has_guests(self) -> bool:
        """Return whether owners with few run beside owners with more."""
        if len(self._running) < 2:
            return False
        return 0 < sum(map(self._has_few, self._running)) < len(self._running)

    def most_at_once(self) -> int:
        """Return how many tokens an owner with many may decode in a step beside all that those with few run."""
        costs = [cost for owner, cost in self._running.items() if self._has_few(owner)]
        room = self.room_beside(sum(costs), BESIDE_FEW[0]) // (len(self._running) - len(costs))
        return max(room, LEAST_AT_ONCE)

    def takes_turns(self, seq: Sequence) -> bool:
        """Return whether a sequence is of an owner with many."""
        return not self._has_few(seq.account[0])

    def note_rest(self, seq: Sequence) -> None:
        """Note that a sequence is in no step from now on, or that it goes on."""
        self.extra_cost += (1 - seq.token_cost) if seq.rests else (seq.token_cost - 1)

    def begin_decoding(self, seq: Sequence) -> None:
        """Note that the prompt of a sequence is computed."""
        self._stream_ids.add(seq.sequence_id)
        self._add(self._streams, seq.account[0], 1)

    def end(self, seq: Sequence) -> None:
        """Note that a sequence has lost its row."""
        owner = seq.account[0]
        self._add(self._running, owner, -seq.token_cost)
        self._add(self._num_running, owner, -1)
        self.extra_cost -= seq.token_cost - 1
        if seq.sequence_id in self._stream_ids:
            self._stream_ids.discard(seq.sequence_id)
            self._add(self._streams, owner, -1)
        if seq.sequence_id in self._decoding_ids:
            self._decoding_ids.discard(seq.sequence_id)
            self._add(self._decoding, owner, -seq.token_cost)
        if owner not in self._running:
            self._recent[owner] = self._step + RECENT_STEPS

    def lacks(self, owner: int) -> bool:
        """Return whether an owner with few would run at most half of what another does with one sequence more."""
        others = max((count for each, count in self._num_running.items() if each != owner), default=0)
        return 2 * (self._num_running.get(owner, 0) + 1) <= others and self._has_few(owner)

    def leaves_room(self, owner: int) -> bool:
        """Return whether an owner must leave some room free: it runs the most, and there are others."""
        return self._are_several and self._num_running.get(owner, 0) >= max(self._num_running.values())

    def victim_for(self, seq: Sequence, candidates: Collection[Sequence]) -> Sequence:
        """Return the sequence to preempt: of the owner that runs the most, the one that began last.

        Nobody who runs less than twice as much has older sequences preempted. So the oldest of all is sure to end.
        """
        most = 2 * self._num_running.get(seq.account[0], 0)
        fit = [each for each in candidates if each.turn >= seq.turn >= 0 or self._num_running[each.account[0]] > most]
        return max(fit, key=lambda each: (self._num_running[each.account[0]], each.turn))

    def full(self) -> set[int]:
        """Return the owners that may begin nothing now: they fill their room, or another one lacks what they have."""
        full: set[int] = set()
        if self._are_several:
            full = {owner for owner in self._running | self._kept if self._is_full(owner)}
        if self._running and any(self.lacks(owner) for owner in self.in_line() - full):
            full |= {owner for owner in self._running if not self.lacks(owner)}
        return full

    def prompt_tokens(self, seq: Sequence) -> int:
        """Return how many tokens of a prompt may be computed in this step."""
        return self._prompt_tokens(seq.account[0])

    def spend(self, seq: Sequence, num_tokens: int) -> None:
        """Note that so many tokens of a prompt are computed in this step."""
        owner = seq.account[0]
        if self._others_decode(owner):
            self._kept[owner] = self._prompt_tokens(owner) - num_tokens

    @staticmethod
    def _add(costs: dict[int, int], owner: int, cost: int) -> None:
        costs[owner] = costs.get(owner, 0) + cost
        if not costs[owner]:
            del costs[owner]

    def _count(self) -> None:
        costs = sorted([*self._decoding.values(), *[1] * len(self._recent)])
        self._total, self._smallest = sum(costs), costs[:2]
        few = [*(cost for owner, cost in self._decoding.items() if self._has_few(owner)), *[1] * len(self._recent)]
        self._few, self._smallest_few = sum(few), min(few, default=0)
        self._num_many = max(1, sum(not self._has_few(owner) for owner in self._running))
        self._rooms.clear()
        self._prompt_room = self._prompt_room_of_many = unlimited()
        if self._total:
            self._prompt_room = self.prompt_room_beside(self._total, SLOWER_BY_PROMPTS)
        if few:
            slower, slower_by_prompts = BESIDE_FEW
            rooms = self.room_beside(self._few, slower), self.prompt_room_beside(self._total, slower_by_prompts)
            self._room_of_many, self._prompt_room_of_many = (max(1, room // self._num_many) for room in rooms)

    def _is_full(self, owner: int) -> bool:
        return not self._fits_one_more(owner) or self._prompt_tokens(owner) < 1

    def _fits_one_more(self, owner: int) -> bool:
        """Return whether there is room for a sequence that costs what those of this owner do that run."""
        mine = self._running.get(owner, 0)
        return not mine or mine + mine // self._num_running[owner] <= self._room_of(owner)

    def _others_decode(self, owner: int) -> bool:
        return len(self._streams) > (owner in self._streams)

    def _prompt_tokens(self, owner: int) -> int:
        if not self._others_decode(owner):
            return unlimited()
        return self._kept.get(owner, KEPT_STEPS * self._prompt_room_of(owner))

    def _has_few(self, owner: int) -> bool:
        return owner not in self.floods and self._num_running.get(owner, 0) + self.num_waiting(owner) <= FEW

    def _prompt_room_of(self, owner: int) -> int:
        if self._has_few(owner):
            return max(2 * self._prompt_room, SMALL_PROMPTS)
        return min(self._prompt_room, self._prompt_room_of_many)

    def _room_of(self, owner: int) -> int:
        """Return the tokens that an owner may have in a step beside those that the others decode."""
        mine = self._decoding.get(owner, 0) or int(owner in self._recent)
        others = self._total - mine
        if others <= 0:
            return unlimited()
        has_few = self._has_few(owner)
        if self._few and not has_few:
            return max(self._room_of_many, self._smallest_few // LEAST_PART, 1)
        room = self._rooms.get(others)
        if room is None:
            room = self._rooms[others] = self.room_beside(others, SLOWER)
        small = SMALL_STEP - (self._few - mine) if has_few else 0
        return max(room, self._smallest[mine == self._smallest[0] and len(self._smallest) > 1], small, 1)
