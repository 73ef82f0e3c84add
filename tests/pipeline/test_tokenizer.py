"""Token ids: equal to transformers', whatever the text, its length, and how many threads ask."""

import functools
import json
import random
import shutil
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest
from tokenizers import Tokenizer as RustTokenizer

from modernbert_lite import CheckpointError
from modernbert_lite.pipeline.tokenizer import Tokenizer

REAL = Path(__file__).parents[1] / "data" / "modernbert-tokenizer"
TINY = Path(__file__).parents[2] / "modernbert_lite" / "tiny"
FOLDERS = {"real": REAL, "tiny": TINY}

TEXTS = [
    "",
    " ",
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "  leading, trailing   and double  spaces \t\n ",
    "naïve café, Ångström, e\u0301 against é, ﬁne ligature",
    "Кошка сидит на крыше. 猫が屋根の上に座っている。 고양이",
    "emoji 👩‍👩‍👧‍👦 and 🏳️‍🌈, and \U0010ffff",
    "NUL \0 in the middle \0\0",
    "control \x01\x7f\x1b[0m and \ufeffbyte order mark \u200b\u202e",
    "[CLS] the template's own [SEP] names [MASK] in [PAD] text [UNK]",
    "spaces before   [MASK] and after",
    "x" * 300,
    "1234567890" * 30,
    "def f(x):\n    return x  # comment\n\n\n\n",
    "|||IP_ADDRESS||| |||EMAIL_ADDRESS|||",
    "word " * 40,
]


@pytest.fixture(scope="module", params=FOLDERS, ids=list(FOLDERS))
def folder(request):
    return FOLDERS[request.param]


@pytest.fixture(scope="module")
def reference(folder):
    """transformers' tokenizer of the same files."""
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoTokenizer.from_pretrained(folder)


def copied(folder: Path, to: Path, **changes: object) -> Path:
    """The tokenizer's files in `to`, some keys of its tokenizer.json changed."""
    to.mkdir(exist_ok=True)
    for path in folder.glob("*token*.json"):
        shutil.copy(path, to)
    stored = json.loads((to / "tokenizer.json").read_text(encoding="utf-8"))
    (to / "tokenizer.json").write_text(json.dumps({**stored, **changes}), encoding="utf-8")
    return to


# ---- equal to transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_length", [8, 17, 512])
def test_single_texts_equal_transformers(folder, reference, max_length):
    got, cut = Tokenizer(folder, max_length).encode(TEXTS)
    expected = [reference(text, truncation=True, max_length=max_length)["input_ids"] for text in TEXTS]
    assert got == expected
    assert cut == sum(len(reference(text)["input_ids"]) > max_length for text in TEXTS)


@pytest.mark.parametrize("max_length", [5, 8, 9, 24, 25, 512])
def test_pairs_are_cut_longest_first_like_transformers(folder, reference, max_length):
    tokenizer = Tokenizer(folder, max_length)
    words = [0, 1, 2, 3, 5, 9, 10, 11, 12, 20, 21, 40]
    pairs = [("cat " * a, "dog " * b) for a in words for b in words]
    got, cut = tokenizer.encode(pairs)
    # All at once: of one pair alone, transformers drops an empty second text.
    assert got == reference(pairs, truncation="longest_first", max_length=max_length)["input_ids"]
    assert got == [whole_pair(folder, a, b, max_length) for a, b in pairs]  # the oracle of longer ones, below
    assert cut == sum(len(ids) > max_length for ids in reference(pairs)["input_ids"])


def test_pairs_of_all_kinds_of_text_equal_transformers(folder, reference):
    pairs = [(a, b) for a in TEXTS for b in TEXTS[::3]]
    got, _ = Tokenizer(folder, 20).encode(pairs)
    assert got == reference(pairs, truncation="longest_first", max_length=20)["input_ids"]


def test_a_batch_gives_what_each_text_gives_alone(folder):
    tokenizer = Tokenizer(folder, 16)
    assert tokenizer.encode(TEXTS)[0] == [tokenizer.encode([text])[0][0] for text in TEXTS]
    assert tokenizer.encode([]) == ([], 0)


def test_texts_and_pairs_may_share_a_batch(folder):
    tokenizer = Tokenizer(folder, 16)
    mixed, _ = tokenizer.encode(["one", ("one", "two"), "two"])
    assert mixed == [tokenizer.encode([x])[0][0] for x in ("one", ("one", "two"), "two")]


def test_a_text_of_exactly_the_limit_is_not_cut(folder, reference):
    text = "a fairly short sentence of some words"
    exact = len(reference(text)["input_ids"])
    assert Tokenizer(folder, exact).encode([text]) == ([reference(text)["input_ids"]], 0)
    shorter, cut = Tokenizer(folder, exact - 1).encode([text])
    assert len(shorter[0]) == exact - 1
    assert cut == 1


# ---- what the files say --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["LongestFirst", "OnlyFirst", "OnlySecond"])
def test_stored_truncation_and_padding_are_overridden(folder, tmp_path, strategy):
    changed = copied(
        folder,
        tmp_path / "stored",
        truncation={"direction": "Right", "max_length": 5, "strategy": strategy, "stride": 1},
        padding={
            "strategy": {"Fixed": 32},
            "direction": "Left",
            "pad_to_multiple_of": 8,
            "pad_id": 0,
            "pad_type_id": 0,
            "pad_token": "[PAD]",
        },
    )
    batch = [*TEXTS, ("short", "a longer second text of a pair " * 5)]
    for max_length in (16, 512):
        assert Tokenizer(changed, max_length).encode(batch) == Tokenizer(folder, max_length).encode(batch)


def test_special_tokens_come_from_the_template(tmp_path):
    def special(name):
        return {"SpecialToken": {"id": name, "type_id": 0}}

    def sequence(name):
        return {"Sequence": {"id": name, "type_id": 0}}

    template = {
        "type": "TemplateProcessing",
        "single": [special("[SEP]"), special("[SEP]"), sequence("A")],
        "pair": [sequence("B"), special("[MASK]"), sequence("A"), special("[CLS]")],
        "special_tokens": {
            name: {"id": name, "ids": [i], "tokens": [name]}
            for name, i in {"[CLS]": 50281, "[SEP]": 50282, "[MASK]": 50284}.items()
        },
    }
    tokenizer = Tokenizer(copied(REAL, tmp_path / "t", post_processor=template), 8)
    a, b = (plain(REAL).encode(text, add_special_tokens=False).ids for text in ("one two", "three four five"))
    assert tokenizer.encode(["one two"])[0] == [[50282, 50282, *a]]
    assert tokenizer.encode([("one two", "three four five")])[0] == [[*b, 50284, *a, 50281]]
    long_single, cut = tokenizer.encode(["one " * 30])
    assert (len(long_single[0]), cut) == (8, 1)
    assert long_single[0][:2] == [50282, 50282]


def test_no_template_means_no_special_tokens(tmp_path):
    tokenizer = Tokenizer(copied(REAL, tmp_path / "t", post_processor=None), 8)
    ids = plain(REAL).encode("hello there", add_special_tokens=False).ids
    assert tokenizer.encode(["hello there", ""]) == ([ids, []], 0)


def test_truncation_side_is_read(tmp_path):
    from transformers import AutoTokenizer

    changed = copied(REAL, tmp_path / "left")
    settings = json.loads((changed / "tokenizer_config.json").read_text())
    (changed / "tokenizer_config.json").write_text(json.dumps({**settings, "truncation_side": "left"}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = AutoTokenizer.from_pretrained(changed)
    texts = [" ".join(map(str, range(n))) for n in (3, 40, 3000)]
    got, cut = Tokenizer(changed, 16).encode(texts)
    assert got == [reference(text, truncation=True, max_length=16)["input_ids"] for text in texts]
    assert cut == 2


@pytest.mark.parametrize(("folder", "mask"), [(REAL, 50284), (TINY, 4)])
def test_the_mask_token_is_found(folder, mask):
    tokenizer = Tokenizer(folder, 16)
    assert (tokenizer.mask_token, tokenizer.mask_token_id) == ("[MASK]", mask)
    assert mask in tokenizer.encode(["a [MASK] b"])[0][0]


@pytest.mark.parametrize("max_length", [0, 1, 3, -4])
def test_a_limit_without_room_for_text_is_refused(max_length):
    with pytest.raises(ValueError, match=f"max_seq_length is {max_length}; it must be over 3"):
        Tokenizer(REAL, max_length)


def test_a_missing_tokenizer_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json in .*: copy it, .* from the base model"):
        Tokenizer(tmp_path, 16)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not json",
        b"[]",
        b"{}",
        b'{"model": null}',
        b"\xff\xfe\x00",
        b'{"version": "1.0", "model": {"type": "BPE", "vocab": {"a": 0}, "merges": ["a b"]}}',
        b'{"version": "1.0", "model": {"type": "Nonsense", "vocab": {}}}',
        b'{"version": "1.0", "added_tokens": [{"id": 9}], "model": {"type": "BPE", "vocab": {}, "merges": []}}',
    ],
)
def test_a_malformed_tokenizer_is_a_checkpoint_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=r"tokenizer\.json can't be read"):
        Tokenizer(tmp_path, 16)


# ---- threads -------------------------------------------------------------------------------------------------------


def test_eight_threads_share_one_tokenizer(folder):
    """transformers' own switches truncation on and off in place, and fails with 'Already borrowed'."""
    tokenizer = Tokenizer(folder, 12)
    batches = [
        [f"thread {n} {text}" for text in TEXTS] + [(text, f"pair {n} " * 9) for text in TEXTS] for n in range(8)
    ]
    expected = [tokenizer.encode(batch) for batch in batches]
    barrier, problems = threading.Barrier(8), []

    def work(n: int) -> None:
        barrier.wait()
        try:
            for _ in range(20):
                if tokenizer.encode(batches[n]) != expected[n]:
                    problems.append(f"thread {n} got other ids")
                tokenizer.prompt_length("query: ")
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []


# ---- very long texts -----------------------------------------------------------------------------------------------


@functools.cache
def plain(folder: Path) -> RustTokenizer:
    """The file's tokenizer without truncation."""
    tokenizer = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    return tokenizer


def whole(folder: Path, text: str, max_length: int) -> list[int]:
    """The ids of the whole text, cut by hand."""
    first, *ids, last = plain(folder).encode(text).ids
    return [first, *ids[: max_length - 2], last]


def whole_pair(folder: Path, a: str, b: str, max_length: int) -> list[int]:
    """[CLS] a [SEP] b [SEP], the whole of both tokenized, cut longest first: token by token from the longer side (the
    second of two equal ones gets the odd token). By hand: transformers' takes tens of gigabytes for this."""
    left, right = (plain(folder).encode(text, add_special_tokens=False).ids for text in (a, b))
    cls, sep = plain(folder).token_to_id("[CLS]"), plain(folder).token_to_id("[SEP]")
    room = max_length - 3
    if len(left) + len(right) > room:
        small, large = room // 2, room - room // 2
        n, m = len(left), len(right)
        if n <= m:
            keep_left, keep_right = (n, room - n) if n <= small else (small, large)
        else:
            keep_left, keep_right = (room - m, m) if m <= small else (large, small)
        left, right = left[:keep_left], right[:keep_right]
    return [cls, *left, sep, *right, sep]


LONG = {
    "words": "".join(f"word{i % 997} and, then. " for i in range(60_000)),
    "lines": "".join(f"line {i % 31}\r\n\r\n" for i in range(100_000)),
    "tabs": "one\ttwo\t" * 130_000,
    "no space": "".join(map(str, range(180_000))),
    "one letter": "a" * 1_000_000,
    "no space, not English": "Ж猫é" * 100_000,
    "spaces": "begin" + " " * 1_000_000 + "end",
    "a space at the end only": "ab" * 500_000 + " end",
    "combining marks": "e\u0301 a\u0308 " * 200_000,
    "NULs": "\0 " * 500_000,
}


@pytest.mark.parametrize("max_length", [512])
@pytest.mark.parametrize("name", LONG)
def test_a_very_long_text_gives_the_ids_of_the_whole(folder, name, max_length):
    assert len(LONG[name]) >= 300_000
    got, cut = Tokenizer(folder, max_length).encode([LONG[name]])
    assert got == [whole(folder, LONG[name], max_length)]
    assert cut == 1


@pytest.mark.parametrize("max_length", [8, 9, 16])
def test_what_comes_after_the_clip_changes_nothing(folder, max_length):
    """Runs of spaces and dashes, which have tokens of up to 64 characters; [MASK], which takes the spaces before it."""
    tokenizer = Tokenizer(folder, max_length)
    draw = random.Random(max_length)
    pieces = [" " * n for n in (1, 2, 3, 7, 31, 64, 100, 1000)] + ["-" * n for n in (1, 16, 64, 500)]
    pieces += ["\n", "\t\t", "\r\n", "\n\n \n", "\u3000", "\u0301", " [MASK]", "[SEP]", "hello ", "naïve ", "1234567 "]
    for _ in range(30):
        text = "".join(draw.choices(pieces, k=draw.choice([20, 100])))
        assert tokenizer.encode([text])[0][0] == whole(folder, text, max_length), text[: 130 * max_length]


def test_a_run_of_spaces_that_a_mask_takes_is_not_clipped_inside():
    """The real [MASK] takes every space before it: none may be left as a token because the mask was clipped off."""
    text = "-" * 64 + " " * 2011 + "[MASK] is followed by words" + " and words" * 400
    assert Tokenizer(REAL, 8).encode([text])[0][0] == whole(REAL, text, 8)


def test_ten_megabytes_are_quick(folder):
    tokenizer = Tokenizer(folder, 512)
    text = "a good deal of text, " * 500_000
    start = time.perf_counter()
    ids, cut = tokenizer.encode([text, "short", text])
    assert time.perf_counter() - start < 2.0  # 7 s if all of it were tokenized
    assert [len(i) for i in ids[::2]] == [512, 512]
    assert cut == 2


def test_a_megabyte_without_any_space_is_quick(folder):
    tokenizer = Tokenizer(folder, 512)
    start = time.perf_counter()
    assert len(tokenizer.encode(["abcdefghij" * 100_000])[0][0]) == 512
    assert time.perf_counter() - start < 5.0


@pytest.mark.parametrize("max_length", [16, 17, 32])
@pytest.mark.parametrize(
    ("first", "second"), [(1, 5000), (5000, 1), (5000, 4000), (4000, 5000), (5000, 5000), (1600, 9000), (9000, 1600)]
)
def test_very_long_pairs_are_cut_as_if_whole(folder, max_length, first, second):
    """The longer side is cut to one token more than the other, where the room is odd: which one it is may not be
    decided by clipped texts."""
    pairs = [("cat " * first, "ant eater " * second), ("antidisestablishment " * first, "dog " * second)]
    got, cut = Tokenizer(folder, max_length).encode(pairs)
    assert got == [whole_pair(folder, a, b, max_length) for a, b in pairs]
    assert cut == 2


@pytest.mark.skipif(sys.platform == "win32", reason="resource limits are POSIX")
def test_a_pair_of_long_texts_fits_in_memory(folder):
    """tokenizers keeps what it cuts off, for pairs every cut piece of one side with every one of the other: two texts
    of 100,000 characters were tens of gigabytes, and an abort."""
    program = f"""
import resource
from pathlib import Path
from modernbert_lite.pipeline.tokenizer import Tokenizer
tokenizer = Tokenizer(Path({str(folder)!r}), 512)
resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))
text = "数字," * 33_000
ids, cut = tokenizer.encode([(text, text)])
assert (len(ids[0]), cut) == (512, 1), (len(ids[0]), cut)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-500:]


# ---- text that is none ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["broken \ud83d here", "\udfff", "ok \udc80"])
def test_lone_surrogates_are_named(folder, bad):
    tokenizer = Tokenizer(folder, 16)
    where = next(i for i, c in enumerate(bad) if "\ud800" <= c <= "\udfff")
    message = rf"text 1 is not valid Unicode: .* at character {where} is half of a surrogate pair"
    with pytest.raises(ValueError, match=message):
        tokenizer.encode(["fine", bad, "fine"])
    with pytest.raises(ValueError, match="text 4098 is not valid Unicode"):
        tokenizer.encode(["fine", ("fine", bad)], first=4097)
    assert tokenizer.encode(["fine"])[1] == 0  # and still works


def test_a_lone_surrogate_far_into_a_long_text_does_no_harm(folder):
    """It is either named or cut off, never a crash."""
    text = "word " * 100_000 + "\ud800"
    try:
        ids = Tokenizer(folder, 16).encode([text])[0][0]
    except ValueError as error:
        ids, named = None, str(error)
    assert ids == whole(folder, text[:-1], 16) if ids else "text 0 is not valid Unicode" in named


def test_nul_bytes_are_text(folder, reference):
    ids, _ = Tokenizer(folder, 16).encode(["a\0b", "ab", "\0"])
    assert ids[0] != ids[1]
    assert ids == [reference(text)["input_ids"] for text in ("a\0b", "ab", "\0")]


# ---- small services ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["query: ", "search_document:", "x"])
def test_prompt_length_counts_the_beginning(folder, reference, prompt):
    assert Tokenizer(folder, 64).prompt_length(prompt) == len(reference(prompt)["input_ids"]) - 1


def test_decode_keeps_the_leading_space():
    tokenizer = Tokenizer(REAL, 16)
    ids = tokenizer.encode(["hello world"])[0][0]
    assert [tokenizer.decode(i) for i in ids] == ["[CLS]", "hello", " world", "[SEP]"]
