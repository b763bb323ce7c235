"""Chooses tokens from logits.

The choice for a row depends on its logits, its options, its tokens, its seed and its position, and on nothing else:
not on the batch around it, the number of threads, or the order of a reduction. Two ideas make that so.

*Counter-based randomness.* The uniform number of a position is a hash of (seed, position), so whoever holds the same
tokens continues with the same choice.

*Fixed-point probabilities.* ``exp(logit - max)`` is rounded to a multiple of 2**-44 (for a vocabulary of 2**18; of
2**-50 for one of 4096). Integer sums are exact in any order and on any device, so totals, cumulative sums, top-p
masses and log-normalisers cannot depend on how a library splits a reduction. A token less likely than half that
fraction of the most likely one is never drawn. Weight and token id together fit an int64, which makes a sort key
without ties.

Order of operations, as in vLLM: logprobs are taken from the raw logits; then min_tokens, logit_bias, repetition,
frequency and presence penalties; then, unless greedy, temperature, min_p, top_k, top_p. Equally likely tokens at the
edge of a top-k or top-p set go by token id, and so ``top_k=1`` is greedy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..runtime.plan import NO_TOKEN, Int32Array
from ..runtime.request import TokenLogprobs
from ..runtime.sampling_params import SamplingParams

_KEY_BITS = 62  # of a weight and a token id together, or of the sum of all weights
# Logits that are looked at together: float64 and int64 temporaries stay below some 200 MiB, on a CPU near its caches.
_CHUNK_ELEMENTS, _CPU_CHUNK_ELEMENTS = 1 << 22, 1 << 20


@dataclass(slots=True)
class SamplingRow:
    """What the sampler must know of one sequence. The model runner grows ``num_tokens`` as tokens are appended.

    Attributes:
        tokens: int32, prompt and outputs; entries from ``num_tokens`` on mean nothing.
        num_tokens: tokens known, which is also the position of the token to be sampled.
        seed: in ``[0, 2**63)``.
    """

    params: SamplingParams
    seed: int
    tokens: Int32Array
    num_tokens: int
    num_prompt_tokens: int
    plain_greedy: bool = field(init=False)
    edits: bool = field(init=False)
    bias: tuple[Tensor, Tensor] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        params = self.params
        penalised = (
            params.repetition_penalty != 1.0 or params.presence_penalty != 0.0 or params.frequency_penalty != 0.0
        )
        self.edits = penalised or bool(params.logit_bias) or params.min_tokens > 0
        self.plain_greedy = params.greedy and not self.edits and params.logprobs is None
        if params.logit_bias:
            ids = torch.tensor(list(params.logit_bias.keys()), dtype=torch.int64)
            self.bias = ids, torch.tensor(list(params.logit_bias.values()), dtype=torch.float32)


@dataclass(frozen=True, slots=True)
class Sampled:
    """Tokens of a batch, still on the device that computed them.

    Attributes:
        token_ids: int64[n]; ``NO_TOKEN`` where the logits are not finite.
        logprobs: by index in the batch, for rows that asked.
    """

    token_ids: Tensor
    logprobs: dict[int, TokenLogprobs]


class Sampler:
    """Stateless but for the model's end-of-sequence ids, which ``min_tokens`` bans."""

    def __init__(self, eos_token_ids: Sequence[int]) -> None:
        self._eos_token_ids = tuple(eos_token_ids)

    def sample(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Sampled:
        """Choose one token per row.

        Args:
            logits: float32 [n, vocab_size]; not changed.
            rows: n, in the same order.
        """
        if all(row.plain_greedy for row in rows):
            return Sampled(_greedy(logits), {})
        num_rows = _rows_at_once(logits)
        parts = [
            self._sample_chunk(logits[start : start + num_rows], rows[start : start + num_rows])
            for start in range(0, len(rows), num_rows)
        ]
        token_ids = torch.cat(parts)
        return Sampled(token_ids, _sampled_logprobs(logits, token_ids, rows))

    def _sample_chunk(self, logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
        if any(row.edits for row in rows):
            logits = logits.clone()
            for i, row in enumerate(rows):
                if row.edits:
                    self._edit(logits[i], row)
        token_ids = _greedy(logits)
        random = [i for i, row in enumerate(rows) if not row.params.greedy]
        if random:
            some = logits if len(random) == len(rows) else logits[random]
            drawn = _draw(some, [rows[i] for i in random])
            token_ids[random] = torch.where(token_ids[random] == NO_TOKEN, NO_TOKEN, drawn)
        return token_ids

    def _edit(self, logits: Tensor, row: SamplingRow) -> None:
        """Apply bans, biases and penalties to one row of logits, in place."""
        params, device = row.params, logits.device
        if row.num_tokens - row.num_prompt_tokens < params.min_tokens:
            banned = sorted({*self._eos_token_ids, *params.stop_token_ids})
            if len(banned) < logits.shape[0]:  # else there is nothing left to choose
                logits[banned] = -torch.inf
        if row.bias is not None:
            ids, values = (part.to(device) for part in row.bias)
            logits[ids] += values
        if params.repetition_penalty != 1.0:
            seen = torch.from_numpy(np.unique(row.tokens[: row.num_tokens])).to(device, torch.int64)
            values = logits[seen]
            penalty = params.repetition_penalty
            scaled = torch.where(values > 0, values / penalty, values * penalty)
            scaled.clamp_(max=torch.finfo(torch.float32).max)  # a tiny penalty may overflow
            logits[seen] = torch.where(torch.isfinite(values), scaled, values)
        if params.frequency_penalty != 0.0 or params.presence_penalty != 0.0:
            outputs = row.tokens[row.num_prompt_tokens : row.num_tokens]
            ids_np, counts = np.unique(outputs, return_counts=True)
            penalty_np = (counts * params.frequency_penalty + params.presence_penalty).astype(np.float32)
            logits[torch.from_numpy(ids_np).to(device, torch.int64)] -= torch.from_numpy(penalty_np).to(device)


def token_logprobs(logits: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
    """Logprobs of given tokens under the raw distribution of each row.

    Args:
        logits: float32 [n, vocab_size].
        token_ids: int64[n] on the same device.
        num_top: how many of the most likely tokens each row lists beside its own; the vocabulary's size bounds it.
    """
    result: list[TokenLogprobs] = []
    num_rows = _rows_at_once(logits)
    for start in range(0, len(num_top), num_rows):
        part = slice(start, start + num_rows)
        result += _chunk_logprobs(logits[part], token_ids[part], num_top[part])
    return result


def uniforms(seeds: Sequence[int], positions: Sequence[int]) -> NDArray[np.float64]:
    """Numbers in [0, 1), each a function of its seed and position alone: 53 bits of a twice-mixed SplitMix64."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    with np.errstate(over="ignore"):
        key = _mix(np.asarray(seeds, np.uint64) + golden)
        bits = _mix(key + (np.asarray(positions, np.uint64) + np.uint64(1)) * golden)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _greedy(logits: Tensor) -> Tensor:
    if logits.device.type == "cpu":  # numpy's argmax takes a tenth of the time of torch's max
        values = logits.numpy()
        ids = values.argmax(axis=-1)
        return torch.from_numpy(np.where(np.isfinite(values[np.arange(len(ids)), ids]), ids, NO_TOKEN))
    best, token_ids = logits.max(dim=-1)
    return torch.where(torch.isfinite(best), token_ids, NO_TOKEN)


def _id_bits(vocab_size: int) -> int:
    return max(1, (vocab_size - 1).bit_length())


def _weights(logits: Tensor, temperatures: Tensor | None) -> tuple[Tensor, float]:
    """Fixed-point probabilities, int64 [n, vocab_size], and the weight that the most likely token has."""
    one = 2.0 ** (_KEY_BITS - _id_bits(logits.shape[1]))
    x = logits.double()
    x -= logits.amax(dim=-1, keepdim=True).double()
    if temperatures is not None:
        x /= temperatures
    return x.exp_().mul_(one).round_().long(), one


def _draw(logits: Tensor, rows: Sequence[SamplingRow]) -> Tensor:
    """Invert each row's cumulative distribution: in vocabulary order, or best first after top-k or top-p."""
    device = logits.device
    params = [row.params for row in rows]
    temperatures = torch.tensor([p.temperature for p in params], dtype=torch.float64, device=device)
    weights, one = _weights(logits, temperatures[:, None])
    if any(p.min_p > 0.0 for p in params):
        least = torch.tensor([p.min_p for p in params], dtype=torch.float64, device=device)
        weights.masked_fill_(weights < (least * one).ceil().long()[:, None], 0)
    uniform = torch.from_numpy(uniforms([row.seed for row in rows], [row.num_tokens for row in rows])).to(device)
    filtered = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1.0]
    if not filtered:
        return _invert(weights, uniform)
    drawn = torch.empty(len(rows), dtype=torch.int64, device=device)
    whole = sorted(set(range(len(rows))) - set(filtered))
    if whole:
        drawn[whole] = _invert(weights[whole], uniform[whole])
        weights = weights[filtered]
    best, token_ids = _top(weights, [params[i] for i in filtered])
    drawn[filtered] = token_ids.gather(1, _invert(best, uniform[filtered])[:, None])[:, 0]
    return drawn


def _invert(weights: Tensor, uniform: Tensor) -> Tensor:
    """Per row, the index at which the cumulative weight exceeds the uniform share of the total."""
    cumulative = weights.cumsum(dim=-1)
    total = cumulative[:, -1]
    # Rounding may lift the product to the total itself, where no token is.
    target = torch.minimum((uniform * total.double()).long(), total - 1)
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def _top(weights: Tensor, params: Sequence[SamplingParams]) -> tuple[Tensor, Tensor]:
    """The top-k and, of those, the fewest that hold top-p of their mass.

    Args:
        weights: is written over.

    Returns:
        weights and token ids, int64 [n, candidates], best first; what is not kept has no weight.
    """
    vocab_size, device = weights.shape[1], weights.device
    has_k = torch.tensor([0 < p.top_k < vocab_size for p in params], device=device)
    k = torch.tensor([p.top_k if 0 < p.top_k < vocab_size else vocab_size for p in params], device=device)
    top_p = torch.tensor([p.top_p for p in params], dtype=torch.float64, device=device)
    # All V tokens, if each weighed this much, would weigh no more than what top-p leaves out: the heavier ones alone
    # make its share.
    total = weights.sum(dim=-1)
    light = (total - _share(top_p, total)) // vocab_size
    num_candidates = torch.where(has_k, k, (weights > light[:, None]).sum(dim=-1))
    id_bits = _id_bits(vocab_size)
    mask = (1 << id_bits) - 1
    keys = weights.bitwise_left_shift_(id_bits).add_(torch.arange(mask, mask - vocab_size, -1, device=device))
    best = _largest(keys, max(1, int(num_candidates.max())))  # a row of NaN has none
    token_ids = mask - (best & mask)
    best >>= id_bits
    cumulative = best.cumsum(dim=-1)
    mass = torch.where(has_k, cumulative.gather(1, k.clamp(max=best.shape[1])[:, None] - 1)[:, 0], total)
    num_kept = (cumulative < _share(top_p, mass)[:, None]).sum(dim=-1) + 1
    num_kept = torch.minimum(torch.where(top_p < 1.0, num_kept, k), k)
    best.masked_fill_(torch.arange(best.shape[1], device=device) >= num_kept[:, None], 0)
    return best, token_ids


def _rows_at_once(logits: Tensor) -> int:
    elements = _CPU_CHUNK_ELEMENTS if logits.device.type == "cpu" else _CHUNK_ELEMENTS
    return max(1, elements // logits.shape[1])


def _share(top_p: Tensor, mass: Tensor) -> Tensor:
    return torch.minimum((top_p * mass.double()).ceil().long(), mass)  # rounding may lift the product beyond the mass


def _largest(keys: Tensor, count: int) -> Tensor:
    """The greatest of each row, in falling order."""
    if keys.device.type != "cpu":
        return keys.topk(count, dim=-1).values
    values = keys.numpy()  # numpy sorts and partitions by vector instructions: several times as fast as torch
    if 2 * count < values.shape[1]:
        values.partition(values.shape[1] - count, axis=-1)
        values = values[:, -count:]
    return torch.from_numpy(np.sort(values, axis=-1)[:, : -count - 1 : -1].copy())


def _sampled_logprobs(logits: Tensor, token_ids: Tensor, rows: Sequence[SamplingRow]) -> dict[int, TokenLogprobs]:
    asked = [i for i, row in enumerate(rows) if row.params.logprobs is not None]
    if not asked:
        return {}
    asked = [i for i, token_id in zip(asked, token_ids[asked].tolist(), strict=True) if token_id != NO_TOKEN]
    num_top = [rows[i].params.logprobs or 0 for i in asked]
    return dict(zip(asked, token_logprobs(logits[asked], token_ids[asked], num_top), strict=True))


def _chunk_logprobs(logits: Tensor, token_ids: Tensor, num_top: Sequence[int]) -> list[TokenLogprobs]:
    best = logits.amax(dim=-1).double()
    weights, one = _weights(logits, None)
    log_total = best + (weights.sum(dim=-1).double() / one).log()
    own = logits.gather(1, token_ids[:, None])
    ranks = (logits > own).sum(dim=-1) + 1
    own_logprobs = own[:, 0].double() - log_total
    most = min(max(num_top), logits.shape[1])
    # Sort keys unique in a row, so that ties go by token id on every device: ordered float bits, then reversed id.
    bits = (logits + 0.0).view(torch.int32).long()
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    keys = (bits << 32) + torch.arange(2**32 - 1, 2**32 - 1 - logits.shape[1], -1, device=logits.device)
    top_ids = 2**32 - 1 - (keys.topk(most, dim=-1).values & 0xFFFFFFFF)
    top_logprobs = logits.gather(1, top_ids).double() - log_total[:, None]
    columns = (token_ids, own_logprobs, ranks, top_ids, top_logprobs)
    return [
        TokenLogprobs(token_id, logprob, rank, tuple(zip(ids[:count], values[:count], strict=True)))
        for token_id, logprob, rank, ids, values, count in zip(
            *(column.tolist() for column in columns), num_top, strict=True
        )
    ]
