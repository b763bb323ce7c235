"""The collectives written down: one-shot as the kernels use them, log2 as the paper has them, and the public loop.

ClusterReduce leaves the reduction of all CTAs' vectors in every CTA; ClusterGather leaves all of them side by side.
Every function takes the number of CTAs, the elements of one CTA's input and how often the collective is repeated, and
knobs that leave a protection out: the tests show what then breaks.

The one-shot forms push a vector straight to all peers: one hop, ``(N - 1) * N`` vectors on the wire. A receive slot
belongs to one sender, so results are folded in rank order and every CTA has the same bits. Two sets of slots, each
with a barrier of its own, take turns: a CTA sends in epoch e + 2 only after every peer sent in epoch e + 1, which
each peer does after it read its slots of epoch e.

The log2 forms (ClusterFusion, arXiv 2508.18850, algorithms 1 and 2) take log2(N) hops with growing strides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from .schedule import Arm, ClusterBarrier, Exit, Fold, Init, Load, Op, Region, Schedule, Send, Store, Wait, WaitSent


def reduce_one_shot(
    num_ctas: int, size: int, epochs: int, *, slot_sets: int = 2, source_sets: int = 2, by_copy: bool = False
) -> Schedule:
    """All-reduce in one hop.

    Args:
        slot_sets: sets of receive slots that take turns; less than 2 is wrong.
        source_sets: buffers of the CTA's own vector that take turns.
        by_copy: push by bulk copy instead of from registers; then one source buffer is wrong.
    """

    def epoch(rank: int, e: int) -> Iterator[Op]:
        turn, own = e % slot_sets, Region(f"partial{e % source_sets}", 0, size)
        slots = [Region(f"slots{turn}", peer * size, (peer + 1) * size) for peer in range(num_ctas)]
        yield Load(own, e)
        yield from _push(rank, num_ctas, own, slots[rank], f"ready{turn}", e // slot_sets, by_copy)
        total = Region("total", 0, size)
        yield Fold(total, tuple(own if peer == rank else slots[peer] for peer in range(num_ctas)))
        yield Store(total, e)

    return _schedule(num_ctas, size, epochs, False, epoch, exit_barrier=by_copy)


def gather_one_shot(
    num_ctas: int, size: int, epochs: int, *, slot_sets: int = 2, source_sets: int = 2, by_copy: bool = False
) -> Schedule:
    """All-gather in one hop, each segment at its final place; arguments as ``reduce_one_shot``."""

    def epoch(rank: int, e: int) -> Iterator[Op]:
        turn, own = e % slot_sets, Region(f"own{e % source_sets}", 0, size)
        segment = Region(f"gathered{turn}", rank * size, (rank + 1) * size)
        yield Load(own, e)
        yield Fold(segment, (own,))
        yield from _push(rank, num_ctas, own, segment, f"ready{turn}", e // slot_sets, by_copy)
        yield Store(Region(f"gathered{turn}", 0, num_ctas * size), e)

    return _schedule(num_ctas, size, epochs, True, epoch, exit_barrier=by_copy)


def reduce_scatter(num_ctas: int, size: int, epochs: int, *, second_wait: bool = True) -> Schedule:
    """All-reduce in two hops, for long vectors: each CTA adds up its part of all vectors and sends the sum to all.

    One set of slots and of results is enough: a CTA sends parts of epoch e + 1 after it has everyone's sums of e.

    Args:
        size: a multiple of ``num_ctas``.
        second_wait: for the others' sums; the reader is wrong without.
    """
    part = size // num_ctas

    def epoch(rank: int, e: int) -> Iterator[Op]:
        own = Region("data", rank * part, (rank + 1) * part)
        yield Load(Region("data", 0, size), e)
        if num_ctas > 1:
            peers = [(rank + step) % num_ctas for step in range(1, num_ctas)]
            yield Arm("parts", e, (num_ctas - 1) * part)
            yield Arm("sums", e, (num_ctas - 1) * part)
            slots = [Region("slots", peer * part, (peer + 1) * part) for peer in range(num_ctas)]
            for peer in peers:
                theirs = Region("data", peer * part, (peer + 1) * part)
                yield Send(peer, theirs, slots[rank], "parts", e, by_copy=False)
            yield Wait("parts", e)
            yield Fold(own, tuple(own if peer == rank else slots[peer] for peer in range(num_ctas)))
            for peer in peers:
                yield Send(peer, own, Region("sums", own.begin, own.end), "sums", e, by_copy=False)
            if second_wait:
                yield Wait("sums", e)
            for peer in peers:
                theirs = Region("data", peer * part, (peer + 1) * part)
                yield Fold(theirs, (Region("sums", theirs.begin, theirs.end),))
        yield Store(Region("data", 0, size), e)

    return _schedule(num_ctas, size, epochs, False, epoch, exit_barrier=False)


def reduce_exchange(num_ctas: int, size: int, epochs: int, *, slot_sets: int = 2) -> Schedule:
    """All-reduce in log2(N) hops between pairs, both of which add in rank order: every CTA has the same bits.

    The log2 form that the kernels have, to measure beside: from registers, a slot and a barrier a hop.

    Args:
        slot_sets: that take turns; less than 2 is wrong.
    """

    def epoch(rank: int, e: int) -> Iterator[Op]:
        data, turn, phase = Region("data", 0, size), e % slot_sets, e // slot_sets
        yield Load(data, e)
        for hop, stride in enumerate(_powers_of_two(num_ctas)):
            partner, name = rank ^ stride, f"{hop}.{turn}"
            received = Region(f"received{name}", 0, size)
            yield Arm(f"ready{name}", phase, size)
            yield Send(partner, data, received, f"ready{name}", phase, by_copy=False)
            yield Wait(f"ready{name}", phase)
            yield Fold(data, (data, received) if rank < partner else (received, data))
        yield Store(data, e)

    return _schedule(num_ctas, size, epochs, False, epoch, exit_barrier=False)


def reduce_rotating(num_ctas: int, size: int, epochs: int, *, owners_rotate: bool = True) -> Schedule:
    """Reduce to one CTA, another in each epoch: how a linear layer adds up its partial sums (kernels' linear.cuh).

    One set of slots is enough: before a rank sends to the same owner again it has owned an exchange itself, and so
    has waited for what that owner sent after it had read its slots.

    Args:
        owners_rotate: otherwise rank 0 owns all; wrong with one set of slots.
    """

    def epoch(rank: int, e: int) -> Iterator[Op]:
        owner = e % num_ctas if owners_rotate else 0
        phase = e // num_ctas if owners_rotate else e
        own = Region(f"partial{e % 2}", 0, size)
        slots = [Region("slots", peer * size, (peer + 1) * size) for peer in range(num_ctas)]
        yield Load(own, e)
        if rank != owner:
            yield Send(owner, own, slots[rank], "ready", phase, by_copy=False)
            return
        if num_ctas > 1:
            yield Arm("ready", phase, (num_ctas - 1) * size)
            yield Wait("ready", phase)
        total = Region("total", 0, size)
        yield Fold(total, tuple(own if peer == rank else slots[peer] for peer in range(num_ctas)))
        yield Store(total, e)

    return _schedule(num_ctas, size, epochs, False, epoch, exit_barrier=False)


def reduce_log2(
    num_ctas: int,
    size: int,
    epochs: int,
    *,
    round_slots: bool = False,
    round_barrier: bool = True,
    wait_sent: bool = True,
    strides: Iterable[int] | None = None,
) -> Schedule:
    """All-reduce in log2(N) hops: in each, send the running sum ``stride`` ranks on and add what arrives.

    The sum is sent by bulk copy from where it is added up, so a CTA must know its copy has been read before it adds
    (``wait_sent``; the paper and the public code do not wait). A receive buffer shared by the rounds needs a cluster
    barrier after each (``round_barrier``); one slot and barrier a round, in two sets, need none (``round_slots``).
    """
    hops = _powers_of_two(num_ctas) if strides is None else list(strides)

    def epoch(rank: int, e: int) -> Iterator[Op]:
        partial = Region("partial", 0, size)
        yield Load(partial, e)
        for turn, stride in enumerate(hops):
            name, phase = (f"{turn}.{e % 2}", e // 2) if round_slots else ("", e * len(hops) + turn)
            received = Region(f"received{name}", 0, size)
            yield Arm(f"ready{name}", phase, size)
            yield Send((rank + stride) % num_ctas, partial, received, f"ready{name}", phase, by_copy=True)
            yield Wait(f"ready{name}", phase)
            if wait_sent:
                yield WaitSent()
            yield Fold(partial, (partial, received))
            if round_barrier:
                yield ClusterBarrier()
        yield Store(partial, e)

    return _schedule(num_ctas, size, epochs, False, epoch, exit_barrier=False)


def gather_log2(num_ctas: int, size: int, epochs: int, *, round_barriers: bool = True) -> Schedule:
    """All-gather in log2(N) hops, each sending all that the CTA has; segments arrive rotated and are put in place.

    Args:
        round_barriers: an mbarrier a round. Sharing one mixes rounds up: a later round's bytes, from another peer,
            may come before an earlier round's.
    """
    hops = _powers_of_two(num_ctas)

    def epoch(rank: int, e: int) -> Iterator[Op]:
        buffer = f"rotated{e % 2}"
        yield Load(Region(buffer, 0, size), e)
        for turn, stride in enumerate(hops):
            name, phase = (f"{turn}.{e % 2}", e // 2) if round_barriers else ("", e * len(hops) + turn)
            sent, place = Region(buffer, 0, stride * size), Region(buffer, stride * size, 2 * stride * size)
            yield Arm(f"ready{name}", phase, stride * size)
            yield Send((rank + stride) % num_ctas, sent, place, f"ready{name}", phase, by_copy=True)
            yield Wait(f"ready{name}", phase)
        for behind in range(num_ctas):
            owner = (rank - behind) % num_ctas
            yield Fold(
                Region("gathered", owner * size, (owner + 1) * size),
                (Region(buffer, behind * size, (behind + 1) * size),),
            )
        yield Store(Region("gathered", 0, num_ctas * size), e)
        yield WaitSent()  # the buffer is loaded again two epochs on

    return _schedule(num_ctas, size, epochs, True, epoch, exit_barrier=False)


def reduce_public(num_ctas: int, size: int, epochs: int = 1) -> Schedule:
    """ClusterReduce as the public code has it (xinhao-luo/ClusterFusion 8755446, include/dsm.cuh), parities aside.

    Its strides are 1, 2, 3 ... N - 2 instead of 1, 2, 4 ... N / 2, which is the same for N = 4 only; and it adds to
    the running sum while its own copy of it may still be under way.
    """
    return reduce_log2(num_ctas, size, epochs, wait_sent=False, strides=range(1, num_ctas - 1))


def _push(
    rank: int, num_ctas: int, own: Region, place: Region, barrier: str, phase: int, by_copy: bool
) -> Iterator[Op]:
    """To every peer, the next rank first so that no peer is everyone's first target; then wait for all of theirs."""
    if num_ctas > 1:
        yield Arm(barrier, phase, (num_ctas - 1) * len(own))
        for step in range(1, num_ctas):
            yield Send((rank + step) % num_ctas, own, place, barrier, phase, by_copy)
        yield Wait(barrier, phase)


def _powers_of_two(num_ctas: int) -> list[int]:
    if num_ctas < 1 or num_ctas & (num_ctas - 1):
        raise ValueError(f"a log2 form needs a power of two, not {num_ctas} CTAs")
    return [1 << turn for turn in range(num_ctas.bit_length() - 1)]


def _schedule(
    num_ctas: int,
    size: int,
    epochs: int,
    gathers: bool,
    epoch: Callable[[int, int], Iterator[Op]],
    exit_barrier: bool,
) -> Schedule:
    """``Init``, a cluster barrier that shows it to the peers, the epochs, and a cluster barrier if need be.

    A CTA that waited for all that is sent to it may leave, unless a copy still reads what it sent.
    """
    programs = []
    for rank in range(num_ctas):
        body = [op for e in range(epochs) for op in epoch(rank, e)]
        end: list[Op] = [ClusterBarrier()] if exit_barrier else []
        programs.append((Init(), ClusterBarrier(), *body, *end, Exit()))
    return Schedule(tuple(programs), size, epochs, gathers)
