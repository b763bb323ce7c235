"""Frequencies of the rotary embedding, computed as transformers does, to the bit where that is possible.

Dynamic scaling changes the frequencies with the length of the sequence. Up to ``max_position_embeddings`` tokens they
are those of pretraining. Beyond, transformers takes the length of the forward pass: the prompt's for all of the
prompt, then one more with each generated token, earlier keys staying as they were cached. The same is done here, per
sequence and position: a token at position p of a sequence with a prompt of P tokens uses the frequencies for
``max(p + 1, P)`` tokens, whatever the chunks, the batch, or a recomputation after preemption. It does make the keys
of a long prompt depend on the prompt's length, so prefixes of such prompts cannot be shared
(``ModelInfo.kv_depends_on_prompt_len``).
"""

from __future__ import annotations

import math

import torch

from ...kernels import ops
from ..forward_batch import ForwardBatch
from ..models.config import RopeConfig

Tensor = torch.Tensor


class RotaryEmbedding:
    """Cosines and sines for the tokens of a step."""

    def __init__(self, config: RopeConfig, head_dim: int, device: torch.device) -> None:
        self._config = config
        self._exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        self._inv_freq = inverse_frequencies(config, head_dim).to(device)
        self._exponents = self._exponents.to(device)
        self._base_exponent = head_dim / (head_dim - 2) if head_dim > 2 else 1.0

    def cos_sin(self, batch: ForwardBatch) -> tuple[Tensor, Tensor]:
        """Two of float32[T, head_dim / 2], for ``ops.attention_block``."""
        return ops.rotary_cos_sin(batch.positions, self.inv_freq(batch), self._config.attention_scaling)

    def inv_freq(self, batch: ForwardBatch) -> Tensor:
        """float32[head_dim / 2], or [T, head_dim / 2] where frequencies differ by token."""
        return self._inv_freq if self._config.kind != "dynamic" else self._dynamic(batch)

    def _dynamic(self, batch: ForwardBatch) -> Tensor:
        """float32[T, head_dim / 2]."""
        query_lens = batch.query_start.diff()
        prompt_lens = batch.prompt_lens.repeat_interleave(query_lens, output_size=batch.num_tokens)
        lengths = torch.maximum(batch.positions + 1, prompt_lens)[:, None]
        factor, limit = self._config.factor, self._config.original_max_position
        # In float64: the last bit of a power may depend on its place in the tensor, and is rounded away so.
        stretch = ((factor * lengths.double() / limit) - (factor - 1)).clamp_min(1.0)
        stretched = 1.0 / ((self._config.theta * stretch**self._base_exponent) ** self._exponents)
        return torch.where(lengths > limit, stretched.float(), self._inv_freq)


def inverse_frequencies(config: RopeConfig, head_dim: int) -> Tensor:
    """float32[head_dim / 2], of all kinds; for "dynamic" those up to the original length."""
    frequencies: Tensor = config.theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim)
    if config.kind == "linear":
        return (1.0 / frequencies) / config.factor
    if config.kind == "yarn":
        return _yarn(config, frequencies, head_dim)
    if config.kind == "llama3":
        return _llama3(config, 1.0 / frequencies)
    return 1.0 / frequencies


def _yarn(config: RopeConfig, frequencies: Tensor, head_dim: int) -> Tensor:
    """High frequencies as they are, low ones divided by the factor, a ramp between."""

    def dimension(rotations: float) -> float:
        ratio = config.original_max_position / (rotations * 2 * math.pi)
        return (head_dim * math.log(ratio)) / (2 * math.log(config.theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / (high - low)).clamp(0, 1)
    kept = 1 - ramp
    return 1.0 / (config.factor * frequencies) * (1 - kept) + 1.0 / frequencies * kept


def _llama3(config: RopeConfig, inv_freq: Tensor) -> Tensor:
    """Wavelengths beyond the original context divided by the factor, short ones as they are, a ramp between."""
    low, high = config.low_freq_factor, config.high_freq_factor
    wavelengths = 2 * math.pi / inv_freq
    divided = torch.where(wavelengths > config.original_max_position / low, inv_freq / config.factor, inv_freq)
    smooth = (config.original_max_position / wavelengths - low) / (high - low)
    smoothed = (1 - smooth) * divided / config.factor + smooth * divided
    is_medium = (wavelengths >= config.original_max_position / high) & (
        wavelengths <= config.original_max_position / low
    )
    return torch.where(is_medium, smoothed, divided)
