"""What passes between stages without a host: activations to the next stage, chosen tokens back to the first.

Both are kernels that write into memory of the receiving rank and wait there (kernels/peers/activations.py and
token_mail.py). So a step of one stage can be a CUDA graph, and its host launches the next step before the last one has
ended: on every stage the work of several steps lies ready in the GPU's queue.

    two stages, one row      launched by the host         what the GPU waits for
    stage 0, step 1          embed, layers, send          nothing
    stage 1, step 1          receive, layers, choose      the rows of step 1
    stage 0, step 3          fetch the token, …, send     the token of step 1

`RelaySetup` opens a relay on all ranks of a plan or on none. Without one, activations and tokens go through channels.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mgpu.worker.errors import PeerLost
from mgpu.worker.kernels.peers.memory import PeerAlarm

if TYPE_CHECKING:
    from mgpu.worker.kernels.peers.activations import ActivationReceiver, ActivationSender
    from mgpu.worker.kernels.peers.token_mail import Mailbox, Postman

_TAGS = 1 << 30


def tag_of(step: int) -> int:
    """Return the tag of a step's tokens: positive, and different for all steps that can be in flight together."""
    return step % _TAGS + 1


@dataclass(frozen=True, slots=True)
class Relay:
    """One rank's ends. Ends that a rank's stage has no use for are None."""

    rank: int
    most_rows: int
    alarm: PeerAlarm
    send: "ActivationSender | None"
    """Of every stage but the last."""
    receive: "ActivationReceiver | None"
    """Of every stage but the first."""
    mailbox: "Mailbox | None"
    """Of the first stage."""
    post: "Postman | None"
    """Of the last stage."""

    def takes(self, num_tokens: int) -> bool:
        """Return True if the activations of so many tokens are passed on by kernels."""
        return num_tokens <= self.most_rows

    def check(self) -> None:
        """Raise PeerLost if a kernel has waited in vain. All results since then are worthless."""
        if bool(self.alarm.seen):
            raise PeerLost(f"rank {self.rank} waited for activations or tokens of another stage in vain")
