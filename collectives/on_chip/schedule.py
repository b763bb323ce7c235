"""What the CTAs of a cluster do in a collective: programs of a few operations, with their hardware meaning.

A CTA owns named buffers of elements and named mbarriers in its shared memory. Its program is straight-line. Sends are
asynchronous: what they carry arrives at the peer at any later time, in any order, and counts there towards the
barrier they name. An mbarrier here is used as the kernels use it: one arrival a phase, the owner's ``Arm``, which
also says how many elements the phase waits for; the phase completes when the arrival and all elements are in.
Elements that come before ``Arm`` count too, and the hardware cannot tell for which phase a peer meant them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Region:
    """Elements ``[begin, end)`` of a buffer; whose buffer it is, the operation says."""

    buffer: str
    begin: int
    end: int

    def __len__(self) -> int:
        return self.end - self.begin

    def overlaps(self, other: Region) -> bool:
        """Whether both, taken as regions of one CTA, share an element."""
        return self.buffer == other.buffer and self.begin < other.end and other.begin < self.end


@dataclass(frozen=True, slots=True)
class Load:
    """The CTA's own part of a collective's input is written to ``destination``, as the code before it would."""

    destination: Region
    epoch: int


@dataclass(frozen=True, slots=True)
class Store:
    """``source`` holds the result of a collective; the code after it reads it here and only here."""

    source: Region
    epoch: int


@dataclass(frozen=True, slots=True)
class Fold:
    """``destination = sources[0] + sources[1] + ...`` in this order, ``+`` being the reduction; of one, a copy."""

    destination: Region
    sources: tuple[Region, ...]


@dataclass(frozen=True, slots=True)
class Send:
    """Push ``source`` to ``destination`` of the CTA ``target``, counting there towards ``barrier``.

    Attributes:
        phase: the phase of that barrier it is meant for; the proofs check it, the hardware does not know it.
        by_copy: a bulk copy, which reads ``source`` at any time between this operation and the delivery; otherwise
            st.async, whose values come from registers and so are read now.
    """

    target: int
    source: Region
    destination: Region
    barrier: str
    phase: int
    by_copy: bool


@dataclass(frozen=True, slots=True)
class Arm:
    """mbarrier.arrive.expect_tx of the CTA's own barrier: opens phase ``phase`` for ``num_elements``."""

    barrier: str
    phase: int
    num_elements: int


@dataclass(frozen=True, slots=True)
class Wait:
    """mbarrier.try_wait on the parity of ``phase`` of the CTA's own barrier until it succeeds."""

    barrier: str
    phase: int


@dataclass(frozen=True, slots=True)
class WaitSent:
    """cp.async.bulk.wait_group.read: until all bulk copies that this CTA began have read their sources."""


@dataclass(frozen=True, slots=True)
class Init:
    """The CTA's barriers become usable; in front of everything."""


@dataclass(frozen=True, slots=True)
class ClusterBarrier:
    """barrier.cluster.arrive and wait of all CTAs."""


@dataclass(frozen=True, slots=True)
class Exit:
    """The CTA ends; its shared memory is no longer its own."""


Op = Load | Store | Fold | Send | Arm | Wait | WaitSent | Init | ClusterBarrier | Exit


@dataclass(frozen=True, slots=True)
class Schedule:
    """One program a CTA, each from ``Init`` to ``Exit``, running a collective ``num_epochs`` times in a row.

    Attributes:
        num_elements: of one CTA's input.
        gathers: the result is the inputs side by side in rank order; otherwise their reduction.
    """

    programs: tuple[tuple[Op, ...], ...]
    num_elements: int
    num_epochs: int
    gathers: bool

    @property
    def num_ctas(self) -> int:
        """N."""
        return len(self.programs)
