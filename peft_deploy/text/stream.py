"""Text that comes out token by token, never with half a character in it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class TextStream:
    """Turns tokens into text as they come.

    What the pieces add up to is what decoding all tokens at once gives. (A decoder with byte
    fallback takes back a character that it has given when an invalid byte follows; a stream
    cannot.) A piece is held back while its last character may still be missing bytes; every piece
    is decoded together with the one before it, because SentencePiece-like decoders drop the space
    at the beginning of whatever they are given.

    Args:
        decode: ids to text.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._start = 0  # first token of the piece before the one in the making
        self._done = 0  # first token whose text has not been given out

    def push(self, token: int) -> str:
        """The text that this token completes; often empty for a part of a character."""
        self._ids.append(token)
        return self._emit(final=False)

    def finish(self) -> str:
        """What was held back, with replacement characters for bytes that never got complete."""
        return self._emit(final=True)

    def _emit(self, *, final: bool) -> str:
        before = self._decode(self._ids[self._start : self._done])
        text = self._decode(self._ids[self._start :])
        if len(text) <= len(before) or (text.endswith(_INCOMPLETE) and not final):
            return ""
        self._start, self._done = self._done, len(self._ids)
        return text[len(before) :]
