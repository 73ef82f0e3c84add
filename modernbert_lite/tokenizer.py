"""tokenizer.json through `tokenizers`: single texts and pairs, special tokens from the file's own template."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer

from .config import CheckpointError, read_json

Text = str | tuple[str, str]

# A text of more characters than this many a token is first tried by its beginning only.
_CLIP_CHARACTERS = 64


class Tokenizer:
    """Texts and pairs to ids. Nothing is changed after construction, so any number of threads may share one."""

    def __init__(self, folder: Path, max_length: int):
        """max_length: tokens a text or pair may have, special tokens included; longer ones are cut, the longer side of
        a pair first. Raises CheckpointError for a missing or malformed tokenizer.json."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"no tokenizer.json in {folder}; save it with transformers' fast tokenizer")
        settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
        try:
            self._rust = RustTokenizer.from_file(str(path))
            special = self._rust.num_special_tokens_to_add(is_pair=True)
            if max_length <= special:
                raise ValueError(f"max_seq_length is {max_length}; the template alone takes {special} tokens")
            # Whatever truncation and padding the file holds is overridden.
            self._rust.no_padding()
            direction = settings.get("truncation_side") or "right"
            self._rust.enable_truncation(max_length, strategy="longest_first", direction=direction)
        except BaseException as error:  # noqa: BLE001  a Rust panic is no Exception
            raise _readable(error, f"{path} can't be read") from None
        self.max_length = max_length
        self._keeps_beginning = direction == "right"
        self.mask_token, self.mask_token_id = self._find_mask(folder, settings)

    def encode(self, texts: Sequence[Text], first: int = 0) -> tuple[list[list[int]], int]:
        """Ids of each text or pair, and how many were cut to max_length. `first` is the number of the first text, for
        error messages. Raises ValueError for text that isn't valid Unicode (lone surrogates), naming it."""
        try:
            clipped = [self._clip(text) for text in texts]
            encodings = self._rust.encode_batch_fast(clipped)
        except BaseException as error:  # noqa: BLE001  a Rust panic is no Exception
            for i, text in enumerate(texts, first):
                _check_unicode(text, i)
            raise _readable(error, "these texts can't be tokenized") from None
        cut = sum(len(e.ids) >= self.max_length and bool(e.overflowing) for e in encodings)
        return [e.ids for e in encodings], cut

    def prompt_length(self, prompt: str) -> int:
        """Tokens that a prompt takes at the start of a text, the template's first ones included."""
        encoding = self._rust.encode(prompt)
        return len(encoding.ids) - (encoding.special_tokens_mask[-1] if encoding.ids else 0)

    def decode(self, token_id: int) -> str:
        """One token as text, with its leading space if it has one."""
        return str(self._rust.decode([token_id], skip_special_tokens=False))

    def _clip(self, text: Text) -> Text:
        """The beginning of a very long text, if it alone is too long already: what is cut off anyway need not be
        tokenized (10 MB take ten seconds). Clipped at white space, before which no later text changes a token."""
        if isinstance(text, tuple):
            return self._clip_one(text[0]), self._clip_one(text[1])
        return self._clip_one(text)

    def _clip_one(self, text: str) -> str:
        size = self.max_length * _CLIP_CHARACTERS
        while self._keeps_beginning and len(text) > 2 * size:
            end = max(text.rfind(" ", 0, size), text.rfind("\n", 0, size))
            if end > size // 2 and self._rust.encode(text[:end], add_special_tokens=False).overflowing:
                return text[:end]
            size *= 4
        return text

    def _find_mask(self, folder: Path, settings: dict[str, object]) -> tuple[str | None, int | None]:
        special = folder / "special_tokens_map.json"
        for source in (settings, read_json(special) if special.is_file() else {}):
            token = source.get("mask_token")
            token = token.get("content") if isinstance(token, dict) else token
            if isinstance(token, str) and self._rust.token_to_id(token) is not None:
                return token, self._rust.token_to_id(token)
        for token in ("[MASK]", "<mask>"):
            if self._rust.token_to_id(token) is not None:
                return token, self._rust.token_to_id(token)
        return None, None


def _check_unicode(text: Text, i: int) -> None:
    for part in text if isinstance(text, tuple) else (text,):
        try:
            part.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text {i} is not valid Unicode: {part[error.start]!r} at character {error.start} is half of a "
                "surrogate pair; repair it, for example with text.encode('utf-8', 'replace').decode()"
            ) from None


def _readable(error: BaseException, what: str) -> BaseException:
    """A Rust panic comes as a BaseException of its own, which would pass every `except Exception`."""
    if type(error).__name__ == "PanicException" or (isinstance(error, Exception) and not isinstance(error, ValueError)):
        return CheckpointError(f"{what}: {str(error).strip() or type(error).__name__}")
    return error
