"""One small run of every op, for compute-sanitizer: ``compute-sanitizer python -m benchmarks.gpu.sanitized``."""

from __future__ import annotations

from .__main__ import find_fuseline


def run_once() -> int:
    """The exit code: 1 if a result was wrong, never one by which the sanitizer says that it found errors."""
    import torch

    from . import cases, correctness

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    checks = correctness.Checks()
    correctness.check_attention(cases.AttentionCase("sanitized", cases.TINY, (1, 33, 70)), device, checks)
    dense = cases.DenseCase("sanitized", cases.TINY, 3)
    correctness.check_mlp(dense, device, checks)
    correctness.check_head(dense, device, checks)
    print(*checks.wrong, sep="\n")
    return min(1, len(checks.wrong))


if __name__ == "__main__":
    find_fuseline()
    raise SystemExit(run_once())
