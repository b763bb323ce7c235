"""The sampler against a straightforward float64 implementation, and its independence of the batch."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from fuseline.runtime.plan import NO_TOKEN
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.workers.sampler import Sampler, SamplingRow, token_logprobs, uniforms

VOCAB = 97
EOS = 3


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def make_row(
    params: SamplingParams, seed: int = 7, history: Sequence[int] = (1, 2, 2, 5), num_prompt: int = 2
) -> SamplingRow:
    tokens = np.zeros(64, np.int32)
    tokens[: len(history)] = history
    return SamplingRow(params, seed, tokens, len(history), num_prompt)


def make_logits(n: int, seed: int = 0, vocab: int = VOCAB, scale: float = 3.0) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(n, vocab)) * scale).float()


def reference_distribution(logits: torch.Tensor, row: SamplingRow) -> NDArray[np.float64]:
    """Probabilities as the documentation describes them, one token at a time in float64."""
    p, x = row.params, np.asarray(logits, np.float64).copy()
    history = row.tokens[: row.num_tokens].tolist()
    outputs = history[row.num_prompt_tokens :]
    for i in range(len(x)):
        if len(outputs) < p.min_tokens and i in {EOS, *p.stop_token_ids}:
            x[i] = -math.inf
        x[i] += p.logit_bias.get(i, 0.0)
        if i in history:
            x[i] = x[i] / p.repetition_penalty if x[i] > 0 else x[i] * p.repetition_penalty
        if i in outputs:
            x[i] -= p.frequency_penalty * outputs.count(i) + p.presence_penalty
    if p.greedy:
        certain = np.zeros(len(x))
        certain[int(np.argmax(x))] = 1.0
        return certain
    probs = np.exp((x - x.max()) / p.temperature)
    probs /= probs.sum()
    probs[probs < p.min_p * probs.max()] = 0.0
    order = sorted(range(len(x)), key=lambda i: (-probs[i], i))
    order = order[: p.top_k] if p.top_k > 0 else order
    mass, kept = sum(probs[i] for i in order), []
    for i in order:
        kept.append(i)
        if sum(probs[j] for j in kept) >= p.top_p * mass - 1e-12:
            break
    result = np.zeros(len(x))
    result[kept] = probs[kept]
    result /= result.sum()
    return result


OPTIONS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.0, repetition_penalty=50.0, max_tokens=9),
    SamplingParams(temperature=0.0, logit_bias={11: 100.0}),
    SamplingParams(),
    SamplingParams(temperature=0.3),
    SamplingParams(temperature=2.0, top_k=5),
    SamplingParams(top_p=0.6),
    SamplingParams(temperature=1.5, top_k=20, top_p=0.9),
    SamplingParams(min_p=0.2),
    SamplingParams(min_p=0.05, top_k=7, top_p=0.8, temperature=3.0),
    SamplingParams(repetition_penalty=1.7, frequency_penalty=1.5, presence_penalty=-0.7),
    SamplingParams(min_tokens=3, stop_token_ids=(5, 9), logit_bias={9: 50.0, 3: 50.0, 5: 50.0, 20: -80.0}),
    SamplingParams(top_k=1),
]


@pytest.mark.parametrize("params", OPTIONS, ids=str)
def test_follows_the_reference_distribution(params: SamplingParams) -> None:
    sampler = Sampler([EOS])
    for case in range(20):
        logits = make_logits(1, seed=case)
        rows = [make_row(params, seed=s) for s in range(50)]
        expected = reference_distribution(logits[0], rows[0])
        ids = sampler.sample(logits.expand(50, VOCAB), rows).token_ids.numpy()
        # Inverse CDF: the drawn token is the one whose interval holds the uniform number of (seed, position).
        filters = params.top_k > 0 or params.top_p < 1.0
        order = np.lexsort((np.arange(VOCAB), -expected)) if filters else np.arange(VOCAB)
        cdf = np.empty(VOCAB)
        cdf[order] = np.cumsum(expected[order])
        u = uniforms(range(50), [4] * 50)
        assert (u < cdf[ids] + 1e-9).all()
        assert (u >= cdf[ids] - expected[ids] - 1e-9).all()
        assert (expected[ids] > 0).all()


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_a_row_does_not_know_its_batch(data: st.DataObject) -> None:
    options = data.draw(st.lists(st.sampled_from(OPTIONS), min_size=2, max_size=12))
    rows = [make_row(params, seed=i, history=range(i + 2)) for i, params in enumerate(options)]
    logits = make_logits(len(rows), seed=data.draw(st.integers(0, 1000)), vocab=2503)
    sampler = Sampler([EOS])
    together = sampler.sample(logits, rows).token_ids.tolist()
    order = data.draw(st.permutations(range(len(rows))))
    permuted = sampler.sample(logits[list(order)], [rows[i] for i in order]).token_ids.tolist()
    assert permuted == [together[i] for i in order]
    alone = [sampler.sample(logits[i : i + 1], [row]).token_ids.item() for i, row in enumerate(rows)]
    assert alone == together


def test_logprobs_do_not_know_their_batch_and_match_torch() -> None:
    rows = [make_row(SamplingParams(temperature=1.0, logprobs=k, repetition_penalty=1.4), seed=k) for k in range(6)]
    logits = make_logits(6, vocab=5003)
    sampled = Sampler([EOS]).sample(logits, rows)
    expected = torch.log_softmax(logits.double(), -1)
    for i, row in enumerate(rows):
        alone = Sampler([EOS]).sample(logits[i : i + 1], [row]).logprobs[0]
        got = sampled.logprobs[i]
        assert got == alone
        assert got.logprob == pytest.approx(expected[i, got.token_id].item(), abs=1e-7)
        assert got.rank == 1 + int((logits[i] > logits[i, got.token_id]).sum())
        top = expected[i].topk(row.params.logprobs or 0)
        assert [token for token, _ in got.top] == top.indices.tolist()
        assert [value for _, value in got.top] == pytest.approx(top.values.tolist(), abs=1e-7)


def test_equal_logits_are_ranked_by_token_id() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, 50:] = -0.0
    (entry,) = token_logprobs(logits, torch.tensor([60]), [4])
    assert [token for token, _ in entry.top] == [0, 1, 2, 3]
    assert entry.rank == 1
    for seed in range(20):
        row = make_row(SamplingParams(top_k=3), seed=seed)
        assert Sampler([]).sample(logits, [row]).token_ids.item() < 3


def test_top_p_of_a_flat_distribution_keeps_every_token_that_it_needs() -> None:
    logits = make_logits(1, vocab=6000, scale=0.01)
    row = make_row(SamplingParams(top_p=0.5))
    kept = set(torch.topk(logits[0], 3100).indices.tolist())
    drawn = {Sampler([]).sample(logits, [make_row(row.params, seed=s)]).token_ids.item() for s in range(200)}
    assert drawn <= kept
    assert len(drawn) > 150


def test_top_p_keeps_what_a_sort_of_the_whole_vocabulary_does() -> None:
    """Steep and flat, with ties at the edge. Sums in float64 may put a uniform number into the interval beside."""
    for scale, top_p in ((0.01, 0.90005), (1.0, 0.3), (5.0, 0.95), (5.0, 1e-9), (2.0, 1 - 1e-12)):
        logits = (make_logits(1, vocab=5000, scale=scale) * 4).round() / 4
        probs = torch.softmax(logits[0].double(), -1).numpy()
        order = np.lexsort((np.arange(5000), -probs))
        num_kept = int(np.searchsorted(np.cumsum(probs[order]), top_p)) + 1
        cdf = np.cumsum(probs[order[:num_kept]])
        u = uniforms(range(300), [4] * 300)
        expected = np.searchsorted(cdf, u * cdf[-1], side="right")
        rows = [make_row(SamplingParams(top_p=top_p), seed=seed) for seed in range(300)]
        ids = Sampler([]).sample(logits.expand(300, 5000), rows).token_ids.numpy()
        assert np.abs(np.argsort(order)[ids] - expected).max() <= 1
        assert (np.argsort(order)[ids] == expected).mean() > 0.9


def test_frequencies_follow_the_distribution() -> None:
    """Chi-square over 20000 seeds and 97 cells: a fair sampler exceeds 160 once in 20000 tries; seeds are fixed."""
    logits, n = make_logits(1, seed=5, scale=1.0), 20000
    expected = torch.softmax(logits[0].double(), -1).numpy() * n
    rows = [make_row(SamplingParams(), seed=seed) for seed in range(n)]
    ids = Sampler([]).sample(logits.expand(n, VOCAB), rows).token_ids.numpy()
    assert (((np.bincount(ids, minlength=VOCAB) - expected) ** 2) / expected).sum() < 160


def test_positions_draw_independently() -> None:
    rows = [make_row(SamplingParams(), history=range(i)) for i in range(1, 64)]
    assert len(set(Sampler([]).sample(torch.zeros(63, 50021), rows).token_ids.tolist())) > 55


def test_uniforms_are_uniform_over_positions_and_uncorrelated_between_seeds() -> None:
    a, b = uniforms([1] * 50000, range(50000)), uniforms([2] * 50000, range(50000))
    for u in (a, b):
        assert ((u >= 0) & (u < 1)).all()
        assert np.bincount((u * 100).astype(int), minlength=100).std() < 30  # sigma is 22
    assert abs(np.corrcoef(a, b)[0, 1]) < 0.02
    assert abs(np.corrcoef(a[1:], a[:-1])[0, 1]) < 0.02


def test_rows_without_finite_logits_get_no_token() -> None:
    logits = make_logits(5)
    logits[1] = torch.nan
    logits[2] = -torch.inf
    logits[4, 7] = torch.inf
    for params in (
        SamplingParams(temperature=0.0),
        SamplingParams(top_p=0.9),
        SamplingParams(top_p=0.9, top_k=3),
        SamplingParams(logprobs=2),
        SamplingParams(repetition_penalty=1.1, min_tokens=1, logit_bias={7: -100.0}),
    ):
        sampled = Sampler([EOS]).sample(logits, [make_row(params) for _ in range(5)])
        ids = sampled.token_ids.tolist()
        assert ids[1] == ids[2] == ids[4] == NO_TOKEN
        assert min(ids[0], ids[3]) >= 0
        assert set(sampled.logprobs) == ({0, 3} if params.logprobs else set())
        assert Sampler([EOS]).sample(logits[1:2], [make_row(params)]).token_ids.tolist() == [NO_TOKEN]


def test_no_options_leave_a_row_without_a_token() -> None:
    logits = make_logits(1)
    for params in (
        SamplingParams(repetition_penalty=1e-45, temperature=0.0),
        SamplingParams(repetition_penalty=1e-45, temperature=5e-324, top_p=1e-300),
        SamplingParams(min_tokens=3, max_tokens=9, stop_token_ids=tuple(range(VOCAB))),
        SamplingParams(min_p=1.0, top_k=2**31 - 1),
    ):
        assert 0 <= Sampler([EOS]).sample(logits, [make_row(params)]).token_ids.item() < VOCAB
