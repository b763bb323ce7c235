"""``fuseline generate``: one request from the shell."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Annotated

import typer

from ...runtime.sampling_params import SamplingParams
from ..client import Client
from ..generation import Completion, GenerateChunk, collect
from ..wording import counted
from .common import DEFAULT, Address, reporting

_DEFAULTS = SamplingParams(max_tokens=128)


@reporting
def generate(
    prompt: Annotated[str, typer.Argument(help='The text to continue; "-" reads it from standard input.')],
    address: Address = DEFAULT,
    n: Annotated[int, typer.Option("--n", "-n", help="How many continuations.")] = _DEFAULTS.n,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = _DEFAULTS.max_tokens,
    min_tokens: Annotated[int, typer.Option(help="Fewest tokens to generate.")] = _DEFAULTS.min_tokens,
    temperature: Annotated[float, typer.Option(help="0 always takes the most likely token.")] = _DEFAULTS.temperature,
    top_k: Annotated[int, typer.Option(help="Sample among so many; -1 for all.")] = _DEFAULTS.top_k,
    top_p: Annotated[float, typer.Option(help="Sample among the most likely of this total.")] = _DEFAULTS.top_p,
    min_p: Annotated[
        float, typer.Option(help="Leave out what is less likely, relative to the top.")
    ] = _DEFAULTS.min_p,
    repetition_penalty: Annotated[float, typer.Option()] = _DEFAULTS.repetition_penalty,
    presence_penalty: Annotated[float, typer.Option()] = _DEFAULTS.presence_penalty,
    frequency_penalty: Annotated[float, typer.Option()] = _DEFAULTS.frequency_penalty,
    stop: Annotated[list[str] | None, typer.Option(help="Text that ends the generation; may be repeated.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after an end-of-text token.")] = False,
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
    priority: Annotated[int, typer.Option(help="Lower runs first.")] = 0,
    timeout: Annotated[float | None, typer.Option(help="Give up after so many seconds.")] = None,
    stream: Annotated[bool, typer.Option(help="Print text as it comes; with --n above 1, when it is done.")] = True,
    stats: Annotated[bool, typer.Option("--stats", help="Tell times and workers on standard error.")] = False,
) -> None:
    """Continue a text.

    Prints the continuation, without the prompt, on standard output.
    """
    params = SamplingParams(
        n=n,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        stop=tuple(stop or ()),
        ignore_eos=ignore_eos,
        seed=seed,
    )
    text = sys.stdin.read() if prompt == "-" else prompt
    with (
        Client(address) as client,
        client.generate(text, params, priority=priority, timeout=timeout) as chunks,
    ):
        live = stream and n == 1
        result = collect(_echoed(chunks) if live else chunks)
    for completion in result.completions:
        if not live:
            typer.echo(f"--- {completion.index}\n{completion.text}" if n > 1 else completion.text)
        if stats:
            typer.echo(_stats(completion), err=True)


def _echoed(chunks: Iterable[GenerateChunk]) -> Iterator[GenerateChunk]:
    begun = False
    try:
        for chunk in chunks:
            begun = True
            typer.echo(chunk.text, nl=False)
            sys.stdout.flush()
            yield chunk
    finally:
        if begun:
            typer.echo()


def _stats(completion: Completion) -> str:
    summary = completion.summary
    way = f"{summary.prefill_worker} -> {summary.decode_worker}" if summary.prefill_worker else summary.decode_worker
    return (
        f"{completion.index}: {counted(summary.num_output_tokens, 'token')} ({completion.finish_reason}),"
        f" TTFT {summary.ttft_s * 1e3:.0f} ms, TPOT {summary.tpot_s * 1e3:.1f} ms, {summary.e2e_s:.2f} s in all,"
        f" {way}, {summary.num_cached_tokens} of {summary.num_prompt_tokens} prompt tokens cached,"
        f" retries: {summary.num_retries}"
    )
