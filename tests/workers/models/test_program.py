"""Both programs of a step: torch's, which runs where there is no compiler, and the native one with its fixed bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fuseline.kernels.cpu.library import native_library
from fuseline.tests.checkpoints import FAMILIES, build_model, reference_logits, write_checkpoint
from fuseline.tests.workers.models.driver import random_schedule, run_group
from fuseline.tests.workers.models.test_families import MAX_ABS, ROPES, tokens
from fuseline.workers.models import program


@pytest.fixture
def without_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(program, "native_library", lambda: None)


@pytest.mark.usefixtures("without_compiler")
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("family", FAMILIES)
def test_torch_computes_what_transformers_does(family: str, tp: int, pp: int, tmp_path: Path) -> None:
    window = {"sliding_window": 6} if family == "mistral" else {}
    model = build_model(family, 7, tie_word_embeddings=tp > 1, **window)
    write_checkpoint(tmp_path, model)
    prompts = [tokens(i, length) for i, length in enumerate((37, 20, 1))]
    with run_group(tmp_path, tp=tp, pp=pp) as driver:
        for prompt, logits in zip(prompts, random_schedule(driver, prompts, 1), strict=True):
            assert (logits - reference_logits(model, prompt)).abs().max() < MAX_ABS


@pytest.mark.usefixtures("without_compiler")
def test_torch_in_half_precision_is_as_close_to_float32_as_transformers(tmp_path: Path) -> None:
    model = build_model("llama", 5)
    write_checkpoint(tmp_path, model, dtype=torch.bfloat16)
    prompt = tokens(1, 90)
    exact = reference_logits(model, prompt)
    theirs = reference_logits(model.bfloat16(), prompt)
    with run_group(tmp_path, dtype="bfloat16") as driver:
        (ours,) = random_schedule(driver, [prompt], 0)
    assert (ours - exact).square().mean() < 1.2 * (theirs - exact).square().mean()


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2)])
def test_both_programs_keep_the_same_int8_kv(
    tp: int, pp: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What they keep differs by a step where a value lies between two: by far less than from the exact model's."""
    if native_library() is None:
        pytest.skip("no compiler")
    model = build_model("llama", 7)
    write_checkpoint(tmp_path, model)
    prompts = [tokens(i, length) for i, length in enumerate((37, 20, 1))]
    results = []
    for library in (native_library(), None):
        monkeypatch.setattr(program, "native_library", lambda library=library: library)
        with run_group(tmp_path, tp=tp, pp=pp, kv_dtype="int8") as driver:
            results.append(torch.cat(random_schedule(driver, prompts, 1)))
    exact = torch.cat([reference_logits(model, prompt) for prompt in prompts])
    apart, off = ((one - other).square().mean().sqrt() for one, other in (results, (results[0], exact)))
    assert apart < 0.1 * off


@pytest.mark.usefixtures("without_compiler")
def test_torch_tells_of_layers_as_well(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, build_model("llama"))
    with run_group(tmp_path) as driver:
        seen: list[int] = []
        driver.models[0].forward(driver.batch_of(tokens(1, 9), num_logits=1), driver.caches[0], on_layer=seen.append)
    assert seen == [0, 1, 2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", [*FAMILIES, "dynamic"])
def test_native_bits_depend_on_no_schedule(name: str, dtype: str, tmp_path: Path) -> None:
    if native_library() is None:
        pytest.skip("no compiler")
    family, options = (name, {}) if name in FAMILIES else ("llama", {"rope_parameters": dict(ROPES["dynamic"])})
    model = build_model(family, 3, max_position_embeddings=64, **options)
    write_checkpoint(tmp_path, model, dtype=getattr(torch, dtype))
    prompts = [tokens(i, length) for i, length in enumerate((310, 75, 1, 16))]
    results = []
    for seed, chunk in ((1, 300), (2, 40), (3, 7)):
        with run_group(tmp_path, dtype=dtype, block_size=(16, 4, 8)[seed - 1], seed=seed) as driver:
            results.append(random_schedule(driver, prompts, seed, chunk))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
