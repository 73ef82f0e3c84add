"""tokenizer_config.json's settings and the tokenizer's own: ids as AutoTokenizer's, or a refusal by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from modernbert_lite.reading import OptionError
from modernbert_lite.tokenizer import Tokenizer

REAL = Path(__file__).parent / "data" / "modernbert-tokenizer"


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
