"""llama.cpp through llama-cpp-python's low-level interface: one decode call per step, whatever the batch."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from .base import Generation, Shape, Weights

MAX_SEQUENCES, MAX_TOKENS = 16, 2048
FILE_TYPES = {
    "f16": llama_cpp.LLAMA_FTYPE_MOSTLY_F16,
    "q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
    "q4_k_m": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M,
}


class LlamaCppEngine:
    version = llama_cpp.__version__

    def __init__(self, model: Any, num_threads: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_batch, params.n_ubatch = MAX_TOKENS, 512, 512
        params.n_seq_max, params.kv_unified = MAX_SEQUENCES, True
        params.n_threads = params.n_threads_batch = num_threads
        self._model = model  # must outlive the context
        self._context = llama_cpp.llama_init_from_model(model, params)
        self._vocab_size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
        self._batch = llama_cpp.llama_batch_init(params.n_batch, 0, 1)

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Generation:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        # A batch holds 512 tokens: prompts go in as many at a time as fit.
        tokens, firsts = [], []
        group = max(1, 512 // len(prompts[0]))
        for start in range(0, len(prompts), group):
            numbered = list(enumerate(prompts))[start : start + group]
            tokens += self._decode([(seq, pos, t) for seq, p in numbered for pos, t in enumerate(p)], len(prompts[0]))
            firsts += [time.monotonic()] * len(numbered)
        steps, times = [tokens], [[first] for first in firsts]
        for pos in range(len(prompts[0]), len(prompts[0]) + num_tokens - 1):
            steps.append(self._decode([(seq, pos, token) for seq, token in enumerate(steps[-1])], 1))
            now = time.monotonic()
            for of_sequence in times:
                of_sequence.append(now)
        return Generation([list(column) for column in zip(*steps, strict=True)], times)

    def _decode(self, entries: list[tuple[int, int, int]], period: int) -> list[int]:
        """Run entries of (sequence, position, token); the choice after every ``period``-th of them."""
        batch = self._batch
        batch.n_tokens = len(entries)
        wanted = range(period - 1, len(entries), period)
        for index, (seq, pos, token) in enumerate(entries):
            batch.token[index], batch.pos[index] = token, pos
            batch.n_seq_id[index], batch.seq_id[index][0] = 1, seq
            batch.logits[index] = index in wanted
        if llama_cpp.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        chosen = []
        for index in wanted:
            logits = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self._context, index), (self._vocab_size,))
            chosen.append(int(logits.argmax()))
        return chosen


def prepare(checkpoint: Path, converted: Path, mode: str) -> None:
    """Write a bfloat16 GGUF file, and let llama.cpp quantise it."""
    exact = converted / "bf16.gguf"
    write_gguf(checkpoint, exact)
    if mode != "bf16":
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = FILE_TYPES[mode]
        target = converted / f"{mode}.gguf"
        if llama_cpp.llama_model_quantize(str(exact).encode(), str(target).encode(), ctypes.byref(params)):
            raise RuntimeError("llama_model_quantize failed")
        exact.unlink()


def load(checkpoint: Path, converted: Path, mode: str, num_threads: int) -> LlamaCppEngine:
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(
        str(converted / f"{mode}.gguf").encode(), llama_cpp.llama_model_default_params()
    )
    if not model:
        raise RuntimeError("the model cannot be loaded")
    return LlamaCppEngine(model, num_threads)


def write_gguf(checkpoint: Path, path: Path) -> None:
    """A Llama checkpoint as GGUF. Its rotary embedding turns neighbouring elements, Hugging Face's those half a head
    apart, so the rows of q and k are put in another order."""
    import gguf

    shape, weights = Shape.read(checkpoint), Weights(checkpoint)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(shape.max_position_embeddings)
    writer.add_embedding_length(shape.hidden_size)
    writer.add_block_count(shape.num_hidden_layers)
    writer.add_feed_forward_length(shape.intermediate_size)
    writer.add_head_count(shape.num_attention_heads)
    writer.add_head_count_kv(shape.num_key_value_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_dimension_count(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.rms_norm_eps)
    writer.add_vocab_size(shape.vocab_size)
    writer.add_tokenizer_model("no_vocab")

    def add(target: str, source: str, heads: int = 0) -> None:
        data = weights[source]
        if heads:
            split = data.reshape(heads, 2, shape.head_dim // 2, -1)
            data = np.ascontiguousarray(split.swapaxes(1, 2).reshape(data.shape))
        if data.ndim == 1:
            writer.add_tensor(target, data)
        else:
            kind = gguf.GGMLQuantizationType.BF16
            writer.add_tensor(target, gguf.quants.quantize(data, kind), raw_dtype=kind)

    add("token_embd.weight", "model.embed_tokens.weight")
    add("output_norm.weight", "model.norm.weight")
    for layer in range(shape.num_hidden_layers):
        to, of = f"blk.{layer}", f"model.layers.{layer}"
        add(f"{to}.attn_norm.weight", f"{of}.input_layernorm.weight")
        add(f"{to}.attn_q.weight", f"{of}.self_attn.q_proj.weight", shape.num_attention_heads)
        add(f"{to}.attn_k.weight", f"{of}.self_attn.k_proj.weight", shape.num_key_value_heads)
        add(f"{to}.attn_v.weight", f"{of}.self_attn.v_proj.weight")
        add(f"{to}.attn_output.weight", f"{of}.self_attn.o_proj.weight")
        add(f"{to}.ffn_norm.weight", f"{of}.post_attention_layernorm.weight")
        for part in ("gate", "up", "down"):
            add(f"{to}.ffn_{part}.weight", f"{of}.mlp.{part}_proj.weight")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
