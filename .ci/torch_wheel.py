"""Says so when the torch that pip would install brings CUDA along; reads pip's report of a dry run."""

from __future__ import annotations

import json
import sys

CUDA_PREFIXES = ("cuda-", "nvidia-")
NOTE = """\
note: there is no NVIDIA driver here, but pip would install torch {version} with CUDA, gigabytes that are of no use.
It works all the same. To avoid it, press Ctrl-C and run make with TORCH_INDEX=URL, where URL is PyTorch's index of
CPU wheels, as its page "Get Started" gives it for Linux, pip and CPU."""


def note(report: dict[str, list[dict[str, dict[str, object]]]]) -> str:
    """What to say of pip's installation report; empty when there is nothing to say."""
    for item in report.get("install", []):
        required = item["metadata"].get("requires_dist") or []
        if isinstance(required, list) and any(str(name).startswith(CUDA_PREFIXES) for name in required):
            return NOTE.format(version=item["metadata"]["version"])
    return ""


if __name__ == "__main__":
    reported = sys.stdin.read()
    # Nothing where pip has failed, which the installation itself will tell.
    if told := note(json.loads(reported)) if reported.strip() else "":
        print(told)
