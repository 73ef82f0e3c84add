"""tokenizer.json through `tokenizers`: single texts and pairs, special tokens from the file's own template."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Sequence as SequenceOf
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from tokenizers import AddedToken
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer, Lowercase, Sequence
from tokenizers.pre_tokenizers import BertPreTokenizer

from ..checkpoint.folder import Folder
from ..reading import CheckpointError, OptionError, as_whole, check_unicode, shown
from .tokenizer_files import no_panic, read_tokenizer

Text = str | tuple[str, str]
Span = tuple[int, int]
Item = TypeVar("Item")

# Special tokens that carry no sparse weight: keys of tokenizer_config.json, and names where it lacks one. The template
# names those of a text's ends.
_UNWEIGHTED: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("bos_token", "cls_token", "eos_token", "sep_token"), ()),
    "pad_token": ("[PAD]", "<pad>"),
    "unk_token": ("[UNK]", "<unk>"),
}

# If a text has more characters per token than this, its beginning is tried first.
_CLIP_CHARACTERS = 64
# A text without spaces is cut inside a word only from this length on: it costs up to as much as _HUGE characters do.
_HUGE = 1 << 20
# Characters among which some token ends, unless it is a long run of few characters, and cuts that are tried at a time.
_REACH, _CUTS_AT_A_TIME = 128, 16
# WordPiece makes one unknown token of a word of more than 100 characters, whatever they are.
_LONG_WORD = 101
# Tokens that the beginning must have beyond max_length. What follows a word's end may change its last few tokens, where
# a token reaches over white space: Qwen's "!\n", ColBERT's "[Q] ".
_CLIP_SPARE = 32
# What clean_up_tokenization_spaces does to a decoded text, in this order.
_CLEANED = (
    *((" " + end, end) for end in (".", "?", "!", ",")),
    (" ' ", "'"),
    *((" " + end, end) for end in ("n't", "'m", "'s", "'ve", "'re")),
)
_MOST_SPECIAL = 1 << 10  # tokens that a template may put around a text
_LONGEST = 1 << 31  # of max_length: lengths in a batch are int32


class FirstCut(tuple[str, str]):
    """A pair of which only the first text is cut: a premise, before its hypothesis."""


class Tokenizer:
    """Texts and pairs to ids, as transformers 5.23's AutoTokenizer makes them from the folder's files. Encoding changes
    nothing, and decoding only fills a cache, so threads may share a tokenizer.

    Time and memory are the tokenizers library's: up to 0.3 KB per character and 2 s per megabyte, for the part of the
    text that is needed. The whole text is needed in two cases: its last few characters change the first tokens (a
    Unigram vocabulary's pieces of one repeated letter), or it has fewer tokens than max_length. A hostile
    tokenizer.json can make any text large (by a normalizer that replaces a letter with a megabyte): open what you don't
    trust in a process with limited memory.
    """

    def __init__(
        self,
        folder: Path,
        max_length: int,
        lower_case: bool = False,
        *,
        settings: Mapping[str, Any] | None = None,
        files: Folder | None = None,
    ):
        """max_length: the most tokens of a text or pair, special tokens included. Longer ones are cut, of a pair the
        longer side first. lower_case: lower-cases before the file's own normalizer (sentence-transformers'
        do_lower_case). settings: keys that win over those of tokenizer_config.json (`tokenizer_args` of
        sentence_bert_config.json). files: the checkpoint, with the files that are read already.

        Raises CheckpointError for a missing or malformed tokenizer.json, OptionError for a max_length without room.
        """
        read = read_tokenizer(folder, settings, files)
        self._rust = read.rust
        self.names, self.padding_side = read.names, read.padding_side
        self._special_ids = frozenset(map(self._rust.token_to_id, (*read.names.values(), *read.extra)))
        self._keeps_beginning, self._cleans_up = read.truncation_side == "right", read.cleans_up
        with no_panic(f"{folder / 'tokenizer.json'} can't be read"):
            own = self._rust.normalizer
            steps: list[Any] = list(iter(own)) if isinstance(own, Sequence) else [own] if own else []
            if lower_case and not any(isinstance(step, Lowercase) for step in steps):
                # By the normalizer, not on the text: special tokens spelled out in the text stay what they are.
                self._rust.normalizer = Sequence([Lowercase(), *steps])
            self._single, self._pair = self._template(is_pair=False), self._template(is_pair=True)
        # transformers gives a network no types where these aren't among model_input_names.
        self.has_types = read.gives_types and any(kind for _, kind in self._single + self._pair)
        self._long_words = self._words_without_pieces()
        self.max_length = max_length
        self._decoded: dict[int, str] = {}
        self.mask_token, self.mask_token_id = self._find("mask_token", ("[MASK]", "<mask>"))
        self.unk_token_id = self._find("unk_token", _UNWEIGHTED["unk_token"])[1]
        unweighted = {self._find(key, names)[1] for key, names in _UNWEIGHTED.items()}
        unweighted.update(item for item, _ in self._single + self._pair)
        self.unweighted = frozenset(i for i in unweighted if i is not None and i >= 0)

    @property
    def max_length(self) -> int:
        """The most tokens of a text or pair, special tokens included. Raises OptionError if set to what is no whole
        number, or leaves no room for a text or a pair."""
        return self._max_length

    @max_length.setter
    def max_length(self, value: int) -> None:
        self._max_length = self._checked_length(value)

    def _checked_length(self, value: Any) -> int:
        length = as_whole(value)
        # The single template may have more special tokens than the pair's.
        special = max(len(self._single) - 1, len(self._pair) - 2)
        if length is None or not special < length <= _LONGEST:
            raise OptionError(
                f"max_seq_length is {shown(value)}; it must be over {special}, the special tokens of a text or a "
                f"pair, and a whole number no larger than {_LONGEST}"
            )
        return length

    def encode(
        self, texts: SequenceOf[Text], first: int = 0, max_length: int | None = None
    ) -> tuple[list[list[int]], int]:
        """encode_typed() without the token types."""
        ids, _, cut = self.encode_typed(texts, first, max_length)
        return ids, cut

    def encode_typed(
        self, texts: SequenceOf[Text], first: int = 0, max_length: int | None = None
    ) -> tuple[list[list[int]], list[list[int]], int]:
        """The ids of each text or pair, their token types, and how many were cut to max_length (None: the tokenizer's
        own). first: the number of the first text, for messages. Raises ValueError, naming the text, for a text that is
        no valid Unicode (lone surrogates).

        [CLS] A [SEP] B [SEP] with BERT's types -> 0, 0..., 0, 1..., 1
        """
        most = self._max_length if max_length is None else self._checked_length(max_length)
        try:
            sides: list[str] = []
            for text in texts:
                sides += [self._clip(text, most)] if isinstance(text, str) else self._clip_pair(text, most)
            with no_panic("these texts can't be tokenized"):
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
            room = most - len(template) + len(parts)
            if sum(map(len, parts)) > room:
                parts, cut = self._cut(parts, room, isinstance(text, FirstCut)), cut + 1
            whole: list[int] = []
            whole_types: list[int] = []
            for item, kind in template:
                whole += (item,) if item >= 0 else parts[~item]
                whole_types += [kind] * (len(whole) - len(whole_types))
            ids.append(whole)
            types.append(whole_types)
        return ids, types, cut

    def offsets(self, texts: SequenceOf[str], first: int = 0) -> list[list[tuple[int, Span | None]]]:
        """The tokens of each text, the same as encode()'s: (id, (start, end)), in characters of that text. A special
        token that the template adds has None for the characters. first, and errors: as in encode_typed()."""
        for i, text in enumerate(texts, first):
            check_unicode(text, f"text {i}")
        parts = [self._clip(text, self.max_length) for text in texts]
        # A word that was shortened has other places: then the whole text is tokenized.
        fits = str.startswith if self._keeps_beginning else str.endswith
        parts = [part if fits(text, part) else text for text, part in zip(texts, parts, strict=True)]
        with no_panic("these texts can't be tokenized"):
            encodings = self._rust.encode_batch(parts, add_special_tokens=False)
        room = self.max_length - len(self._single) + 1
        results = []
        for text, part, encoding in zip(texts, parts, encodings, strict=True):
            shift = 0 if self._keeps_beginning else len(text) - len(part)
            places = [(start + shift, end + shift) for start, end in encoding.offsets]
            own: list[tuple[int, Span | None]] = list(zip(encoding.ids, places, strict=True))
            (own,) = self._cut([own], room) if len(own) > room else [own]
            results.append([token for item, _ in self._single for token in ([(item, None)] if item >= 0 else own)])
        return results

    def prompt_length(self, prompt: str) -> int:
        """How many tokens are left out where a prompt isn't pooled: the tokens of the prompt as a text of its own, but
        not the last one if it is a special token, of the template or of the prompt itself. This is
        sentence-transformers' rule, by which models were trained."""
        check_unicode(prompt, "the prompt")
        ids = self.encode([prompt])[0][0]
        return len(ids) - (ids[-1] in self._special_ids)

    def id_of(self, token: str) -> int | None:
        """The id of a token in the vocabulary's spelling. None if the vocabulary doesn't have it."""
        try:
            found: int | None = self._rust.token_to_id(token)
        except UnicodeEncodeError:  # half of a surrogate pair
            return None
        return found

    def bare(self, text: str) -> list[int]:
        """The ids of a text of any length, without special tokens around it."""
        check_unicode(text, f"text {text[:30]!r}")
        with no_panic("this text can't be tokenized"):
            ids: list[int] = self._rust.encode(text, add_special_tokens=False).ids
            return ids

    def token(self, token_id: int) -> str:
        """The token of an id, in the vocabulary's spelling. "" if the id has no token."""
        return self._rust.id_to_token(token_id) or ""

    @property
    def knows_subwords(self) -> bool:
        """Whether the vocabulary marks tokens that continue a word, as WordPiece does by "##"."""
        return bool(getattr(self._rust.model, "continuing_subword_prefix", None))

    def joined(self, tokens: list[str]) -> str:
        """Tokens, in the vocabulary's spelling, as a text: transformers' convert_tokens_to_string."""
        with no_panic("these tokens can't be decoded"):
            return str(self._rust.decoder.decode(tokens)) if self._rust.decoder else " ".join(tokens)

    def keep_whole(self, prefix: str) -> None:
        """If a text starts with this token, or with its first word, its ids start with the token's id, whatever the
        normalizer does to other texts. Does nothing if the vocabulary has neither. To be called before any encoding."""
        for token in (prefix, *prefix.split(None, 1)[:1]):
            if self.id_of(token) is not None:
                with no_panic(f"token {token!r:.60} can't be added"):
                    if self._rust.encode(token, add_special_tokens=False).tokens != [token]:
                        self._rust.add_special_tokens([AddedToken(token, normalized=False)])
                        self._long_words = self._words_without_pieces()
                return

    def leave_out_template(self) -> None:
        """Leaves out the template's special tokens. Must be called before any text is encoded."""
        self._single, self._pair = [(~0, 0)], [(~0, 0), (~1, 1)]

    @property
    def vocabulary_size(self) -> int:
        """How many tokens the file knows, added ones included: as many as transformers' get_vocab() has."""
        return int(self._rust.get_vocab_size())

    def decode(self, token_id: int) -> str:
        """One token as text, as from transformers' decode([token_id]). Byte-level vocabularies keep a leading space;
        SentencePiece's Unigram vocabularies drop it."""
        known = self._decoded.get(token_id)  # a sparse vector names the same few thousand tokens again and again
        if known is not None:
            return known
        with no_panic(f"token {token_id} can't be decoded"):
            text = str(self._rust.decode([token_id], skip_special_tokens=False))
        for spaced, close in _CLEANED if self._cleans_up else ():
            text = text.replace(spaced, close)
        self._decoded[token_id] = text
        return text

    def _template(self, is_pair: bool) -> list[tuple[int, int]]:
        """The file's template: special tokens, and places of texts (~0 the first, ~1 the second), each with its token
        type.

        [CLS] A [SEP] B [SEP] -> [(50281, 0), (-1, 0), (50282, 0), (-2, 1), (50282, 1)]
        """
        encoding = self._rust.encode("a", "a" if is_pair else None)
        if len(encoding) > _MOST_SPECIAL:
            raise CheckpointError(
                f"its template gives {len(encoding)} tokens for 'a'; at most {_MOST_SPECIAL} are read"
            )
        template: list[tuple[int, int]] = []
        for token, text, kind in zip(encoding.ids, encoding.sequence_ids, encoding.type_ids, strict=True):
            item = (token if text is None else ~text, kind)
            if text is None or template[-1:] != [item]:
                template.append(item)
        if sorted(item for item, _ in template if item < 0) != [~1, ~0][1 - is_pair :]:
            raise CheckpointError(
                f"its template gives {shown(encoding.tokens)} for {'two texts' if is_pair else 'a text'} 'a'"
            )
        return template

    def _cut(self, parts: list[list[Item]], room: int, first: bool = False) -> list[list[Item]]:
        """Down to `room` tokens together, the longer one of a pair first, as tokenizers' longest_first does: of two
        that are both longer than half, the longer (or the second) gets the odd token. first: only the first is cut,
        as only_first does."""
        sizes = [len(part) for part in parts]
        short = min(sizes)
        if len(parts) == 1:
            sizes = [room]
        elif first:
            sizes[0] = room - sizes[1]
        elif short <= room // 2:
            sizes = [n if n == short else room - short for n in sizes]
        else:
            more = room - room // 2
            sizes = [more, room // 2] if sizes[0] > sizes[1] else [room // 2, more]
        if self._keeps_beginning:
            return [part[:n] for part, n in zip(parts, sizes, strict=True)]
        return [part[len(part) - n :] for part, n in zip(parts, sizes, strict=True)]

    def _clip(self, text: str, most: int) -> str:
        """The part of a very long text that its kept tokens come from: the beginning (for truncation_side "left" the
        end), if it alone has `most` tokens. What is cut off anyway need not be tokenized (10 MB take ten seconds).

        It is cut at a space or a line's end: what comes beyond that changes a few of its last tokens at most. (Inside
        a word it may change all: Unigram's pieces of "aaaa..." depend on how many there are.)"""
        size = most * _CLIP_CHARACTERS
        if len(text) > 2 * size and self._long_words is not None:
            text = self._long_words.sub(lambda word: word[0][:_LONG_WORD], text)
        while len(text) > 2 * size:
            with no_panic("this text can't be tokenized"):
                part = self._part_of_words(text, size)
                if (
                    len(part) > size // 2
                    and len(self._rust.encode(part, add_special_tokens=False)) >= most + _CLIP_SPARE
                ):
                    return part
                if len(part) <= size // 2 and len(text) >= _HUGE and (found := self._part_of_a_word(text, size, most)):
                    return found
            size *= 4
        return text

    def _clip_pair(self, pair: tuple[str, str], most: int) -> tuple[str, str]:
        """Both texts, clipped; or whole, if it may matter which one is longer: the longer one gets the odd token."""
        clipped = self._clip(pair[0], most), self._clip(pair[1], most)
        if (most - len(self._pair)) % 2 and clipped != pair:
            whole = [part for part, side in zip(clipped, pair, strict=True) if part == side]
            with no_panic("this text can't be tokenized"):
                if not whole or len(self._rust.encode(whole[0], add_special_tokens=False)) >= most:
                    return pair
        return clipped

    def _words_without_pieces(self) -> re.Pattern[str] | None:
        """A pattern of the runs of letters that WordPiece makes one unknown token, however long they are."""
        model, splitter = self._rust.model, self._rust.pre_tokenizer
        if not isinstance(model, WordPiece) or not isinstance(splitter, BertPreTokenizer):
            return None
        own = self._rust.normalizer
        added = self._rust.get_added_tokens_decoder().values()
        if not (own is None or isinstance(own, BertNormalizer)) or model.max_input_chars_per_word >= _LONG_WORD:
            return None
        if any(str(token).isascii() and str(token).isalnum() for token in added):
            return None  # it would be found inside such a run
        return re.compile(f"[A-Za-z0-9]{{{_LONG_WORD},}}")

    def _part_of_words(self, text: str, size: int) -> str:
        if self._keeps_beginning:
            return text[: max(text.rfind(" ", 0, size), text.rfind("\n", 0, size), 0)].rstrip()
        found = [at for at in (text.find(" ", -size), text.find("\n", -size)) if at >= 0]
        return text[min(found) :].lstrip() if found else ""

    def _part_of_a_word(self, text: str, size: int, most: int) -> str | None:
        """Where there is no space to cut at: a part of the text whose kept tokens are those of the whole, or None.

        The whole's tokens up to the end of one of them are the tokens of the text up to there. Some token ends within
        any stretch as long as the vocabulary's longest token. So if the text up to each character of such a stretch
        starts with the same tokens, the whole does, too. (The same holds from the end.)"""
        left = self._keeps_beginning
        encoding = self._rust.encode(text[:size] if left else text[-size:], add_special_tokens=False)
        kept = most + _CLIP_SPARE
        if len(encoding) < kept:
            return None
        start = encoding.offsets[kept - 1][1] if left else size - encoding.offsets[-kept][0]
        reach = min(_REACH, self._longest)
        window = text[start : start + reach] if left else text[-start - reach : len(text) - start]
        if len(set(window)) <= 8:  # tokens longer than _REACH are runs of few characters: spaces, dashes
            reach = self._longest
        if (start + reach) * reach > len(text):  # as much work as the whole
            return None
        wanted = encoding.ids[:most] if left else encoding.ids[-most:]
        for first in range(start, start + reach, _CUTS_AT_A_TIME):
            cuts = range(first, min(first + _CUTS_AT_A_TIME, start + reach))
            parts = [text[:cut] if left else text[-cut:] for cut in cuts]
            for found in self._rust.encode_batch_fast(parts, add_special_tokens=False):
                if (found.ids[:most] if left else found.ids[-most:]) != wanted:
                    return None
        return parts[-1]

    @cached_property
    def _longest(self) -> int:
        """Characters of the vocabulary's longest token, and of a word that WordPiece takes apart."""
        words = _LONG_WORD if isinstance(self._rust.model, WordPiece) else 0
        return max(words, *map(len, self._rust.get_vocab()))

    def _find(self, key: str, usual: tuple[str, ...]) -> tuple[str | None, int | None]:
        """The token that the files beside tokenizer.json have under this key; else the first of `usual` that exists."""
        for token in (self.names.get(key), *usual):
            if token is not None and self.id_of(token) is not None:
                return token, self.id_of(token)
        return None, None


def _sides(text: Text) -> tuple[str, ...]:
    return (text,) if isinstance(text, str) else text
