"""Fetching from the hub, without one: what is asked for, and what is said when it fails."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils._paths import filter_repo_objects

from fuseline.runtime.errors import NotFoundError
from fuseline.workers import hub
from fuseline.workers.hub import fetch


def test_a_repository_is_fetched_without_its_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    files = ["config.json", "model-1.safetensors", "tokenizer.model", "modeling_evil.py", "pytorch_model.bin"]
    files += ["original/params.json", "consolidated.safetensors", "tokenizer.json", "model.safetensors.index.json"]
    fetched: list[str] = []

    def snapshot(repo: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        assert repo == "some/model"
        fetched.extend(filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns))
        return str(tmp_path)

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    assert fetch("some/model") == tmp_path
    assert fetched == [
        "config.json",
        "model-1.safetensors",
        "tokenizer.model",
        "tokenizer.json",
        "model.safetensors.index.json",
    ]


def made(kind: Any, message: str, cause: Exception | None = None) -> Exception:
    """As the library raises it, without the response that some of them want."""
    error: Exception = kind.__new__(kind, message)
    Exception.__init__(error, message)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (
            made(LocalEntryNotFoundError, "Got: ...\nPlease check", ConnectionError("Name or service not known")),
            "Name or service not known; download it where there is a network, or name a directory",
        ),
        (
            made(LocalEntryNotFoundError, "no traffic", OfflineModeIsEnabled("offline")),
            "HF_HUB_OFFLINE is set, and it was not downloaded before",
        ),
        (
            made(RepositoryNotFoundError, "401 Client Error.\n\nRepository Not Found"),
            "there is no such repository, or it is private and HF_TOKEN does not open it",
        ),
        (made(GatedRepoError, "403 Client Error.\n\nCannot"), "ask for access on its page there, and set HF_TOKEN"),
        (HFValidationError("not a name\nreally"), "not a name"),
        (hub.HTTPError("the connection broke"), "the connection broke"),  # type: ignore[attr-defined]
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_what_went_wrong_is_said_in_a_line(error: Exception, why: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def snapshot(*arguments: object, **options: object) -> str:
        raise error

    monkeypatch.setattr(hub, "snapshot_download", snapshot)
    with pytest.raises(NotFoundError) as raised:
        fetch("some/model")
    assert raised.value.__cause__ is error
    assert raised.value.message == (
        f"'some/model' is not a directory, and could not be fetched from the Hugging Face hub: {why}"
    )
