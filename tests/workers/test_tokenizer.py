"""Incremental text equals the whole text; stop strings are found however they are cut."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, processors

import fuseline.workers.models
from fuseline.runtime.errors import InvalidArgumentError, ModelFormatError
from fuseline.runtime.request import FinishReason
from fuseline.runtime.sampling_params import SamplingParams
from fuseline.workers.tokenizer import IncrementalDetokenizer, OutputText, StopStringMatcher, TextPiece, Tokenizer

DEMO = Path(next(iter(fuseline.workers.models.__path__))) / "demo"
BYTE_LEVEL = Tokenizer.load(DEMO)


def sentencepiece_like() -> Tokenizer:
    """Llama 2's way: spaces as U+2581, unknown characters as one token per byte, BOS in front."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁abcdeé", "▁a", "▁b", "cd", "▁▁"]
    backend = tokenizers.Tokenizer(
        models.BPE(
            {piece: i for i, piece in enumerate(pieces)},
            [("▁", "a"), ("▁", "b"), ("c", "d"), ("▁", "▁")],
            byte_fallback=True,
            unk_token="<unk>",
        )
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return Tokenizer(backend)


SENTENCEPIECE = sentencepiece_like()


def incremental(tokenizer: Tokenizer, token_ids: list[int]) -> list[str]:
    detokenizer = IncrementalDetokenizer(tokenizer)
    return [detokenizer.add(token_id) for token_id in token_ids] + [detokenizer.flush()]


BYTES = [BYTE_LEVEL.encode(char)[0] for char in "é"]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.integers(0, 4200) | st.integers(0, 300), max_size=80))
def test_pieces_make_the_whole_for_any_byte_level_tokens(token_ids: list[int]) -> None:
    assert "".join(incremental(BYTE_LEVEL, token_ids)) == BYTE_LEVEL.decode(token_ids)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from(" abcdeé€😀漢\n\ufffd"), max_size=40))
@example("😀" * 30)
@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, SENTENCEPIECE], ids=["byte_level", "sentencepiece"])
def test_pieces_make_the_text(tokenizer: Tokenizer, text: str) -> None:
    token_ids = tokenizer.encode(text)
    assert "".join(incremental(tokenizer, token_ids)) == tokenizer.decode(token_ids)
    assert tokenizer.decode(token_ids) == text


def test_a_character_comes_whole_and_at_once() -> None:
    for tokenizer in (BYTE_LEVEL, SENTENCEPIECE):
        pieces = incremental(tokenizer, tokenizer.encode("a😀b"))
        assert [piece for piece in pieces if piece] == ["a", "😀", "b"]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(
        st.sampled_from([b"\x80", b"\xe2", b"\xe2\x82", b"\xff", b"a", "€".encode(), "😀".encode()]), max_size=60
    )
)
@example([b"\x80"] * 60)
@example([b"\xe2\x82"] * 40 + ["€".encode()] * 3)
@example([b"\xff"] * 26 + ["😀".encode(), b"a"])
def test_invalid_bytes_end_up_as_in_a_whole_decode(chunks: list[bytes]) -> None:
    data = b"".join(chunks)
    token_of = dict(zip(range(256), byte_tokens(), strict=True))
    token_ids = [token_of[byte] for byte in data]
    assert "".join(incremental(BYTE_LEVEL, token_ids)) == data.decode(errors="replace")


def byte_tokens() -> list[int]:
    """Token ids of the 256 single bytes in the byte-level alphabet of GPT-2."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    chars = [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
    return [token for char in chars if (token := BYTE_LEVEL._backend.token_to_id(char)) is not None]


class CountingTokenizer(Tokenizer):
    num_decoded = 0

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        self.num_decoded += len(token_ids)
        return super().decode(token_ids, skip_special_tokens=skip_special_tokens)


def test_work_per_token_does_not_grow() -> None:
    invalid = byte_tokens()[0x80]
    text = BYTE_LEVEL.encode("def f(x): return x\n" * 200)
    for token_ids, most in ((text, 4), ([invalid] * 2000, 40), (BYTE_LEVEL.encode("漢😀" * 300), 12)):
        counting = CountingTokenizer(tokenizers.Tokenizer.from_file(str(DEMO / "tokenizer.json")))
        incremental(counting, token_ids)
        assert counting.num_decoded <= most * len(token_ids)


def test_special_and_unknown_tokens_show_nothing() -> None:
    assert incremental(BYTE_LEVEL, [0, 10**6, *BYTE_LEVEL.encode("x"), 0]) == ["", "", "x", "", ""]


def test_encoding_adds_what_the_post_processor_adds() -> None:
    assert SENTENCEPIECE.encode("a")[0] == 1
    assert SENTENCEPIECE.encode("a", add_special_tokens=False)[0] != 1
    with pytest.raises(InvalidArgumentError, match="Unicode"):
        BYTE_LEVEL.encode("a\ud800")


def test_missing_or_corrupt_files_are_typed_errors(tmp_path: Path) -> None:
    with pytest.raises(ModelFormatError, match="cannot read"):
        Tokenizer.load(tmp_path)
    for content in (b"", b"{}", b"\x00\xff", (DEMO / "tokenizer.json").read_bytes()[:5000]):
        (tmp_path / "tokenizer.json").write_bytes(content)
        with pytest.raises(ModelFormatError, match="not a tokenizer"):
            Tokenizer.load(tmp_path)


def cut_here(text: str, stops: list[str]) -> tuple[str, str | None]:
    """Where the text ends and which string ended it, by looking at every prefix."""
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end - len(longest)], longest
    return text, None


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.text(alphabet="ab\n", max_size=5), max_size=12),
    st.lists(st.text(alphabet="ab\n", min_size=1, max_size=5), max_size=3),
)
def test_stop_strings_are_found_however_the_text_is_cut(pieces: list[str], stops: list[str]) -> None:
    matcher, given_out, found = StopStringMatcher(stops), "", None
    expected = cut_here("".join(pieces), stops)
    for piece in pieces:
        text, found = matcher.add(piece)
        given_out += text
        assert expected[0].startswith(given_out)
        if found:
            break
    else:
        given_out += matcher.flush()
    assert (given_out, found) == expected


def test_only_what_may_begin_a_stop_string_is_held_back() -> None:
    matcher = StopStringMatcher(["STOP", "\n\n"])
    assert matcher.add("go ST") == ("go ", None)
    assert matcher.add("A\n") == ("STA", None)
    assert matcher.add("x") == ("\nx", None)


def run(params: SamplingParams, text: str, finish_reason: FinishReason | None = None) -> list[TextPiece]:
    output = OutputText(BYTE_LEVEL, params)
    token_ids = BYTE_LEVEL.encode(text)
    pieces = [output.add([token_id], None) for token_id in token_ids[:-1]]
    return [*pieces, output.add(token_ids[-1:], finish_reason)]


def test_a_stop_string_ends_the_sequence() -> None:
    for include, expected in ((False, "one "), (True, "one two")):
        params = SamplingParams(stop=("two",), include_stop_str_in_output=include)
        output = OutputText(BYTE_LEVEL, params)
        piece = output.add(BYTE_LEVEL.encode("one two three"), FinishReason.LENGTH)
        assert (piece.text, piece.finish_reason, piece.stop_reason) == (expected, FinishReason.STOP, "two")
        assert BYTE_LEVEL.decode(BYTE_LEVEL.encode("one two three")[: piece.num_tokens]).startswith("one two")


def test_held_text_comes_out_at_the_end() -> None:
    pieces = run(SamplingParams(stop=("zebra!",)), "a zebra", FinishReason.LENGTH)
    assert "".join(piece.text for piece in pieces) == "a zebra"
    assert pieces[-1].finish_reason is FinishReason.LENGTH
    assert pieces[-1].stop_reason is None


def test_a_stop_token_is_named_and_left_out_of_the_text() -> None:
    token_ids = BYTE_LEVEL.encode("hello world\n")
    for include in (False, True):
        params = SamplingParams(stop_token_ids=(token_ids[-1],), include_stop_str_in_output=include)
        pieces = run(params, "hello world\n", FinishReason.STOP)
        assert "".join(piece.text for piece in pieces) == "hello world" + "\n" * include
        assert pieces[-1].stop_reason == token_ids[-1]
    pieces = run(SamplingParams(), "hello world<|endoftext|>", FinishReason.STOP)
    assert "".join(piece.text for piece in pieces) == "hello world"
    assert pieces[-1].stop_reason is None


def test_the_first_min_tokens_are_not_searched() -> None:
    params = SamplingParams(stop=("x",), min_tokens=3, max_tokens=9)
    pieces = run(params, "x\nx\nx", FinishReason.LENGTH)
    assert "".join(piece.text for piece in pieces) == "x\nx\n"
    assert pieces[-1].stop_reason == "x"
