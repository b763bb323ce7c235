"""Train the bundled demo model from the source of Python's own standard library.

The demo model exists so that Fuseline can be tried, tested and benchmarked without a download: a real
Llama-architecture causal LM in Hugging Face layout, small enough to live in the repository. Its training
text is the one corpus that everybody who can run this script already has, so anyone can remake it:

    python examples/train_demo_model.py --out workers/models/demo

Training is plain fp32, since few CPUs have fast bf16; only the saved weights are bf16. The perplexity
in `training.json` is therefore measured on the saved model as a user would load it, not on the one in memory.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

EOS = "<|endoftext|>"
VOCAB_SIZE = 4096
MAX_POSITIONS = 2048
HELD_OUT_MODULUS = 20

# Tests teach a model to write assertions; the codec and help-topic tables teach it to write tables.
SKIPPED_FOLDERS = {"site-packages", "__pycache__", "test", "tests", "idle_test", "encodings", "pydoc_data"}
# Written when an interpreter is built, so different (and full of local paths) on every machine.
SKIPPED_PREFIX = "_sysconfigdata"

# A newline is a token of its own, and indentation another: a prompt that ends in ":\n" must leave the model
# where it often was in training, about to choose an indent. A single space belongs to the word after it.
WORD_PATTERN = r"\n| {2,}| ?_*\p{L}+| ?_+| ?\p{N}| ?[^\s\p{L}\p{N}_]+|\s"

MATRIX_LR = 0.02
VECTOR_LR = 1e-2
WARMUP_FRACTION = 0.02
DECAY_FRACTION = 0.5


@dataclass(frozen=True)
class Corpus:
    """Source by relative path; the path alone decides the half, so the split is the same everywhere."""

    train: dict[str, str]
    held_out: dict[str, str]


def is_held_out(relative_path: str) -> bool:
    digest = hashlib.sha256(relative_path.encode()).digest()
    return int.from_bytes(digest[:8], "big") % HELD_OUT_MODULUS == 0


def read_corpus() -> Corpus:
    root = Path(sysconfig.get_paths()["stdlib"])
    corpus = Corpus({}, {})
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if SKIPPED_FOLDERS.intersection(relative.parts) or path.name.startswith(SKIPPED_PREFIX):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        name = relative.as_posix()
        (corpus.held_out if is_held_out(name) else corpus.train)[name] = text
    return corpus


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: any UTF-8 text survives a round trip, and a run of spaces is mostly one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=EOS,
        eos_token=EOS,
        clean_up_tokenization_spaces=False,
        model_max_length=MAX_POSITIONS,
    )


def pack(texts: Iterable[str], tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """One stream of tokens, with EOS before every document and after the last."""
    stream = [tokenizer.eos_token_id]
    for text in texts:
        stream += tokenizer.backend_tokenizer.encode(text).ids
        stream.append(tokenizer.eos_token_id)
    return torch.tensor(stream)


def batches(stream: Tensor, batch_size: int, seq_len: int, seed: int) -> Iterator[Tensor]:
    """Endless shuffled windows of seq_len + 1 tokens. Every pass over the stream cuts it at a new offset."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(seq_len, (), generator=generator))
        windows = stream[offset:].unfold(0, seq_len + 1, seq_len)
        order = torch.randperm(len(windows), generator=generator)
        for chosen in torch.split(order, batch_size):
            if len(chosen) == batch_size:
                yield windows[chosen]


def new_model(eos_token_id: int) -> LlamaForCausalLM:
    """Every dimension that tensor parallelism cuts is even, so the demo also runs on two workers."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=704,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=eos_token_id,
        eos_token_id=eos_token_id,
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:  # blocks that start as the identity train faster
        nn.init.zeros_(layer.self_attn.o_proj.weight)
        nn.init.zeros_(layer.mlp.down_proj.weight)
    return model


def orthogonalize(matrices: Tensor) -> Tensor:
    """Push the singular values of each matrix in a stack towards 1 by Newton-Schulz iteration."""
    tall = matrices.size(-2) > matrices.size(-1)
    x: Tensor = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon (Jordan, 2024) for the matrices inside the blocks: far fewer tokens to the same loss than AdamW.

    torch.optim.Muon always iterates in bf16, which CPUs without bf16 units run several times slower than
    fp32; this one stays in fp32 and does all matrices of one shape at once.
    """

    def __init__(self, params: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            by_shape: dict[torch.Size, dict[nn.Parameter, Tensor]] = defaultdict(dict)
            for param in group["params"]:
                by_shape[param.shape][param] = self._nesterov(param, group["momentum"])
            for (rows, columns), directions in by_shape.items():
                step_size = group["lr"] * max(1.0, rows / columns) ** 0.5
                updates = orthogonalize(torch.stack(list(directions.values())))
                for param, update in zip(directions, updates, strict=True):
                    param.sub_(update, alpha=step_size)

    def _nesterov(self, param: nn.Parameter, momentum: float) -> Tensor:
        if param.grad is None:
            raise ValueError("Muon needs a gradient for every matrix")
        average: Tensor = self.state[param].setdefault("average", torch.zeros_like(param))
        average.lerp_(param.grad, 1 - momentum)
        return param.grad.lerp(average, momentum)


def learning_rate_factor(progress: float) -> float:
    """Warm up, hold, then fall linearly to zero; `progress` runs from 0 to 1."""
    return min(1.0, (progress + 1e-3) / WARMUP_FRACTION, (1 - progress) / DECAY_FRACTION)


def next_token_loss(model: LlamaForCausalLM, windows: Tensor) -> Tensor:
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


def train(model: LlamaForCausalLM, data: Iterator[Tensor], steps: int, minutes: float) -> int:
    """Train until `steps` or `minutes` are used up, whichever is first; return the steps done.

    The schedule follows whichever limit is nearer, so a run cut by the clock has still decayed fully.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    inner = set(matrices)
    optimizers = [
        Muon(matrices, lr=MATRIX_LR),
        torch.optim.AdamW([p for p in model.parameters() if p not in inner], lr=VECTOR_LR, betas=(0.9, 0.95)),
    ]
    schedules = [(group, group["lr"]) for optimizer in optimizers for group in optimizer.param_groups]
    started = time.monotonic()
    average = math.log(VOCAB_SIZE)
    for step in range(steps):
        elapsed = time.monotonic() - started
        progress = max(step / steps, elapsed / (60 * minutes))
        if progress >= 1:
            return step
        for group, peak in schedules:
            group["lr"] = peak * learning_rate_factor(progress)
        loss = next_token_loss(model, next(data))
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        average += 0.05 * (loss.item() - average)
        if step % 20 == 0:
            print(f"step {step:5d}  {progress:4.0%}  {elapsed:6.0f} s  loss {average:.3f}", flush=True)
    return steps


@torch.inference_mode()
def held_out_loss(folder: Path, stream: Tensor, seq_len: int) -> float:
    """Mean loss per token, in nats, of the model in `folder` as transformers loads it."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    windows = stream.unfold(0, seq_len + 1, seq_len)
    losses = [next_token_loss(model, batch).item() * len(batch) for batch in torch.split(windows, 8)]
    return sum(losses) / len(windows)


def save(folder: Path, model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    eos = tokenizer.eos_token_id
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    generation = GenerationConfig(bos_token_id=eos, eos_token_id=eos)  # type: ignore[no-untyped-call]
    generation.save_pretrained(folder)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the demo model on the standard library's source.")
    parser.add_argument("--out", type=Path, required=True, help="folder to write the model to")
    parser.add_argument("--steps", type=int, default=2500, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=math.inf, help="stop training after this long")
    parser.add_argument("--batch-size", type=int, default=4, help="windows per step (default: %(default)s)")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens per window (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of weights and order (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.manual_seed(arguments.seed)
    corpus = read_corpus()
    tokenizer = train_tokenizer(corpus.train.values())
    stream = pack(corpus.train.values(), tokenizer)
    held_out = pack(corpus.held_out.values(), tokenizer)
    print(f"training on {len(corpus.train)} files, {len(stream):,} tokens")

    started = time.monotonic()
    model = new_model(tokenizer.eos_token_id)
    data = batches(stream, arguments.batch_size, arguments.seq_len, arguments.seed)
    steps = train(model, data, arguments.steps, arguments.minutes)
    minutes = (time.monotonic() - started) / 60
    save(arguments.out, model, tokenizer)

    loss = held_out_loss(arguments.out, held_out, arguments.seq_len)
    held_out_bytes = sum(len(text.encode()) for text in corpus.held_out.values())
    record = {
        "perplexity": round(math.exp(loss), 3),
        "bits_per_byte": round(loss / math.log(2) * len(held_out) / held_out_bytes, 3),
        "perplexity_window": arguments.seq_len,
        "held_out_rule": f"sha256(relative path), first 8 bytes big-endian, mod {HELD_OUT_MODULUS} == 0",
        "held_out_files": list(corpus.held_out),
        "held_out_tokens": len(held_out),
        "corpus_tokens": len(stream),
        "tokens_trained": steps * arguments.batch_size * arguments.seq_len,
        "steps": steps,
        "batch_size": arguments.batch_size,
        "seq_len": arguments.seq_len,
        "seed": arguments.seed,
        "minutes": round(minutes, 1),
        "parameters": model.num_parameters(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "date": datetime.now(UTC).date().isoformat(),
    }
    (arguments.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(f"perplexity {record['perplexity']} on held-out files, written to {arguments.out}")


if __name__ == "__main__":
    main()
