"""tokenizer.json through `tokenizers`: single texts and pairs, special tokens from the file's own template."""

from __future__ import annotations

from collections.abc import Iterator
from collections.abc import Sequence as SequenceOf
from contextlib import contextmanager
from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer
from tokenizers.normalizers import Lowercase, Sequence

from .reading import MAX_TOKENIZER_JSON_BYTES, CheckpointError, OptionError, read_json, shown

Text = str | tuple[str, str]

# Special tokens that carry no sparse weight: keys of tokenizer_config.json, and names where it lacks one. The template
# names those of a text's ends.
_UNWEIGHTED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("bos_token", "cls_token", "eos_token", "sep_token"), ()),
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
}

# A text of more characters than this many a token is first tried by its beginning only.
_CLIP_CHARACTERS = 64
# Tokens that the beginning must have beyond max_length. What follows a word's end may change its last few tokens, where
# a token reaches over white space: Qwen's "!\n", ColBERT's "[Q] ".
_CLIP_SPARE = 32


class Tokenizer:
    """Texts and pairs to ids. Nothing is changed after construction, so any number of threads may share one."""

    def __init__(self, folder: Path, max_length: int, lower_case: bool = False):
        """max_length: tokens a text or pair may have, special tokens included; longer ones are cut, the longer side of
        a pair first. lower_case: before the file's own normalizer (sentence-transformers' do_lower_case).

        Raises CheckpointError for a missing or malformed tokenizer.json, ValueError for a max_length too small."""
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(
                f'no tokenizer.json in {folder}; transformers makes one of older files: python -c "from transformers '
                "import AutoTokenizer as T; T.from_pretrained('FOLDER').save_pretrained('FOLDER')\""
            )
        beside = folder / "tokenizer_config.json"
        settings = read_json(beside, MAX_TOKENIZER_JSON_BYTES) if beside.is_file() else {}
        side = settings.get("truncation_side") or "right"
        if side not in ("right", "left"):
            raise CheckpointError(f"{beside}: truncation_side is {shown(side)}; it must be 'right' or 'left'")
        self._keeps_beginning = side == "right"
        with _no_panic(f"{path} can't be read"):
            self._rust = RustTokenizer.from_file(str(path))
            if lower_case:  # by the normalizer, not on the text: special tokens spelled out in it stay what they are
                own = self._rust.normalizer
                self._rust.normalizer = Sequence([Lowercase(), own] if own else [Lowercase()])
            # Truncation is done here, not by the library, which keeps all that it cuts off: for a pair every cut piece
            # of one side with every one of the other, gigabytes for two texts of 100 kB.
            self._rust.no_padding()
            self._rust.no_truncation()
            self._single, self._pair = self._template(is_pair=False), self._template(is_pair=True)
        asked = settings.get("model_input_names")  # transformers gives a network no types if this leaves them out
        self.has_types = any(kind for _, kind in self._pair) and (
            not isinstance(asked, list) or "token_type_ids" in asked
        )
        special = len(self._pair) - 2
        if max_length <= special:
            raise OptionError(
                f"max_seq_length is {max_length}; it must be over {special}, the special tokens of a pair"
            )
        self.max_length = max_length
        beside = folder / "special_tokens_map.json"
        sources = (settings, read_json(beside) if beside.is_file() else {})
        self.mask_token, self.mask_token_id = self._find("mask_token", ("[MASK]", "<mask>"), sources)
        unweighted = {self._find(key, names, sources)[1] for key, names in _UNWEIGHTED.items()}
        unweighted.update(item for item, _ in self._single + self._pair)
        self.unweighted = frozenset(i for i in unweighted if i is not None and i >= 0)

    def encode(self, texts: SequenceOf[Text], first: int = 0) -> tuple[list[list[int]], int]:
        """encode_typed() without the types."""
        ids, _, cut = self.encode_typed(texts, first)
        return ids, cut

    def encode_typed(self, texts: SequenceOf[Text], first: int = 0) -> tuple[list[list[int]], list[list[int]], int]:
        """Ids of each text or pair, their token types, and how many were cut to max_length. `first` is the number of
        the first text, for error messages. Raises ValueError for text that isn't valid Unicode (lone surrogates),
        naming it.

        [CLS] A [SEP] B [SEP] with BERT's types -> 0, 0..., 0, 1..., 1
        """
        try:
            # Pairs are not clipped: how the two share the room depends on which is longer.
            sides = [s for text in texts for s in ([self._clip(text)] if isinstance(text, str) else text)]
            with _no_panic("these texts can't be tokenized"):
                encodings = iter(self._rust.encode_batch_fast(sides, add_special_tokens=False))
        except CheckpointError:
            for i, text in enumerate(texts, first):
                for side in _sides(text):
                    check_unicode(side, f"text {i}")
            raise
        ids, types, cut = [], [], 0
        for text in texts:
            parts = [next(encodings).ids for _ in _sides(text)]
            template = self._single if len(parts) == 1 else self._pair
            room = self.max_length - len(template) + len(parts)
            if sum(map(len, parts)) > room:
                parts, cut = self._cut(parts, room), cut + 1
            whole: list[int] = []
            whole_types: list[int] = []
            for item, kind in template:
                whole += (item,) if item >= 0 else parts[~item]
                whole_types += [kind] * (len(whole) - len(whole_types))
            ids.append(whole)
            types.append(whole_types)
        return ids, types, cut

    def prompt_length(self, prompt: str) -> int:
        """Tokens that a prompt takes at the start of a text, the template's first ones included."""
        check_unicode(prompt, "the prompt")
        with _no_panic("the prompt can't be tokenized"):
            before = [item for item, _ in self._single].index(~0)
            return before + len(self._rust.encode(prompt, add_special_tokens=False).ids)

    def id_of(self, token: str) -> int | None:
        """Of a token as the vocabulary spells it; None for one that isn't in it."""
        try:
            found: int | None = self._rust.token_to_id(token)
        except UnicodeEncodeError:  # half of a surrogate pair
            return None
        return found

    def keep_whole(self, prefix: str) -> None:
        """Makes a text that starts with this token, or with its first word, start with its id, whatever the normalizer
        does to other text; nothing where the vocabulary has neither. To be called before any text is encoded."""
        for token in (prefix, *prefix.split(None, 1)[:1]):
            if self.id_of(token) is not None:
                with _no_panic(f"token {token!r:.60} can't be added"):
                    if self._rust.encode(token, add_special_tokens=False).tokens != [token]:
                        self._rust.add_special_tokens([AddedToken(token, normalized=False)])
                return

    def leave_out_template(self) -> None:
        """Makes texts come without the template's special tokens. To be called before any text is encoded."""
        self._single, self._pair = [(~0, 0)], [(~0, 0), (~1, 1)]

    @property
    def vocabulary_size(self) -> int:
        """Tokens that the file knows, added ones included: as many as transformers' get_vocab() has."""
        return int(self._rust.get_vocab_size())

    def decode(self, token_id: int) -> str:
        """One token as text, as transformers' decode([token_id]): a leading space stays in byte-level vocabularies, and
        is dropped in SentencePiece's Unigram ones."""
        with _no_panic(f"token {token_id} can't be decoded"):
            return str(self._rust.decode([token_id], skip_special_tokens=False))

    def _template(self, is_pair: bool) -> list[tuple[int, int]]:
        """Special tokens and places of texts, read off the file's own template: ~0 is the first text, ~1 the second.
        Each with its token type.

        [CLS] A [SEP] B [SEP] -> [(50281, 0), (-1, 0), (50282, 0), (-2, 1), (50282, 1)]
        """
        encoding = self._rust.encode("a", "a" if is_pair else None)
        template: list[tuple[int, int]] = []
        for token, text, kind in zip(encoding.ids, encoding.sequence_ids, encoding.type_ids, strict=True):
            item = (token if text is None else ~text, kind)
            if text is None or template[-1:] != [item]:
                template.append(item)
        if sorted(item for item, _ in template if item < 0) != [~1, ~0][1 - is_pair :]:
            raise ValueError(f"its template gives {encoding.tokens} for {'two texts' if is_pair else 'a text'} 'a'")
        return template

    def _cut(self, parts: list[list[int]], room: int) -> list[list[int]]:
        """Down to `room` tokens together, the longer one of a pair first, as tokenizers' longest_first does: of two
        that are both longer than half, the longer (or the second) gets the odd token."""
        sizes = [len(part) for part in parts]
        short = min(sizes)
        if len(parts) == 1:
            sizes = [room]
        elif short <= room // 2:
            sizes = [n if n == short else room - short for n in sizes]
        else:
            more = room - room // 2
            sizes = [more, room // 2] if sizes[0] > sizes[1] else [room // 2, more]
        if self._keeps_beginning:
            return [part[:n] for part, n in zip(parts, sizes, strict=True)]
        return [part[len(part) - n :] for part, n in zip(parts, sizes, strict=True)]

    def _clip(self, text: str) -> str:
        """The beginning of a very long text, if it alone has max_length tokens: what is cut off anyway need not be
        tokenized (10 MB take ten seconds). It ends at the end of a word: what comes later changes a few of its last
        tokens at most. (Inside a word it may change all: Unigram's pieces of "aaaa..." depend on how many there are.)
        """
        size = self.max_length * _CLIP_CHARACTERS
        while self._keeps_beginning and len(text) > 2 * size:
            beginning = text[: max(text.rfind(" ", 0, size), text.rfind("\n", 0, size), 0)].rstrip()
            with _no_panic("this text can't be tokenized"):
                if (
                    len(beginning) > size // 2
                    and len(self._rust.encode(beginning, add_special_tokens=False)) >= self.max_length + _CLIP_SPARE
                ):
                    return beginning
            size *= 4
        return text

    def _find(
        self, key: str, names: tuple[str, ...], sources: SequenceOf[dict[str, object]]
    ) -> tuple[str | None, int | None]:
        """The token that the files beside tokenizer.json have under this key, else the first of `names` there is."""
        found = [source.get(key) for source in sources]
        for token in (*(f.get("content") if isinstance(f, dict) else f for f in found), *names):
            if isinstance(token, str) and self.id_of(token) is not None:
                return token, self.id_of(token)
        return None, None


def _sides(text: Text) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text


def check_unicode(text: str, name: str) -> None:
    """Raises ValueError for a text with half of a surrogate pair, which has no UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} is not valid Unicode: {text[error.start]!r} at character {error.start} is half of a "
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
