"""Every kind of tokenizer that the family's checkpoints have, small, built here: ids and types equal transformers'."""

import json
import warnings
from pathlib import Path

import pytest
from tokenizer_kinds_cases import (  # noqa: F401
    bert,
    bert_processing,
    folder,
    gemma,
    granite_97m,
    granite_311m,
    japanese,
    kind,
    kinds,
    pieces,
    plain,
    qwen,
    qwen_without_template,
    whole,
    write,
    xlmr,
)
from tokenizers import Tokenizer as RustTokenizer

from modernbert_lite.pipeline.tokenizer import Tokenizer

TEXTS = [
    "",
    " ",
    "   \t \n\n ",
    "a",
    "The quick brown fox jumps over the lazy dog.",
    "  leading, trailing   and double  spaces \t\n ",
    "naïve CAFÉ, Ångström, e\u0301 against é, ﬁne ligature, ｆｕｌｌ　ｗｉｄｔｈ",
    "Кошка сидит. 今日は天気がいいので散歩。 고양이 北京是中国的首都！",
    "שלום עולם \u202eالثعلب البني\u202c and back",
    "emoji 👩‍👩‍👧‍👦 and 🏳️‍🌈, \U0010ffff unknown ☃ ꙮ ꙮꙮ",
    "NUL \0 and \x01\x7f\x1b[0m \ufeff\u200b",
    "[CLS] spelled [SEP] out [MASK] in [PAD] text [UNK]",
    "<s> spelled </s> out   <mask>   in <pad> text <unk> <bos><eos> <cls>x<sep> <0x41> <|endoftext|>",
    "▁metaspace▁spelled ▁ out ##ing Ġ",
    "def f(x):\n    return x  # comment\n\n\n\n!!\n}}\r\n",
    "x" * 300,
    "1234567890" * 20,
    "word " * 40,
    "数字とことば" * 20,
]


# Not the longest: transformers' pairs every piece that it cuts off one side with every one of the other.
PAIRS = [(a, b) for a in TEXTS[:-5] for b in TEXTS[:-5:3]] + [("word " * 40, "x"), ("x", "数字とことば" * 20)]


# ---- the kinds -----------------------------------------------------------------------------------------------------


TYPED = {"bert", "bert_processing", "granite_311m", "qwen_without_template", "japanese"}


def transformers_of(folder: Path, **options):
    from transformers import PreTrainedTokenizerFast

    settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    tokens = {
        key: token["content"] if isinstance(token, dict) else token
        for key, token in settings.items()
        if key.endswith("_token")
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), **tokens, **options)


# ---- equal to transformers -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
def test_ids_and_types_equal_transformers(folder, tmp_path, side):
    reference = transformers_of(folder, truncation_side=side)
    if side == "left":
        folder = with_settings(folder, tmp_path / "left", truncation_side="left")
    for max_length in (8, 21, 512) if side == "right" else (9, 24):
        tokenizer = Tokenizer(folder, max_length)
        # Pairs all at once: of one alone, transformers drops an empty second text.
        for texts in (TEXTS, PAIRS):
            expected = reference(texts, truncation=True, max_length=max_length, return_token_type_ids=True)
            ids, types, cut = tokenizer.encode_typed(texts)
            assert ids == expected["input_ids"]
            assert types == expected["token_type_ids"]
            assert cut == sum(len(whole) > max_length for whole in reference(texts)["input_ids"])
            assert tokenizer.encode(texts) == (ids, cut)


def with_settings(folder: Path, to: Path, **settings: object) -> Path:
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    return write(to, stored, {**json.loads((folder / "tokenizer_config.json").read_text()), **settings})


def test_pairs_are_cut_like_transformers_whatever_their_lengths(folder):
    reference = transformers_of(folder)
    words = [0, 1, 2, 3, 5, 8, 9, 10, 20]
    pairs = [("fox " * a, "dog " * b) for a in words for b in words]
    for max_length in (6, 7, 16, 17):
        expected = reference(pairs, truncation="longest_first", max_length=max_length, return_token_type_ids=True)
        ids, types, _ = Tokenizer(folder, max_length).encode_typed(pairs)
        assert ids == expected["input_ids"]
        assert types == expected["token_type_ids"]


def test_singles_and_pairs_share_a_batch(folder):
    tokenizer = Tokenizer(folder, 12)
    batch = ["one", ("one fox", "two dogs " * 9), "", ("", "")]
    ids, types, cut = tokenizer.encode_typed(batch)
    assert cut == 1
    assert list(map(len, ids)) == list(map(len, types))
    for text, *expected in zip(batch, ids, types, strict=True):
        assert [found[0] for found in tokenizer.encode_typed([text])[:2]] == expected
    assert tokenizer.encode_typed([]) == ([], [], 0)


@pytest.mark.parametrize(("class_name", "name"), [("BertTokenizer", "bert"), ("XLMRobertaTokenizer", "xlmr")])
def test_the_checkpoints_own_class_gives_the_same(kinds, tmp_path, class_name, name):
    """What AutoTokenizer opens a real checkpoint with."""
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = AutoTokenizer.from_pretrained(
            with_settings(kinds[name], tmp_path / "t", tokenizer_class=class_name)
        )
    assert type(reference).__name__.startswith(class_name)
    texts = [text for text in TEXTS if name == "bert" or text.isascii()]  # it lacks the file's normalizer
    assert Tokenizer(kinds[name], 24).encode(texts)[0] == reference(texts, truncation=True, max_length=24)["input_ids"]


# ---- what the files say --------------------------------------------------------------------------------------------


def test_a_known_layout_by_hand(kinds):
    """Not by transformers, which reads the same file."""
    expected = {
        "bert": ([2, -1, 3], [2, -1, 3, -2, 3], [0, 0, 0, 1, 1]),
        "bert_processing": ([2, -1, 3], [2, -1, 3, -2, 3], [0, 0, 0, 1, 1]),
        "xlmr": ([0, -1, 2], [0, -1, 2, 2, -2, 2], [0] * 6),
        "gemma": ([2, -1, 1], [2, -1, 1, -2, 1], [0] * 5),
        "granite_311m": ([2, -1, 1], [2, -1, 1, 2, -2, 1], [0, 0, 0, 1, 1, 1]),
        "granite_97m": ([179934, -1, 179938], [179934, -1, 179938, -2, 179938], [0] * 5),
        "granite_english": ([50281, -1, 50282], [50281, -1, 50282, -2, 50282], [0] * 5),
        "qwen": ([701, -1], [701, -1, 702, -2], [0] * 4),
        "qwen_without_template": ([-1], [-1, -2], [0, 1]),  # as tokenizers has it where there is no template
        "japanese": ([1, -1, 2], [1, -1, 2, -2, 2], [0, 0, 0, 1, 1]),
    }
    assert set(expected) == set(kinds)
    for name, (single, pair, types) in expected.items():
        tokenizer = Tokenizer(kinds[name], 32)
        plain = RustTokenizer.from_file(str(kinds[name] / "tokenizer.json"))
        a, b = (plain.encode(text, add_special_tokens=False).ids for text in ("fox", "dogs"))
        filled = {-1: a, -2: b}
        assert tokenizer.encode(["fox"])[0] == [[i for item in single for i in filled.get(item, [item])]], name
        ids, got, _ = tokenizer.encode_typed([("fox", "dogs")])
        assert ids == [[i for item in pair for i in filled.get(item, [item])]], name
        assert got == [[t for item, t in zip(pair, types, strict=True) for _ in filled.get(item, [item])]], name
        assert not tokenizer.has_types, name  # a plain fast tokenizer gives none unless model_input_names says so
        given = {"model_input_names": ["input_ids", "token_type_ids"]}
        assert Tokenizer(kinds[name], 32, settings=given).has_types == (name in TYPED), name


def test_types_that_transformers_would_not_give_are_not_used(kinds, tmp_path):
    names = ["input_ids", "token_type_ids", "attention_mask"]
    for class_name, given, has_types in (
        ("PreTrainedTokenizerFast", {}, False),
        ("PreTrainedTokenizerFast", {"model_input_names": names}, True),
        ("BertTokenizer", {}, True),
        ("BertTokenizerFast", {"model_input_names": names[::2]}, False),
    ):
        changed = with_settings(kinds["bert"], tmp_path / "t", tokenizer_class=class_name, **given)
        assert Tokenizer(changed, 16).has_types == has_types, (class_name, given)
        (changed / "config.json").write_text('{"model_type": "modernbert"}')  # tokenizer.json whole, whatever the class
        assert Tokenizer(changed, 16).has_types == bool(given and has_types), (class_name, given)
        (changed / "config.json").unlink()


def test_the_mask_token_is_found(folder, kind):
    name = "<mask>" if kind in ("xlmr", "gemma", "granite_311m", "japanese") else "[MASK]"
    tokenizer = Tokenizer(folder, 32)
    assert tokenizer.mask_token == name
    assert tokenizer.mask_token_id == transformers_of(folder).convert_tokens_to_ids(name)
    assert tokenizer.encode([f"the {name} fox"])[0][0].count(tokenizer.mask_token_id) == 1


UNWEIGHTED = {
    "bert": {0, 1, 2, 3},
    "bert_processing": {0, 1, 2, 3},
    "xlmr": {0, 1, 2, 3},
    "gemma": {0, 1, 2, 3},
    "granite_311m": {0, 1, 2, 3},
    "granite_97m": {179934, 179935, 179937, 179938},
    "granite_english": {50280, 50281, 50282, 50283},
    "qwen": {700, 701, 702},
    "qwen_without_template": {700, 701, 702},
    "japanese": {0, 1, 2, 3, 4, 6},
}


def test_special_tokens_carry_no_weight(folder, kind):
    tokenizer = Tokenizer(folder, 32)
    assert tokenizer.unweighted == UNWEIGHTED[kind]
    assert isinstance(tokenizer.unweighted, frozenset)


@pytest.mark.parametrize("name", ["bert", "xlmr"])
def test_special_tokens_are_known_without_the_files_that_name_them(kinds, tmp_path, name):
    (tmp_path / "tokenizer.json").write_bytes((kinds[name] / "tokenizer.json").read_bytes())
    tokenizer = Tokenizer(tmp_path, 32)
    assert tokenizer.unweighted == UNWEIGHTED[name]
    (tmp_path / "special_tokens_map.json").write_text(
        json.dumps({"unk_token": {"content": "▁the"}, "sep_token": "dog"})
    )
    named = Tokenizer(tmp_path, 32)  # "▁the" isn't in bert's vocabulary, nor "dog" in xlmr's: they get ids of their own
    more = {named.id_of(token) for token in ("▁the", "dog")}
    assert None not in more
    unknown = 1 if name == "bert" else 3
    assert named.unweighted - {unknown} == (UNWEIGHTED[name] | more) - {unknown}


def test_stored_truncation_and_padding_are_overridden(folder, tmp_path):
    stored = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    stored["truncation"] = {"direction": "Right", "max_length": 7, "strategy": "OnlyFirst", "stride": 1}
    stored["padding"] = {
        "strategy": {"Fixed": 32},
        "direction": "Left",
        "pad_to_multiple_of": 8,
        "pad_id": 0,
        "pad_type_id": 3,
        "pad_token": "[PAD]",
    }
    changed = write(tmp_path / "t", stored, json.loads((folder / "tokenizer_config.json").read_text()))
    for max_length in (12, 512):
        batch = [*TEXTS, *PAIRS[::7]]
        got, expected = (Tokenizer(f, max_length).encode_typed(batch) for f in (changed, folder))
        assert got == expected


# ---- one token as text ---------------------------------------------------------------------------------------------


def test_decode_gives_what_transformers_gives(folder):
    tokenizer, reference = Tokenizer(folder, 64), transformers_of(folder)
    ids = sorted({i for text in TEXTS for i in tokenizer.encode([text])[0][0]})
    assert len(ids) > 60
    assert [tokenizer.decode(i) for i in ids] == [reference.decode([i]) for i in ids]


@pytest.mark.parametrize(
    ("name", "text", "pieces"),
    [
        ("bert", "The Dog", ["[CLS]", "the", "dog", "[SEP]"]),
        ("xlmr", "the dog", ["<s>", "the", "dog", "</s>"]),
        ("gemma", "the dog", ["<bos>", "the", " dog", "<eos>"]),
        ("granite_97m", "the dog", ["[CLS]", "the", " dog", "[SEP]"]),
        ("qwen", "the dog", ["[CLS]", "the", " dog"]),
        ("japanese", "日本語", None),
    ],
)
def test_decode_gives_readable_pieces(kinds, name, text, pieces):
    tokenizer = Tokenizer(kinds[name], 16)
    got = [tokenizer.decode(i) for i in tokenizer.encode([text])[0][0]]
    if pieces is None:
        assert "".join(got) == f"<s>{text}</s>"
    elif len(got) == len(pieces):
        assert got == pieces
    else:  # a trained vocabulary may cut a word
        assert "".join(got).replace("##", "").replace(" ", "") == "".join(pieces).replace(" ", "")


# ---- very long texts -----------------------------------------------------------------------------------------------
