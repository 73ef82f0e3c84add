"""tokenizer_config.json's settings and the tokenizer's own: ids as AutoTokenizer's, or a refusal by name."""

from __future__ import annotations

import functools
import json
import os
import random
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer as RustTokenizer
from tokenizers import models, normalizers, pre_tokenizers, processors

from modernbert_lite.pipeline.tokenizer import Tokenizer
from modernbert_lite.reading import CheckpointError, OptionError

REAL = Path(__file__).parents[1] / "data" / "modernbert-tokenizer"


# ---- the tokenizer's own settings ----------------------------------------------------------------------------------


def test_max_length_can_be_set_later():
    tokenizer = Tokenizer(REAL, 512)
    text = "one two three four five six seven eight nine"
    whole = tokenizer.encode([text])[0][0]
    tokenizer.max_length = np.int64(6)
    assert tokenizer.max_length == 6
    assert type(tokenizer.max_length) is int
    assert tokenizer.encode([text]) == ([[*whole[:5], whole[-1]]], 1)


@pytest.mark.parametrize("value", [True, 5.0, "5", None, 3, -1, 0, (1 << 31) + 1, float("nan"), np.float32(8)])
def test_a_max_length_that_is_none_is_refused_and_changes_nothing(value):
    tokenizer = Tokenizer(REAL, 16)
    with pytest.raises(OptionError, match=r"max_seq_length is .*; it must be over 3, the special tokens"):
        tokenizer.max_length = value
    assert tokenizer.max_length == 16
    with pytest.raises(OptionError, match=r"max_seq_length is .*; it must be over 3"):
        Tokenizer(REAL, value)


def test_a_length_given_to_encode_is_for_that_call_only():
    tokenizer = Tokenizer(REAL, 512)
    texts = ["one two three four five six seven", ("one two three", "four five six seven")]
    for length in (5, 7):
        assert tokenizer.encode_typed(texts, max_length=length) == Tokenizer(REAL, length).encode_typed(texts)
        assert tokenizer.encode(texts, max_length=length)[1] == 2
    assert tokenizer.encode(texts)[1] == 0
    with pytest.raises(OptionError, match="max_seq_length is 2; it must be over 3"):
        tokenizer.encode(texts, max_length=2)


def test_the_single_template_may_have_more_special_tokens_than_the_pairs(tmp_path):
    shutil.copy(REAL / "tokenizer.json", tmp_path)
    stored = json.loads((tmp_path / "tokenizer.json").read_text())
    ends = [{"SpecialToken": {"id": "[SEP]", "type_id": 0}}] * 3
    stored["post_processor"]["single"] = [*ends, {"Sequence": {"id": "A", "type_id": 0}}, *ends]
    (tmp_path / "tokenizer.json").write_text(json.dumps(stored))
    for length in (4, 6):
        with pytest.raises(OptionError, match=f"max_seq_length is {length}; it must be over 6"):
            Tokenizer(tmp_path, length)
    assert list(map(len, Tokenizer(tmp_path, 7).encode(["one two three", ("one two three", "four five")])[0])) == [7, 7]


def test_settings_given_win_over_the_file(tmp_path):
    for path in REAL.glob("*token*.json"):
        shutil.copy(path, tmp_path)
    text = "one two three four five six seven"
    left = Tokenizer(tmp_path, 6, settings={"truncation_side": "left"}).encode([text])[0]
    assert left != Tokenizer(tmp_path, 6).encode([text])[0]
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "truncation_side": "left"}))
    assert Tokenizer(tmp_path, 6).encode([text])[0] == left
    assert Tokenizer(tmp_path, 6, settings={"truncation_side": "right"}).encode([text])[0] != left


# ---- the files beside tokenizer.json, against AutoTokenizer --------------------------------------------------------

WORDS = ["the", "fox", "dog", "a", "quick", "cafe", "café", "brown", "x", "naïve", "天", "气", "!", ",", "."]
LETTERS = sorted(set("abcdefghijklmnopqrstuvwxyzéï天气!,.[]<>=- The Fox▁"))
TEXTS = [
    "The quick Brown fox <device> jumps,  [MASK] over <mask> the Dog. <s> a </s> [SEP] <unit> b [Q] Fox <new>x <pad 2>",
    "naïve CAFÉ 天气 <device>the   <unit>",
    "",
    "fox <x> ▁the  dog!",
]
PAIRS = [("the Fox <device>", "a [MASK] dog " * 6), ("天气 é", "x <mask> y")]
ENDS = {"cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "unk_token": "[UNK]", "mask_token": "[MASK]"}
NEW = ["<device>", "<unit>", "the", "dog", "[Q] ", "Fox", "▁the", "<mask>", "[MASK]", "[SEP]", "</s>"]


@functools.cache
def kind(name: str) -> str:
    """tokenizer.json of a small tokenizer."""
    names = list(ENDS.values())
    if name == "WordPiece":
        pieces = [*names, *WORDS, *(f"##{c}" for c in LETTERS), *LETTERS]
        made = RustTokenizer(models.WordPiece({p: i for i, p in enumerate(dict.fromkeys(pieces))}, unk_token="[UNK]"))
        made.normalizer = normalizers.BertNormalizer(lowercase=True)
        made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    elif name == "Unigram":
        pieces = [*names, *(f"▁{word}" for word in WORDS), *LETTERS, "he", "ox"]
        made = RustTokenizer(
            models.Unigram([(p, -float(i) / 9) for i, p in enumerate(dict.fromkeys(pieces))], 1, False)
        )
        made.normalizer = normalizers.NFKC()
        made.pre_tokenizer = pre_tokenizers.Metaspace()
    else:
        pieces = [*names, *sorted(pre_tokenizers.ByteLevel.alphabet()), "th", "the", "fo", "fox", "Ġt", "Ġthe"]
        merges = [("t", "h"), ("th", "e"), ("f", "o"), ("fo", "x"), ("Ġ", "t"), ("Ġ", "the")]
        made = RustTokenizer(models.BPE({p: i for i, p in enumerate(dict.fromkeys(pieces))}, merges))
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.add_special_tokens(names)
    ids = [(token, made.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=ids
    )
    return str(made.to_str())


def written(folder: Path, name: str, settings: dict[str, Any], model_type: str | None = None, **files: Any) -> Path:
    """files: stored__truncation for a key of tokenizer.json; special_tokens_map for a file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    stored = json.loads(kind(name))
    stored |= {key[8:]: value for key, value in files.items() if key.startswith("stored__")}
    (folder / "tokenizer.json").write_text(json.dumps(stored))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    for key, value in files.items():
        if not key.startswith("stored__"):
            (folder / f"{key}.json").write_text(json.dumps(value))
    return folder


def auto(folder: Path, **given: Any) -> Any:
    from transformers import AutoTokenizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return AutoTokenizer.from_pretrained(folder, **given)


def assert_equals_transformers(folder: Path, given: dict[str, Any] | None = None) -> bool:
    """False where transformers itself can't open the files."""
    given = given or {}
    try:
        reference = auto(folder, **given)
        expected = [reference(text)["input_ids"] for text in TEXTS]
    except Exception:
        return False
    whole, short = (Tokenizer(folder, length, settings=given) for length in (512, 12))
    assert whole.encode(TEXTS)[0] == expected
    options = {"truncation": "longest_first", "max_length": 12, "return_token_type_ids": True}
    assert short.encode(TEXTS)[0] == [reference(text, **options)["input_ids"] for text in TEXTS]
    first, second = zip(*PAIRS, strict=True)
    pairs = reference(list(first), list(second), **options)
    assert short.encode_typed(PAIRS)[:2] == (pairs["input_ids"], pairs["token_type_ids"])
    named = reference(["a"], ["b"]).get("token_type_ids", [[]])
    assert whole.has_types == any(named[0])
    ids = sorted({i for row in expected for i in row})
    assert [whole.decode(i) for i in ids] == [reference.decode([i]) for i in ids]
    assert (whole.padding_side, whole.names) == (reference.padding_side, reference.special_tokens_map)
    return True


def token(content: str, **flags: bool) -> dict[str, Any]:
    usual = dict.fromkeys(("lstrip", "rstrip", "single_word", "normalized", "special"), False)
    return {"__type": "AddedToken", "content": content, **usual, **flags}


BERT, XLMR = {"tokenizer_class": "BertTokenizer"}, {"tokenizer_class": "XLMRobertaTokenizerFast"}
DEVICE = {"9000": token("<device>", special=True)}
CASES: dict[str, tuple[str, str | None, dict[str, Any], dict[str, Any]]] = {
    "cased BERT": ("WordPiece", "gte", {**BERT, "do_lower_case": False}, {}),
    "BERT with accents": ("WordPiece", "new", {**BERT, "strip_accents": False}, {}),
    "BERT without Chinese": ("WordPiece", None, {**BERT, "tokenize_chinese_chars": False}, {}),
    "BERT of a BPE": ("BPE", "gte", BERT, {}),
    "ModernBERT takes no key of BERT": ("WordPiece", "modernbert", {**BERT, "do_lower_case": False}, {}),
    "XLM-R's own normalizer and spaces": ("Unigram", "gte", XLMR, {}),
    "XLM-R without a space in front": ("Unigram", "gte", {**XLMR, "add_prefix_space": False}, {}),
    "GTE without a class is XLM-R": ("Unigram", "gte", {}, {}),
    "keys of BERT are nothing to a plain one": ("WordPiece", None, {"do_lower_case": None, "strip_accents": "x"}, {}),
    "a plain fast tokenizer": ("WordPiece", "gte", {"tokenizer_class": "PreTrainedTokenizerFast"}, {}),
    "special tokens that are text": ("BPE", "modernbert", {"split_special_tokens": True}, {}),
    "special tokens that are text, in BERT": ("WordPiece", "gte", {**BERT, "split_special_tokens": True}, {}),
    "a token of added_tokens_decoder": ("BPE", "modernbert", {"added_tokens_decoder": DEVICE}, {}),
    "a token that takes its spaces": ("BPE", None, {**ENDS, "mask_token": token("[MASK]", lstrip=True)}, {}),
    "additional tokens": ("Unigram", None, {"additional_special_tokens": ["<device>", token("<unit>")]}, {}),
    "extra tokens": ("WordPiece", "gte", {**BERT, "extra_special_tokens": ["<device>", "Fox"]}, {}),
    "extra tokens by name": ("BPE", "modernbert", {"extra_special_tokens": {"a_token": "<device>", "b": "<x>"}}, {}),
    "a named token of its own": ("BPE", None, {"image_token": "<device>", "boi_token": token("<unit>")}, {}),
    "a new mask": ("Unigram", "modernbert", {"mask_token": "<new>"}, {}),
    "special_tokens_map.json": (
        "BPE",
        None,
        ENDS,
        {"special_tokens_map": {"mask_token": token("<mask>", lstrip=True)}},
    ),
    "added_tokens.json": ("BPE", "modernbert", {}, {"added_tokens": {"<device>": 900, "[Q] ": 700}}),
    "flags nobody knows": ("BPE", None, {"added_tokens_decoder": {"1": {**DEVICE["9000"], "colour": 1}}}, {}),
    "no bos by the file": ("BPE", "modernbert", {"bos_token": "[CLS]", "add_bos_token": False}, {}),
    "spaces that are cleaned up": ("WordPiece", "gte", {**BERT, "clean_up_tokenization_spaces": True}, {}),
    "spaces of a BPE that are not": ("BPE", None, {"clean_up_tokenization_spaces": True}, {}),
    "a padding token of tokenizer.json": (
        "BPE",
        "modernbert",
        {},
        {
            "stored__padding": {
                "strategy": "BatchLongest",
                "direction": "Left",
                "pad_to_multiple_of": 8,
                "pad_id": 0,
                "pad_type_id": 1,
                "pad_token": "<pad 2>",
            }
        },
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_ids_types_and_decoded_tokens_are_transformers(tmp_path, name):
    made, model_type, settings, files = CASES[name]
    assert assert_equals_transformers(written(tmp_path / "t", made, settings, model_type, **files))


@pytest.mark.parametrize("made", ["BPE", "WordPiece", "Unigram"])
@pytest.mark.parametrize(("settings", "keeps"), [({}, "end"), ({"truncation_side": "right"}, "beginning")])
def test_the_truncation_side_of_tokenizer_json_counts_where_no_other_file_has_one(tmp_path, made, settings, keeps):
    truncation = {"direction": "Left", "max_length": 5, "strategy": "OnlyFirst", "stride": 2}
    folder = written(tmp_path / "t", made, settings, "modernbert", stored__truncation=truncation)
    assert assert_equals_transformers(folder)
    text = " ".join(["the", "fox", "a", "dog"] * 9)
    whole, short = (Tokenizer(folder, length).encode([text])[0][0] for length in (512, 8))
    assert short == ([whole[0], *whole[-7:]] if keeps == "end" else [*whole[:7], whole[-1]])


def test_keywords_win_over_the_files(tmp_path):
    folder = written(tmp_path / "t", "WordPiece", {**BERT, "do_lower_case": True}, "gte")
    for given in (
        {"do_lower_case": False},
        {"split_special_tokens": True},
        {"additional_special_tokens": ["<device>"]},
        {"mask_token": "<mask>", "truncation_side": "left"},
    ):
        assert assert_equals_transformers(folder, given)
    folder = written(tmp_path / "t", "BPE", {"bos_token": "[CLS]", "eos_token": "the"}, "modernbert")
    assert assert_equals_transformers(folder, {"add_bos_token": True})
    assert assert_equals_transformers(folder, {"add_eos_token": True})


def drawn(draw: random.Random, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Random settings in random files."""
    settings: dict[str, Any] = {key: value for key, value in ENDS.items() if draw.random() < 0.9}
    files: dict[str, Any] = {}

    def some(share: float) -> bool:
        return draw.random() < share

    def a_token(content: str) -> str | dict[str, Any]:
        flags = {flag: some(0.3) for flag in ("lstrip", "rstrip", "single_word", "normalized", "special")}
        return content if some(0.5) else token(content, **flags)

    for key in ("do_lower_case", "strip_accents", "tokenize_chinese_chars", "add_prefix_space", "split_special_tokens"):
        if some(0.3):
            settings[key] = some(0.5)
    for key in (
        "clean_up_tokenization_spaces",
        "add_bos_token",
        "add_eos_token",
        "legacy",
        "from_slow",
        "trim_offsets",
    ):
        if some(0.2):
            settings[key] = some(0.6)
    for key in ("truncation_side", "padding_side"):
        if some(0.3):
            settings[key] = draw.choice(["left", "right"])
    if some(0.3):
        settings["model_input_names"] = ["input_ids", "token_type_ids"][: draw.choice([1, 2])]
    for key in ("additional_special_tokens", "extra_special_tokens"):
        if some(0.3):
            settings[key] = [a_token(content) for content in draw.sample(NEW, 2)]
    if some(0.15):
        settings["extra_special_tokens"] = {"image_token": a_token(draw.choice(NEW)), "x": "<x>"}
    for key in ("image_token", "boi_token", *ENDS, "bos_token"):
        if some(0.15):
            settings[key] = a_token(draw.choice([*NEW, "<new>"]))
    if some(0.4):
        more = {str(draw.choice([0, 3, 50, 900])): a_token(c) for c in draw.sample(NEW, 2)}
        settings["added_tokens_decoder"] = {i: t for i, t in more.items() if isinstance(t, dict) and t.pop("__type")}
    if some(0.3):
        files["special_tokens_map"] = {key: a_token(value) for key, value in ENDS.items()}
        for value in files["special_tokens_map"].values():
            if isinstance(value, dict):
                del value["__type"]
    if some(0.2):
        files["added_tokens"] = dict(zip(draw.sample(NEW, 2), [700, 650], strict=True))
    if some(0.3):
        side = draw.choice(["Left", "Right"])
        files["stored__truncation"] = {"direction": side, "max_length": 9, "strategy": "LongestFirst", "stride": 2}
    settings["tokenizer_class"] = draw.choice(
        ["PreTrainedTokenizerFast", "TokenizersBackend", "BertTokenizer", "XLMRobertaTokenizerFast"]
    )
    made = draw.choice(["BPE", "WordPiece", "Unigram"])
    return written(folder, made, settings, draw.choice(["modernbert", "gte", "new", None]), **files), settings


def test_random_files_give_what_transformers_gives(tmp_path):
    """More: SETTINGS_DRAWS=2000."""
    equal, draws = 0, int(os.environ.get("SETTINGS_DRAWS", "80"))
    for seed in range(draws):
        folder, settings = drawn(random.Random(seed), tmp_path / "t")
        try:
            equal += assert_equals_transformers(folder)
        except (AssertionError, CheckpointError) as error:
            raise AssertionError(f"draw {seed}: {settings}: {error}") from error
    assert equal > draws * 0.6


# ---- refused by name -----------------------------------------------------------------------------------------------


def test_dropout_is_refused(tmp_path):
    model = json.loads(kind("BPE"))["model"]
    folder = written(tmp_path / "t", "BPE", {}, "modernbert", stored__model={**model, "dropout": 0.1})
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: dropout of its model is 0\.1.*set it to null"):
        Tokenizer(folder, 16)
    for none in (None, 0.0):
        folder = written(tmp_path / "t", "BPE", {}, "modernbert", stored__model={**model, "dropout": none})
        assert assert_equals_transformers(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tokenizer_class": "RobertaTokenizer"}, "tokenizer_class is 'RobertaTokenizer'; .*BertTokenizer, XLMRoberta"),
        ({"tokenizer_class": 3}, "tokenizer_class is 3"),
        ({**BERT, "do_lower_case": "yes"}, "do_lower_case of the tokenizer is 'yes'; it must be true or false"),
        ({**BERT, "cls_token": None}, "cls_token is null; a BertTokenizer needs one"),
        ({"truncation_side": "top"}, "truncation_side is 'top'; it must be 'right' or 'left'"),
        ({"padding_side": 1}, "padding_side is 1; it must be"),
        ({"mask_token": 7}, "mask_token is 7; it must be a token"),
        ({"mask_token": {"content": "[MASK]"}}, "mask_token is .*; it must be a token"),
        ({"extra_special_tokens": [5]}, "extra_special_tokens is 5; it must be a token"),
        ({"extra_special_tokens": "<a>"}, "extra_special_tokens is '<a>'; it must be a list"),
        ({"added_tokens_decoder": ["<a>"]}, "added_tokens_decoder is .*; it must map ids to tokens"),
        ({"added_tokens_decoder": {"one": token("<a>")}}, "can't be used: .*'one'"),
        ({"added_tokens_decoder": {"1": {"content": "<a>", "lstrip": 7}}}, "can't be used: .*"),
        ({"split_special_tokens": "no"}, "split_special_tokens of the tokenizer is 'no'; it must be true or false"),
        ({**BERT, "strip_accents": "no"}, "strip_accents of the tokenizer is 'no'; it must be true or false"),
        ({"fast_tokenizer_files": ["tokenizer.4.0.json"]}, "fast_tokenizer_files is .* one tokenizer.json"),
        ({"init_inputs": ["a"]}, "init_inputs is .* not supported"),
    ],
)
def test_a_setting_that_cannot_be_honoured_is_named(tmp_path, settings, message):
    with pytest.raises(CheckpointError, match=f"(?s){message}"):
        Tokenizer(written(tmp_path / "t", "WordPiece", settings, "gte" if "tokenizer_class" in settings else None), 16)


@pytest.mark.parametrize("name", ["special_tokens_map", "added_tokens", "tokenizer_config", "tokenizer"])
def test_a_name_that_is_no_file_is_an_error(tmp_path, name):
    folder = written(tmp_path / "t", "BPE", {}, "modernbert")
    (folder / f"{name}.json").unlink(missing_ok=True)
    (folder / f"{name}.json").symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=rf"no {name}\.json .*is a link to nowhere, which is not there"):
        Tokenizer(folder, 16)


def test_a_template_of_very_many_tokens_is_refused(tmp_path):
    stored = json.loads(kind("BPE"))["post_processor"]
    stored["single"] += [{"SpecialToken": {"id": "[SEP]", "type_id": 0}}] * 5_000
    folder = written(tmp_path / "t", "BPE", {}, "modernbert", stored__post_processor=stored)
    with pytest.raises(CheckpointError, match=r"its template gives 5003 tokens for 'a'; at most 1024"):
        Tokenizer(folder, 1 << 20)


# ---- no tokenizer.json ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["modernbert", "gte"])
def test_the_advice_for_older_files_works(tmp_path, model_type):
    """It is run here."""
    folder = written(tmp_path / "t", "WordPiece", {}, model_type)
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").unlink()
    (folder / "vocab.txt").write_text("".join(piece + "\n" for piece in sorted(vocab, key=vocab.__getitem__)))
    with pytest.raises(
        CheckpointError, match=r"no tokenizer\.json in .*; transformers makes one of vocab\.txt"
    ) as caught:
        Tokenizer(folder, 16)
    code = re.search('python -c "(.*?)"', str(caught.value))[1].replace("FOLDER", str(folder))
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, capture_output=True, timeout=120)
    assert assert_equals_transformers(folder)


@pytest.mark.parametrize("left", [(), ("config.json",), ("tokenizer_config.json",), ("merges.txt",)])
def test_without_any_tokenizer_the_base_model_has_it(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("{}")
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json in .*: copy it, .* from the base model"):
        Tokenizer(tmp_path, 16)


def test_a_pointer_of_git_lfs_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is a pointer of git-lfs.*git lfs pull"):
        Tokenizer(tmp_path, 16)


def test_a_vocabulary_that_the_class_cannot_have_is_named(make_checkpoint, tmp_path):
    for path in REAL.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "config.json").write_text('{"model_type": "gte"}')
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "XLMRobertaTokenizer"}')
    message = "tokenizer.json holds a 'BPE', and XLMRobertaTokenizer needs a Unigram vocabulary"
    with pytest.raises(CheckpointError, match=message):
        Tokenizer(tmp_path, 32)
