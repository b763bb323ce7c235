"""Which family a checkpoint belongs to. A new family is one file beside this one and one line here."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from . import llama, mistral, qwen2, qwen3
from .config import DecoderConfig, eos_ids
from .config_fields import ConfigFields

FAMILIES: dict[str, Callable[[ConfigFields], DecoderConfig]] = {
    family.ARCHITECTURE: family.decoder_config for family in (llama, mistral, qwen2, qwen3)
}


def load_model_config(path: Path) -> DecoderConfig:
    """Read ``config.json``, and ``generation_config.json`` if there is one, of a model directory.

    Raises:
        NotFoundError: there is no ``config.json``.
        ModelFormatError: the architecture is unknown, or a field is missing, malformed, unsupported or inconsistent.
    """
    fields = ConfigFields.read(path / "config.json")
    architectures = fields.texts("architectures")
    if len(architectures) != 1 or architectures[0] not in FAMILIES:
        raise fields.error("architectures", f"one of {', '.join(FAMILIES)}")
    config = FAMILIES[architectures[0]](fields)
    generation_path = path / "generation_config.json"
    if not generation_path.exists():
        return config
    further = eos_ids(ConfigFields.read(generation_path), config.vocab_size)
    return replace(config, eos_token_ids=tuple(dict.fromkeys(config.eos_token_ids + further)))
