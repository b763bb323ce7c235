"""One step's input to a model: views into buffers that are allocated once, so that a step can be replayed."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..kernels.types import StepMetadata

Tensor = torch.Tensor


@dataclass(frozen=True, eq=False)
class ForwardBatch(StepMetadata):
    """A step's metadata, its tokens, and what is wanted of it.

    Attributes:
        token_ids: int64[T].
        prompt_lens: int32[B], prompt length of each sequence; dynamic rotary embeddings depend on it.
        logits_indices: int64[S], rows in ``[0, T)`` whose logits are wanted.
    """

    token_ids: Tensor
    prompt_lens: Tensor
    logits_indices: Tensor


class ForwardBuffers:
    """The memory of one step's batch.

    The owner writes the host arrays, as many leading entries as the step has, then calls ``batch``. On a CPU the
    batch's tensors share memory with the arrays; on another device ``batch`` copies. Either way the batch is valid
    until the arrays are written for the next step.

    Attributes:
        token_ids, positions, slot_mapping: int64[max_num_tokens].
        query_start: int32[max_num_seqs + 1].
        context_lens, prompt_lens: int32[max_num_seqs].
        block_tables: int32[max_num_seqs, max_blocks_per_seq].
        logits_indices: int64[max_num_tokens].
    """

    def __init__(self, max_num_seqs: int, max_num_tokens: int, max_blocks_per_seq: int, device: torch.device) -> None:
        self._device = device
        self._host: dict[str, Tensor] = {}
        self._on_device: dict[str, Tensor] = {}
        self._shape = (0, 0, 0)
        self._views: dict[str, Tensor] = {}  # of the last batch; one of the same shape has the same
        self.token_ids = self._allocate("token_ids", np.int64, max_num_tokens)
        self.positions = self._allocate("positions", np.int64, max_num_tokens)
        self.slot_mapping = self._allocate("slot_mapping", np.int64, max_num_tokens)
        self.query_start = self._allocate("query_start", np.int32, max_num_seqs + 1)
        self.context_lens = self._allocate("context_lens", np.int32, max_num_seqs)
        self.prompt_lens = self._allocate("prompt_lens", np.int32, max_num_seqs)
        self.block_tables = self._allocate("block_tables", np.int32, max_num_seqs, max_blocks_per_seq)
        self.logits_indices = self._allocate("logits_indices", np.int64, max_num_tokens)

    def batch(self, num_seqs: int, num_tokens: int, num_logits: int) -> ForwardBatch:
        """The batch of what the host arrays hold now. ``query_start`` and ``context_lens`` must be filled in."""
        if self._shape != (num_seqs, num_tokens, num_logits):
            self._shape = num_seqs, num_tokens, num_logits
            sizes = {"query_start": num_seqs + 1, "logits_indices": num_logits}
            sizes |= dict.fromkeys(("context_lens", "prompt_lens", "block_tables"), num_seqs)
            sizes |= dict.fromkeys(("token_ids", "positions", "slot_mapping"), num_tokens)
            self._views = {name: self._on_device[name][:size] for name, size in sizes.items()}
        if self._device.type != "cpu":
            for name, view in self._views.items():
                view.copy_(self._host[name][: view.shape[0]], non_blocking=True)
        query_start = self.query_start[: num_seqs + 1]
        context_lens = self.context_lens[:num_seqs]
        return ForwardBatch(
            **self._views,
            query_start_host=query_start,
            context_lens_host=context_lens,
            max_query_len=1 if num_tokens == num_seqs else int((query_start[1:] - query_start[:-1]).max()),
            max_context_len=int(context_lens.max()),
        )

    def _allocate(self, name: str, dtype: type[np.int64] | type[np.int32], *shape: int) -> np.ndarray:
        torch_dtype = torch.int64 if dtype is np.int64 else torch.int32
        pinned = self._device.type == "cuda"
        self._host[name] = torch.zeros(shape, dtype=torch_dtype, pin_memory=pinned)
        self._on_device[name] = self._host[name].to(self._device)
        return self._host[name].numpy()
