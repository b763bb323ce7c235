"""CTranslate2."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ctranslate2
from ctranslate2.specs import common_spec, transformer_spec

from .base import Generation, Shape, Weights

COMPUTE_TYPES = {"fp32": "float32", "int8": "int8"}


class CTranslate2Engine:
    version = ctranslate2.__version__

    def __init__(self, generator: Any) -> None:
        self._generator = generator

    def generate(self, prompts: Sequence[Sequence[int]], num_tokens: int) -> Generation:
        times: list[list[float]] = [[] for _ in prompts]

        def note(step: Any) -> bool:
            times[step.batch_id].append(time.monotonic())
            return False

        results = self._generator.generate_batch(
            [[str(token) for token in prompt] for prompt in prompts],
            max_length=num_tokens,
            min_length=num_tokens,
            sampling_topk=1,
            include_prompt_in_result=False,
            callback=note,
        )
        return Generation([result.sequences_ids[0] for result in results], times)


def prepare(checkpoint: Path, converted: Path, mode: str) -> None:
    """Fill in CTranslate2's own description of a model. (Its converter leaves head_dim out and needs torch.)"""
    shape, weights = Shape.read(checkpoint), Weights(checkpoint)
    grouped = shape.num_key_value_heads != shape.num_attention_heads
    spec = transformer_spec.TransformerDecoderModelSpec.from_config(
        shape.num_hidden_layers,
        shape.num_attention_heads,
        activation=common_spec.Activation.SWISH,
        pre_norm=True,
        ffn_glu=True,
        rms_norm=True,
        rotary_dim=0,
        rotary_interleave=False,
        rotary_base=shape.rope_theta,
        num_heads_kv=shape.num_key_value_heads if grouped else None,
        head_dim=shape.head_dim,
        quant_type=common_spec.Quantization.CT2,
    )
    decoder = spec.decoder
    decoder.scale_embeddings = False
    decoder.embeddings.weight = weights["model.embed_tokens.weight"]
    decoder.projection.weight = decoder.embeddings.weight
    decoder.layer_norm.gamma = weights["model.norm.weight"]
    for number, layer in enumerate(decoder.layer):
        of = f"model.layers.{number}"
        layer.self_attention.layer_norm.gamma = weights[f"{of}.input_layernorm.weight"]
        layer.ffn.layer_norm.gamma = weights[f"{of}.post_attention_layernorm.weight"]
        parts = [common_spec.LinearSpec() for _ in range(3)]
        for part, name in zip(parts, "qkv", strict=True):
            part.weight = weights[f"{of}.self_attn.{name}_proj.weight"]
        ctranslate2.converters.utils.fuse_linear(layer.self_attention.linear[0], parts)
        layer.self_attention.linear[1].weight = weights[f"{of}.self_attn.o_proj.weight"]
        layer.ffn.linear_0.weight = weights[f"{of}.mlp.gate_proj.weight"]
        layer.ffn.linear_0_noact.weight = weights[f"{of}.mlp.up_proj.weight"]
        layer.ffn.linear_1.weight = weights[f"{of}.mlp.down_proj.weight"]
    spec.register_vocabulary([str(token) for token in range(shape.vocab_size)])
    spec.config.bos_token, spec.config.eos_token, spec.config.unk_token = "1", "2", "0"
    spec.config.layer_norm_epsilon = shape.rms_norm_eps
    spec.validate()
    spec.optimize(quantization="int8" if mode == "int8" else None)
    spec.save(str(converted))


def load(checkpoint: Path, converted: Path, mode: str, num_threads: int) -> CTranslate2Engine:
    generator = ctranslate2.Generator(
        str(converted), device="cpu", compute_type=COMPUTE_TYPES[mode], intra_threads=num_threads
    )
    return CTranslate2Engine(generator)
