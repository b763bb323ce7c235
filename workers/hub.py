"""Models from the Hugging Face hub, and what went wrong in a line."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import snapshot_download

# HTTPError is the HTTP client's, whichever this release of the hub's library uses; HfHubHTTPError derives from it.
from huggingface_hub.errors import (  # type: ignore[attr-defined]
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)

from ..runtime.errors import NotFoundError

# Weights, configuration and tokenizer. No code is ever fetched, nor the copies of the weights in other formats that
# some repositories keep beside them.
HUB_ALLOW = ["*.json", "*.safetensors", "tokenizer.model", "merges.txt", "vocab.txt", "*.jinja"]
HUB_IGNORE = ["*/*", "consolidated*"]


def fetch(repository: str) -> Path:
    """The directory of a repository's files in Hugging Face's cache; downloads what is not there yet.

    Raises:
        NotFoundError: there is no such repository, or it cannot be reached; what to do.
    """
    try:
        return Path(snapshot_download(repository, allow_patterns=HUB_ALLOW, ignore_patterns=HUB_IGNORE))
    except (HTTPError, HFValidationError, OSError) as error:
        raise NotFoundError(
            f"{repository!r} is not a directory, and could not be fetched from the Hugging Face hub: {_why(error)}",
            model=repository,
        ) from error


def _why(error: Exception) -> str:
    """The cause and the remedy, without the library's paragraphs."""
    cause = error.__cause__
    match error:
        case GatedRepoError():
            return "ask for access on its page there, and set HF_TOKEN"
        case RepositoryNotFoundError():
            return "there is no such repository, or it is private and HF_TOKEN does not open it"
        case LocalEntryNotFoundError() if isinstance(cause, OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set, and it was not downloaded before"
        case LocalEntryNotFoundError() if cause is not None:
            return f"{_first_line(cause)}; download it where there is a network, or name a directory"
    return _first_line(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
