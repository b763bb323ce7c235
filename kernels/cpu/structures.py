"""The structures of ``decoder.h``, field by field."""

from __future__ import annotations

import ctypes

from .linear import LinearWeight

MAX_QKV_PARTS, MAX_GATE_UP_PARTS = 3, 2


class NativeLayer(ctypes.Structure):
    """``DecoderLayer`` of ``decoder.h``."""

    _fields_ = (
        ("qkv", LinearWeight * MAX_QKV_PARTS),
        ("out", LinearWeight),
        ("gate_up", LinearWeight * MAX_GATE_UP_PARTS),
        ("down", LinearWeight),
        ("attention_norm", ctypes.c_void_p),
        ("q_norm", ctypes.c_void_p),
        ("k_norm", ctypes.c_void_p),
        ("mlp_norm", ctypes.c_void_p),
        ("num_heads", ctypes.c_int64),
        ("num_kv_heads", ctypes.c_int64),
        ("head_dim", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("scale", ctypes.c_float),
        ("eps", ctypes.c_float),
        ("num_qkv", ctypes.c_int32),
        ("num_gate_up", ctypes.c_int32),
    )


class NativeModel(ctypes.Structure):
    """``DecoderModel``."""

    _fields_ = (
        ("layers", ctypes.POINTER(NativeLayer)),
        ("num_layers", ctypes.c_int64),
        ("hidden", ctypes.c_int64),
        ("embedding", LinearWeight),
        ("vocab_start", ctypes.c_int64),
        ("vocab_size", ctypes.c_int64),
        ("head", LinearWeight),
        ("norm", ctypes.c_void_p),
        ("eps", ctypes.c_float),
        ("rotary_scaling", ctypes.c_float),
        ("all_reduce", ctypes.c_void_p),
        ("all_reduce_handle", ctypes.c_void_p),
        ("embeds", ctypes.c_int32),
        ("has_head", ctypes.c_int32),
    )


class NativeStep(ctypes.Structure):
    """``DecoderStep``."""

    _fields_ = (
        ("num_tokens", ctypes.c_int64),
        ("num_seqs", ctypes.c_int64),
        ("num_logits", ctypes.c_int64),
        ("token_ids", ctypes.c_void_p),
        ("positions", ctypes.c_void_p),
        ("slots", ctypes.c_void_p),
        ("logits_indices", ctypes.c_void_p),
        ("query_start", ctypes.c_void_p),
        ("context_lens", ctypes.c_void_p),
        ("block_tables", ctypes.c_void_p),
        ("table_stride", ctypes.c_int64),
        ("inv_freq", ctypes.c_void_p),
        ("inv_freq_stride", ctypes.c_int64),
        ("cos", ctypes.c_void_p),
        ("sin", ctypes.c_void_p),
        ("residual", ctypes.c_void_p),
        ("delta", ctypes.c_void_p),
        ("output", ctypes.c_void_p),
        ("kv_data", ctypes.c_void_p),
        ("num_blocks", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("kv_dtype", ctypes.c_int32),
        ("has_delta", ctypes.c_int32),
        ("prepared", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
    )
