"""What the blocks are checked on: the edges of lengths, batches, shapes and memory."""

from __future__ import annotations

from dataclasses import dataclass, replace

from .shapes import SHAPES, Shape

SMALL = Shape("small", 1024, 16, 4, 128, 2816, 4096, 1)
TINY = Shape("tiny", 256, 8, 2, 64, 384, 512, 1)


@dataclass(frozen=True, slots=True)
class AttentionCase:
    """One call of an attention block.

    Attributes:
        contexts: of the sequences, the new token included; 1 is a sequence without history.
        first_block: blocks are taken from this one on, to reach far into a large cache.
        scores: a bias of all elements of all queries, against keys of about one; far below zero, so are all scores.
    """

    name: str
    shape: Shape
    contexts: tuple[int, ...]
    block_size: int = 16
    bias: bool = False
    first_block: int = 0
    scores: float = 0.0
    delta: bool = True


@dataclass(frozen=True, slots=True)
class DenseCase:
    """One call of an MLP block or a head."""

    name: str
    shape: Shape
    batch: int
    bias: bool = False
    delta: bool = True


EDGES = (1, 2, 15, 16, 17, 31, 32, 33, 63, 64, 65, 127, 128, 129, 255, 257)


def attention_cases(*, tiny: bool) -> list[AttentionCase]:
    """All of them, or few and small ones that a CPU can afford."""
    base = TINY if tiny else SMALL
    head_64 = replace(base, head_dim=64)
    edges = EDGES[::5] if tiny else EDGES
    cases = [
        *(AttentionCase(f"context {context}", base, (context,)) for context in edges),
        *(AttentionCase(f"context {context}, blocks of 64", base, (context,), 64) for context in (1, 64, 65)),
        AttentionCase("ragged", base, (1, 17, 300, 64)),
        AttentionCase("head 64", head_64, (1, 77, 300)),
        AttentionCase("head 64, blocks of 64", head_64, (129, 64), 64),
        AttentionCase("MHA", replace(base, heads=8, kv_heads=8), (33, 70)),
        AttentionCase("MQA", replace(base, heads=8, kv_heads=1), (33, 70)),
        AttentionCase("MQA, head 64", replace(head_64, kv_heads=1), (33, 70)),
        AttentionCase("GQA 8", replace(base, heads=16), (33, 70)),
        AttentionCase("norm of Q and K", replace(base, qk_norm=True), (5, 40)),
        AttentionCase("biases", base, (5, 40), bias=True),
        AttentionCase("no delta", base, (5, 40), delta=False),
        AttentionCase("all scores negative", base, (5, 12), scores=-40.0),
    ]
    return cases if tiny else cases + _large_attention_cases()


def _large_attention_cases() -> list[AttentionCase]:
    batches = (2, 3, 7, 8, 9, 16, 33, 64, 65, 192)  # more than 64 are several launches
    cases = [AttentionCase(f"batch {batch}", SMALL, tuple(range(60, 60 + 3 * batch, 3))) for batch in batches]
    for shape in SHAPES:
        cases.append(AttentionCase(shape.name, shape, (4096,)))
        cases.append(AttentionCase(f"{shape.name}, 16 sequences", shape, tuple(range(900, 1124, 14)), 64))
    return [
        *cases,
        AttentionCase("very ragged", SMALL, (1, 17, 4096, 131072)),
        AttentionCase("128K", SHAPES[1], (131072,)),
        AttentionCase("128K, blocks of 64", SHAPES[3], (131071, 1), 64),
        # Block n begins n * 8 * 16 * 128 elements into a layer's keys: block 131072 is 2**31 elements in.
        AttentionCase("beyond 2**31 elements", SHAPES[1], (500, 4096), first_block=140_000),
    ]


def dense_cases(*, tiny: bool) -> list[DenseCase]:
    """Likewise, for MLP blocks and heads."""
    base, batches = (TINY, (1, 3)) if tiny else (SMALL, (1, 2, 3, 7, 8, 9, 16, 17, 33, 64, 65, 192))
    cases = [DenseCase(f"batch {batch}", base, batch) for batch in batches]
    cases += [DenseCase("biases", base, 5, bias=True), DenseCase("no delta", base, 5, delta=False)]
    if not tiny:
        cases += [DenseCase(f"{shape.name}, batch {batch}", shape, batch) for shape in SHAPES for batch in (1, 16)]
    return cases
