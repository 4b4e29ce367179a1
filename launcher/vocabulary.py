"""What a tokenizer's tokens are as text and as bytes, one by one and together."""

from __future__ import annotations

import re
from typing import Any

from runtime.detokenizer import BROKEN

FALLBACK = re.compile(r"<0x([0-9A-F]{2})>")  # a byte, in vocabularies that spell unknown characters by them


class Vocabulary:
    """Names tokens for rows of results; every token's are worked out once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[int, tuple[str, bytes]] = {}

    def decode(self, tokens: list[int]) -> str:
        """Text without special tokens."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def decode_special(self, tokens: list[int]) -> str:
        """Text with special tokens in it."""
        return str(self._tokenizer.decode(tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def text(self, token: int) -> str:
        """A token as it reads within a text; the replacement character where it is no whole character."""
        return self._look_up(token)[0]

    def raw(self, token: int) -> bytes:
        """The UTF-8 bytes of a token, those of unfinished characters too."""
        return self._look_up(token)[1]

    def name(self, token: int) -> str:
        """Its text, or its bytes spelled out where they are no whole characters: so that names tell tokens apart."""
        text, raw = self._look_up(token)
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw) if BROKEN in text else text

    def _look_up(self, token: int) -> tuple[str, bytes]:
        if token not in self._known:
            text = self.decode_special([token])
            piece = self._tokenizer.convert_ids_to_tokens(token)  # None for an id that the model has and this has not
            if isinstance(piece, str) and piece.startswith("\u2581") and not text.startswith(" "):
                text = " " + text  # such decoders drop the first space of what they are given
            self._known[token] = text, piece_bytes(piece, text)
        return self._known[token]


def piece_bytes(piece: str | None, text: str) -> bytes:
    """The bytes of a token whose text is `text`, by its spelling in the vocabulary where the text is no whole character."""
    if BROKEN not in text or piece is None:
        return text.encode()
    if fallback := FALLBACK.fullmatch(piece):
        return bytes([int(fallback[1], 16)])
    if all(character in BYTES for character in piece):
        return bytes(BYTES[character] for character in piece)
    return text.encode()


def byte_characters() -> dict[str, int]:
    """The bytes that byte-level vocabularies mean by their characters.

    A printable byte is the character of its own number; the others are, in order, the characters from 256 on.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + at): byte for at, byte in enumerate(others)}


BYTES = byte_characters()
