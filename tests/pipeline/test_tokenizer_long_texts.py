"""Megabytes without a space: the ids of the whole, from a part of it, in little time and memory."""

from __future__ import annotations

import base64
import random
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors

from modernbert_lite.pipeline import tokenizer as module
from modernbert_lite.pipeline.tokenizer import Tokenizer

REAL = Path(__file__).parents[1] / "data" / "modernbert-tokenizer"
TINY = Path(__file__).parents[2] / "modernbert_lite" / "tiny"
RANDOM = random.Random(0)
LONG = {
    "base64": base64.b64encode(RANDOM.randbytes(30_000)).decode(),
    "letters": "".join(RANDOM.choices("abcdefgh", k=40_000)),
    "one letter": "z" * 40_000 + "a",
    "three letters": "zza" * 15_000 + "zz",
    "digits": "".join(map(str, range(9_000))),
    "Japanese": "今日は天気がいいので散歩に行きます。" * 2_000,
    "Chinese": "".join(chr(RANDOM.randrange(0x4E00, 0x9FA5)) for _ in range(30_000)),
    "wide spaces": "今日は\u3000天気がいい。" * 3_000,
    "marks": "e\u0301\u0301a" * 12_000,
    "dashes": "-" * 40_000 + "x",
    "code": "function(a,b){return(a+b)};" * 1_600,
    "emoji": "👩‍👩‍👧‍👦" * 5_000,
    "unknown": "ꙮ☃x" * 12_000,
}


def word_pieces():
    """Also of single letters: a word of 100 has 100 tokens, one of 101 is unknown."""
    letters = sorted({c for text in LONG.values() for c in text if c.isalnum() and c < "\u3000"})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *letters, *(f"##{c}" for c in letters), "今", "日", "fox", "a", "dog"]
    made = RustTokenizer(models.WordPiece({p: i for i, p in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return made


def unigram():
    """Whose cut of "zzzz..." depends on its end: pieces of three are the best, and what is left over is in front."""
    pieces = [("[PAD]", 0.0), ("[UNK]", 0.0), ("[CLS]", 0.0), ("[SEP]", 0.0), ("▁", -2.0), ("z", -9.0), ("zz", -3.9)]
    pieces += [
        ("zzz", -4.0),
        ("fox", -5.0),
        ("dog", -5.0),
        ("天気", -3.0),
        ("今日は", -3.0),
        ("ab", -4.0),
        ("bab", -4.1),
    ]
    pieces += [(c, -8.0) for c in sorted({c for text in LONG.values() for c in text} - {"z", "ꙮ"})]
    made = RustTokenizer(models.Unigram(pieces, 1, False))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    return made


@pytest.fixture(scope="module", params=["granite_english", "tiny", "WordPiece", "Unigram"])
def folder(request, tmp_path_factory):
    made = {"WordPiece": word_pieces, "Unigram": unigram}.get(request.param)
    return written(made(), tmp_path_factory.mktemp("t")) if made else {"tiny": TINY}.get(request.param, REAL)


def written(made: RustTokenizer, to: Path) -> Path:
    made.add_special_tokens(["[PAD]", "[UNK]", "[CLS]", "[SEP]"])
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.save(str(to / "tokenizer.json"))
    return to


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_text_without_spaces_gives_the_ids_of_the_whole(folder, monkeypatch, side):
    monkeypatch.setattr(module, "_HUGE", 0)
    tokenizer = Tokenizer(folder, 9, settings={"truncation_side": side})
    clipped = 0
    for name, text in LONG.items():
        inside = tokenizer._rust.encode(text, add_special_tokens=False).ids
        room = 9 - len(tokenizer._single) + 1
        inside = inside[:room] if side == "right" else inside[max(0, len(inside) - room) :]
        whole = [i for item, _ in tokenizer._single for i in ([item] if item >= 0 else inside)]
        assert tokenizer.encode([text])[0] == [whole], name
        clipped += len(tokenizer._clip(text, 9)) < len(text) / 4
    assert clipped >= 5


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_text_with_spaces_that_keeps_its_end_is_clipped(folder, side):
    tokenizer = Tokenizer(folder, 9, settings={"truncation_side": side})
    text = " ".join(f"word{i % 97} and, then." for i in range(1_300))
    ids = tokenizer._rust.encode(text, add_special_tokens=False).ids
    room = 9 - len(tokenizer._single) + 1
    kept = ids[:room] if side == "right" else ids[-room:]
    whole = [i for item, _ in tokenizer._single for i in ([item] if item >= 0 else kept)]
    assert tokenizer.encode([text]) == ([whole], 1)
    assert len(tokenizer._clip(text, 9)) < len(text) / 4


@pytest.mark.parametrize("max_length", [12, 13])
@pytest.mark.parametrize("first", [1, 5, 700, 3_000])
@pytest.mark.parametrize("second", [1, 700, 5_000])
def test_pairs_are_cut_as_if_both_were_whole(folder, max_length, first, second):
    """The longer side of two long ones gets the odd token, also where one is clipped to fewer tokens than the other."""
    tokenizer = Tokenizer(folder, max_length)
    sides = "fox, " * first, "a dog " * second
    parts = [tokenizer._rust.encode(side, add_special_tokens=False).ids for side in sides]
    room = max_length - len(tokenizer._pair) + 2
    if sum(map(len, parts)) > room:
        parts = tokenizer._cut(parts, room)
    whole = [i for item, _ in tokenizer._pair for i in ([item] if item >= 0 else parts[~item])]
    assert tokenizer.encode([sides])[0] == [whole]


def test_the_document_of_a_pair_is_clipped(folder):
    text = "a good deal of text, " * 2_000
    assert len(Tokenizer(folder, 12)._clip_pair(("a query", text), 12)[1]) < len(text) / 4


def test_a_word_too_long_for_wordpiece_is_clipped_unless_a_token_is_in_it(tmp_path):
    folder = written(word_pieces(), tmp_path)
    text = "fox " + "x" * 100_000 + " dog"
    tokenizer = Tokenizer(folder, 12)
    assert tokenizer.encode([text])[0] == [[2, *tokenizer._rust.encode(text, add_special_tokens=False).ids, 3]]
    assert tokenizer._clip(text, 12) == "fox " + "x" * 101 + " dog"
    named = Tokenizer(folder, 12, settings={"mask_token": "xdogx"})
    for text in ("x" * 50_000 + "dog" + "x" * 50_000, "x" * 50_000 + " " + "x" * 50_000):
        whole = named._rust.encode(text, add_special_tokens=False).ids
        assert named.encode([text])[0] == [[2, *whole[:10], 3]]
    tokenizer.keep_whole("fox")
    assert tokenizer._clip("x" * 9_000, 12) == "x" * 101


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX")
@pytest.mark.parametrize("side", ["right", "left"])
def test_ten_megabytes_without_a_space_are_quick_and_small(side):
    """They were 20 s and 1.6 GB."""
    program = f"""
import base64, random, resource, time
from pathlib import Path
from modernbert_lite.pipeline.tokenizer import Tokenizer
tokenizer = Tokenizer(Path({str(REAL)!r}), 512, settings={{"truncation_side": {side!r}}})
text = base64.b64encode(random.Random(0).randbytes(7_500_000)).decode()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
start = time.process_time()
ids, cut = tokenizer.encode([text])
assert (len(ids[0]), cut) == (512, 1)
assert time.process_time() - start < 5, time.process_time() - start
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr[-500:]
