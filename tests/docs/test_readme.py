"""The commands of the README and the docs, run as they stand there."""

import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fuseline

ROOT = Path(fuseline.__file__).parent
README = (ROOT / "README.md").read_text()
BIN = Path(sys.executable).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def shell_lines() -> list[list[str]]:
    return [shlex.split(line, comments=True) for block in blocks("sh") for line in block.splitlines()]


def run_python(code: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    ).stdout


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    """The README's cluster, on a port of the system's choice; must be over when the README has stopped it."""
    (serve,) = [line for line in shell_lines() if line[:2] == ["fuseline", "serve"]]
    command = [str(BIN / serve[0]), *serve[1:], "--grpc-port", "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        assert process.stdout is not None
        try:
            seen = ""
            for line in process.stdout:
                seen += line
                if match := re.search(r"127\.0\.0\.1:(\d+)", line):
                    yield int(match[1])
                    break
            else:
                pytest.fail(f"fuseline serve ended before it was ready:\n{seen}")
            rest, _ = process.communicate(timeout=60)
            assert process.returncode == 0, seen + rest
        finally:
            process.kill()


def test_make_knows_every_target_that_is_named() -> None:
    targets = {line[1] for line in shell_lines() if line[0] == "make"} | set(re.findall(r"`make (\w+)`", README))
    assert {"demo", "test"} <= targets
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=ROOT, check=True, capture_output=True)


def test_the_embedded_example_prints_two_completions() -> None:
    (embedded,) = [block for block in blocks("python") if "LLM" in block]
    assert len(run_python(embedded).strip()) > 20


@pytest.mark.ray
def test_the_cluster_s_commands_and_client_work_in_order(port: int) -> None:
    (client,) = [block for block in blocks("python") if "Client" in block]
    assert run_python(client.replace("50051", str(port))).strip()
    operate = [line for line in shell_lines() if line[0] == "fuseline" and line[1] != "serve"]
    assert [line[1] for line in operate] == ["generate", "scale", "status", "stop"]
    for line in operate:
        command = [str(BIN / line[0]), *line[1:], "--address", f"127.0.0.1:{port}"]
        answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert answer.returncode == 0, f"{line}: {answer.stderr}"
        assert answer.stdout.strip(), line


@pytest.fixture(scope="module")
def help_texts() -> str:
    """What the commands say of themselves."""
    texts = ""
    for command in ("serve", "generate", "scale", "status"):
        run = [str(BIN / "fuseline"), command, "--help"]
        texts += subprocess.run(
            run, capture_output=True, text=True, check=True, env={"COLUMNS": "200", "TERM": "dumb"}
        ).stdout
    return texts


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for target in LINK.findall(page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_that_is_named_exists(page: Path, help_texts: str) -> None:
    for flag in set(re.findall(r"`(--[a-z][a-z-]+)", page.read_text())):
        assert flag in help_texts, f"{page.name}: {flag}"


def test_every_benchmark_that_is_named_runs() -> None:
    named = set(re.findall(r"python -m (benchmarks\.\w+)", "".join(page.read_text() for page in PAGES)))
    files, folders = (ROOT / "benchmarks").glob("*.py"), (ROOT / "benchmarks").glob("*/__main__.py")
    assert named == {f"benchmarks.{name}" for name in (*(f.stem for f in files), *(f.parent.name for f in folders))}
    for module in sorted(named):
        subprocess.run([sys.executable, "-m", module, "--help"], cwd=ROOT, check=True, capture_output=True)
