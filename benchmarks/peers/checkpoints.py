"""Random-weight Llama checkpoints in Hugging Face's format."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from .engines.base import Shape

VOCAB_SIZE = 32_000
BYTES_OF_KV = 2


def _shape(hidden: int, intermediate: int, layers: int, heads: int, kv_heads: int, head_dim: int) -> Shape:
    return Shape(VOCAB_SIZE, hidden, intermediate, layers, heads, kv_heads, head_dim, 2048, 1e-5, 500_000.0)


# Their sizes are those of small models that are in use; embeddings are tied.
SHAPES = {
    "a110m": _shape(hidden=768, intermediate=2048, layers=12, heads=12, kv_heads=4, head_dim=64),
    "b05b": _shape(hidden=1024, intermediate=3072, layers=28, heads=16, kv_heads=8, head_dim=128),
    "c1b": _shape(hidden=2048, intermediate=8192, layers=16, heads=32, kv_heads=8, head_dim=64),
}


@dataclass(frozen=True, slots=True)
class Tensor:
    """A weight's shape, and the standard deviation it is drawn with; norms are drawn around one."""

    size: tuple[int, ...]
    std: float
    mean: float = 0.0


def tensors(shape: Shape) -> dict[str, Tensor]:
    """By name. Drawn so that every part matters to the logits: no layer's output is lost in the residual stream, so
    that the next token depends on the whole context, and attention is neither flat nor on one token alone."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    queries, keys = shape.num_attention_heads * shape.head_dim, shape.num_key_value_heads * shape.head_dim

    def linear(rows: int, columns: int, gain: float = 1.0) -> Tensor:
        return Tensor((rows, columns), gain / columns**0.5)

    norm = Tensor((hidden,), 0.1, 1.0)
    found = {"model.embed_tokens.weight": linear(shape.vocab_size, hidden), "model.norm.weight": norm}
    for layer in range(shape.num_hidden_layers):
        of = f"model.layers.{layer}"
        found |= {
            f"{of}.input_layernorm.weight": norm,
            f"{of}.self_attn.q_proj.weight": linear(queries, hidden, 1.5),
            f"{of}.self_attn.k_proj.weight": linear(keys, hidden, 1.5),
            f"{of}.self_attn.v_proj.weight": linear(keys, hidden),
            f"{of}.self_attn.o_proj.weight": linear(hidden, queries),
            f"{of}.post_attention_layernorm.weight": norm,
            f"{of}.mlp.gate_proj.weight": linear(inner, hidden),
            f"{of}.mlp.up_proj.weight": linear(inner, hidden),
            f"{of}.mlp.down_proj.weight": linear(hidden, inner),
        }
    return found


def num_parameters(shape: Shape) -> int:
    return sum(torch.Size(tensor.size).numel() for tensor in tensors(shape).values())


def step_bytes(shape: Shape, bytes_per_weight: float, batch: int, context: float) -> float:
    """What a decode step of a batch has to read: each weight once, and each sequence's KV in 16 bits."""
    kv = 2 * shape.num_hidden_layers * shape.num_key_value_heads * shape.head_dim * BYTES_OF_KV
    return num_parameters(shape) * bytes_per_weight + batch * context * kv


def write(name: str, folder: Path) -> Path:
    """The checkpoint's directory; written unless it is there and whole."""
    path = folder / name
    if path.exists():
        return path
    shape, partial = SHAPES[name], folder / f"{name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    generator = torch.Generator().manual_seed(0)
    weights = {}
    for key, tensor in tensors(shape).items():
        drawn = torch.randn(tensor.size, generator=generator) * tensor.std + tensor.mean
        weights[key] = drawn.to(torch.bfloat16)
    save_file(weights, partial / "model.safetensors", {"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "rope_scaling": None,
        **asdict(shape),
    }
    (partial / "config.json").write_text(json.dumps(config, indent=1))
    (partial / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    _write_tokenizer(partial)
    partial.rename(path)
    return path


def _write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer that knows the bytes and as many names as the vocabulary has room for; prompts are given
    as ids, but peers want to see one."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    special = ["<unk>", "<s>", "</s>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [f"w{number}" for number in range(VOCAB_SIZE - len(special) - len(letters))]
    vocab = {token: number for number, token in enumerate((*special, *letters, *names))}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(path / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "model_max_length": 2048,
    }
    (path / "tokenizer_config.json").write_text(json.dumps(config, indent=1))
