"""tokenizer.json through `tokenizers`: single texts and pairs, special tokens from the file's own template."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from pathlib import Path

from tokenizers import Tokenizer as RustTokenizer
from tokenizers.normalizers import Lowercase, Sequence

from .config import MAX_TOKENIZER_JSON_BYTES, CheckpointError, read_json

Text = str | tuple[str, str]

# A text of more characters than this many a token is first tried by its beginning only.
_CLIP_CHARACTERS = 64


class Tokenizer:
    """Texts and pairs to ids. Nothing is changed after construction, so any number of threads may share one."""

    def __init__(self, folder: Path, max_length: int, lower_case: bool = False):
        """max_length: tokens a text or pair may have, special tokens included; longer ones are cut, the longer side of
        a pair first. lower_case: before the file's own normalizer (sentence-transformers' do_lower_case).

        Raises CheckpointError for a missing or malformed tokenizer.json, ValueError for a max_length too small."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"no tokenizer.json in {folder}; save it with transformers' fast tokenizer")
        beside = folder / "tokenizer_config.json"
        settings = read_json(beside, MAX_TOKENIZER_JSON_BYTES) if beside.is_file() else {}
        direction = settings.get("truncation_side") or "right"
        with _no_panic(f"{path} can't be read"):
            self._rust = RustTokenizer.from_file(str(path))
            if lower_case:  # by the normalizer, not on the text: special tokens spelled out in it stay what they are
                own = self._rust.normalizer
                self._rust.normalizer = Sequence([Lowercase(), own] if own else [Lowercase()])
            special = self._rust.num_special_tokens_to_add(is_pair=True)
            if max_length <= special:
                raise ValueError(f"max_seq_length is {max_length}; the template alone takes {special} tokens")
            # Whatever truncation and padding the file holds is overridden.
            self._rust.no_padding()
            self._rust.enable_truncation(max_length, strategy="longest_first", direction=direction)
        self.max_length = max_length
        self._keeps_beginning = direction == "right"
        self.mask_token, self.mask_token_id = self._find_mask(folder, settings)

    def encode(self, texts: SequenceOf[Text], first: int = 0) -> tuple[list[list[int]], int]:
        """Ids of each text or pair, and how many were cut to max_length. `first` is the number of the first text, for
        error messages. Raises ValueError for text that isn't valid Unicode (lone surrogates), naming it."""
        try:
            with _no_panic("these texts can't be tokenized"):
                encodings = self._rust.encode_batch_fast([self._clip(text) for text in texts])
        except CheckpointError:
            for i, text in enumerate(texts, first):
                _check_unicode(text, i)
            raise
        cut = sum(len(e.ids) >= self.max_length and bool(e.overflowing) for e in encodings)
        return [e.ids for e in encodings], cut

    def prompt_length(self, prompt: str) -> int:
        """Tokens that a prompt takes at the start of a text, the template's first ones included."""
        _check_unicode(prompt, 0)
        with _no_panic("the prompt can't be tokenized"):
            encoding = self._rust.encode(prompt)
        return len(encoding.ids) - (encoding.special_tokens_mask[-1] if encoding.ids else 0)

    def decode(self, token_id: int) -> str:
        """One token as text, with its leading space if it has one."""
        with _no_panic(f"token {token_id} can't be decoded"):
            return str(self._rust.decode([token_id], skip_special_tokens=False))

    def _clip(self, text: Text) -> Text:
        """The beginning of a very long text, if it alone is too long already: what is cut off anyway need not be
        tokenized (10 MB take ten seconds). It ends at the end of a word, before which no later text changes a token.
        Pairs are left whole: how they share max_length depends on which is longer."""
        if isinstance(text, tuple) or not self._keeps_beginning:
            return text
        size = self.max_length * _CLIP_CHARACTERS
        while len(text) > 2 * size:
            beginning = text[: max(text.rfind(" ", 0, size), text.rfind("\n", 0, size), 0)].rstrip()
            if len(beginning) > size // 2 and self._rust.encode(beginning, add_special_tokens=False).overflowing:
                return beginning
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


@contextmanager
def _no_panic(what: str) -> Iterator[None]:
    """The tokenizers library's errors as CheckpointError. Among them are Rust panics, which come as a BaseException of
    their own and would pass every `except Exception`."""
    try:
        yield
    except ValueError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what}: {str(error).strip() or type(error).__name__}") from None
