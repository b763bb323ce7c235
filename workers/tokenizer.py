"""Text to tokens, and tokens to text as they come, with stop strings found wherever the tokens split them.

Shared by the embedded ``LLM`` and the gateway; needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from ..runtime.errors import InvalidArgumentError, ModelFormatError
from ..runtime.request import FinishReason
from ..runtime.sampling_params import SamplingParams

_REPLACEMENT = "\ufffd"  # what an unfinished or invalid UTF-8 sequence decodes to
_MAX_PENDING_TOKENS = 24  # an undecided stretch this long is invalid for good: a character has at most 4 bytes
_KEPT_TOKENS = 16
_KEPT_CHARS = 3


class Tokenizer:
    """A checkpoint's ``tokenizer.json``."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self._invisible = {
            token_id for token_id, token in backend.get_added_tokens_decoder().items() if token.special
        }

    @classmethod
    def load(cls, model_path: Path) -> Tokenizer:
        """Read the tokenizer of the checkpoint in a folder.

        Raises:
            ModelFormatError: ``tokenizer.json`` is missing or not a tokenizer.
        """
        path = model_path / "tokenizer.json"
        try:
            data = path.read_bytes()
        except OSError as error:
            raise ModelFormatError(f"cannot read {path}: {error.strerror}", path=path) from error
        try:
            return cls(tokenizers.Tokenizer.from_buffer(data))
        except Exception as error:  # the library raises bare Exception
            raise ModelFormatError(f"{path} is not a tokenizer: {error}", path=path) from error

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text, with whatever the tokenizer's post-processor adds (usually a BOS token).

        Raises:
            InvalidArgumentError: the text is not valid Unicode (it has unpaired surrogates).
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidArgumentError(f"the prompt is not valid Unicode: {error}", field="prompt") from error
        ids: list[int] = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of token ids; ids that the tokenizer does not know are left out."""
        text: str = self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        return text

    def shows(self, token_id: int) -> bool:
        """Whether the token can add to the text: it is known, and not special."""
        return token_id not in self._invisible and self._backend.id_to_token(token_id) is not None


class IncrementalDetokenizer:
    """Text of a growing token sequence, piece by piece; the pieces together are the text of the whole.

    Keeps the last few tokens as context, because a token's text depends on its neighbours (a leading space, a
    character spread over several tokens), and holds back text that the next token may still change. The work per
    token does not grow with the sequence. (Where a byte-fallback tokenizer meets bytes that are not UTF-8, the
    whole run would decode to replacement characters; what was valid has been given out by then, and stays.)
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._num_settled = 0  # tokens of the window whose text is given out in full
        self._num_given = 0  # characters of the window's text that are given out

    def add(self, token_id: int) -> str:
        """The text that this token settles; often, but not always, the token's own."""
        if not self._tokenizer.shows(token_id):
            return ""
        self._window.append(token_id)
        text = self._tokenizer.decode(self._window)
        settled = len(text.rstrip(_REPLACEMENT))
        if settled == len(text):
            piece = text[self._num_given :]
            self._keep(len(self._window) - self._num_settled, 0)
            self._num_settled = len(self._window)
            return piece
        if len(self._window) - self._num_settled > _MAX_PENDING_TOKENS:
            piece = text[self._num_given : -_KEPT_CHARS]
            self._keep(_KEPT_TOKENS, _KEPT_CHARS)
            self._num_settled = 0
            return piece
        piece = text[self._num_given : settled]
        self._num_given = max(self._num_given, settled)
        return piece

    def _keep(self, num_tokens: int, num_chars_left: int) -> None:
        self._window = self._window[-num_tokens:]
        self._num_given = max(0, len(self._tokenizer.decode(self._window)) - num_chars_left)

    def flush(self) -> str:
        """The text held back, when no more tokens come."""
        piece = self._tokenizer.decode(self._window)[self._num_given :]
        self._window, self._num_settled, self._num_given = [], 0, 0
        return piece


class StopStringMatcher:
    """Finds the first stop string in a text that comes in pieces, however it is cut (Knuth, Morris, Pratt).

    The string whose end comes first wins; of two that end together, the longer.
    """

    def __init__(self, stop: Sequence[str]) -> None:
        self._patterns = [(text, _failure_links(text)) for text in sorted(set(stop), key=len, reverse=True)]
        self._matched = [0] * len(self._patterns)  # length of each pattern's longest prefix that ends the text
        self._held = ""

    def add(self, text: str) -> tuple[str, str | None]:
        """Take the next piece.

        Returns:
            the text that can no longer be part of a stop string, and the stop string that was found, if one was: the
            text then ends right before it, and the matcher must not be used again.
        """
        if not self._patterns:
            return text, None
        self._held += text
        for end, char in enumerate(self._held[len(self._held) - len(text) :], len(self._held) - len(text) + 1):
            for i, (pattern, links) in enumerate(self._patterns):
                length = self._matched[i]
                while length and pattern[length] != char:
                    length = links[length - 1]
                length += pattern[length] == char
                if length == len(pattern):
                    return self._held[: end - length], pattern
                self._matched[i] = length
        cut = len(self._held) - max(self._matched)
        free, self._held = self._held[:cut], self._held[cut:]
        return free, None

    def flush(self) -> str:
        """The text held back, when no more comes."""
        held, self._held = self._held, ""
        return held


@dataclass(frozen=True, slots=True)
class TextPiece:
    """What newly sampled tokens add to a sequence's text.

    Attributes:
        num_tokens: how many of the given tokens belong to the sequence; fewer than given after a stop string.
        finish_reason: as given, or STOP when a stop string appeared: the engine must then be told to abort.
        stop_reason: the stop string or stop token id that ended the sequence; None for anything else.
    """

    text: str
    num_tokens: int
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None


class OutputText:
    """The text of one sequence: detokenises what the engine sends and ends it at a stop string.

    As in vLLM, text of the first ``min_tokens`` tokens is not searched, the text leaves out the stop string or stop
    token that ended it unless ``include_stop_str_in_output``, and the token ids always include it.
    """

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams) -> None:
        self._params = params
        self._detokenizer = IncrementalDetokenizer(tokenizer)
        self._matcher = StopStringMatcher(params.stop)
        self._num_tokens = 0

    def add(self, token_ids: Sequence[int], finish_reason: FinishReason | None) -> TextPiece:
        """Take the tokens of one engine output; not to be called again once a piece has a finish reason."""
        pieces: list[str] = []
        stop_token = finish_reason is FinishReason.STOP
        for i, token_id in enumerate(token_ids, 1):
            if stop_token and i == len(token_ids) and not self._params.include_stop_str_in_output:
                break
            if self._take(self._detokenizer.add(token_id), pieces):
                return self._stopped(pieces, i)
            self._num_tokens += 1
        if finish_reason is None:
            return TextPiece("".join(pieces), len(token_ids))
        if self._take(self._detokenizer.flush(), pieces):
            return self._stopped(pieces, len(token_ids))
        pieces.append(self._matcher.flush())
        last = token_ids[-1] if token_ids else None
        stop_reason = last if stop_token and last in self._params.stop_token_ids else None
        return TextPiece("".join(pieces), len(token_ids), finish_reason, stop_reason)

    def _take(self, text: str, pieces: list[str]) -> bool:
        """Pass text through the matcher; whether a stop string ended it (it is then the last piece)."""
        if self._num_tokens < self._params.min_tokens:
            pieces.append(text)
            return False
        free, found = self._matcher.add(text)
        pieces.append(free)
        if found is not None:
            pieces.append(found)
        return found is not None

    def _stopped(self, pieces: list[str], num_tokens: int) -> TextPiece:
        found = pieces.pop()
        text = "".join(pieces) + (found if self._params.include_stop_str_in_output else "")
        return TextPiece(text, num_tokens, FinishReason.STOP, found)


def _failure_links(pattern: str) -> list[int]:
    """For every prefix, the length of its longest proper suffix that is also a prefix."""
    links = [0] * len(pattern)
    length = 0
    for i in range(1, len(pattern)):
        while length and pattern[i] != pattern[length]:
            length = links[length - 1]
        length += pattern[i] == pattern[length]
        links[i] = length
    return links
