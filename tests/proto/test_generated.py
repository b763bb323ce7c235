"""The generated modules are those of the sources; a stale one would speak another wire than it says."""

import runpy
from pathlib import Path

import fuseline.proto

ROOT = Path(fuseline.proto.__file__).parent


def test_the_committed_modules_are_what_the_sources_generate(tmp_path: Path) -> None:
    generate = runpy.run_path(str(ROOT / "generate.py"))["generate"]
    generate(tmp_path)
    fresh = sorted(path.relative_to(tmp_path) for path in tmp_path.rglob("*_pb2*"))
    assert fresh
    for path in fresh:
        assert (ROOT / path).read_text() == (tmp_path / path).read_text(), f"{path} is stale: run `make proto`"


def test_every_scalar_sampling_field_has_presence() -> None:
    from fuseline.proto.fuseline.v1.common_pb2 import SamplingParams

    for field in SamplingParams.DESCRIPTOR.fields:
        assert field.has_presence or field.is_repeated, field.name
