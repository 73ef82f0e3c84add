"""Very long texts and prompts, for each kind of tokenizer."""

import json
import random
import time
import warnings

import pytest
from tokenizer_kinds_cases import (  # noqa: F401
    CORPUS,
    bert,
    folder,
    gemma,
    japanese,
    kind,
    kinds,
    plain,
    qwen,
    qwen_without_template,
    whole,
    write,
    xlmr,
)
from tokenizers import AddedToken
from tokenizers import Tokenizer as RustTokenizer

from modernbert_lite.pipeline.tokenizer import Tokenizer

LONG = {
    "words": "".join(f"word{i % 97} and, then. " for i in range(1_300)),
    "every language": " ".join(CORPUS * 12),
    "lines": "".join(f"line {i % 31}!!\r\n\r\n" for i in range(2_600)),
    "code": "    if a == b:\n        print('!')\n}}\n\n" * 600,
    "Japanese": "今日は天気がいいので散歩に行きます。" * 1_300,
    "Chinese lines": "今天天气很好，我们去公园散步。\n北京！\n\n" * 1_000,
    "wide spaces": "今日は\u3000天気が\u3000いい。\u3000\n" * 1_300,
    "one letter": "z" * 20_000,
    "no space": "".join(map(str, range(4_000))),
    "spaces": "begin" + " " * 20_000 + "end",
    "tabs": "one\ttwo\t" * 3_000,
    "unknown": "ꙮ " * 10_000,
    "unknown, no space": "ꙮ☃" * 10_000,
    "NULs": "\0 " * 10_000,
    "combining marks": "e\u0301 a\u0308 \u0301" * 3_000,
    "emoji": "👩‍👩‍👧‍👦 " * 1_600,
    "Arabic": CORPUS[6] * 200,
}


@pytest.mark.parametrize("max_length", [12, 64])
def test_a_very_long_text_gives_the_ids_of_the_whole(folder, max_length):
    tokenizer = Tokenizer(folder, max_length)
    for name, text in LONG.items():
        assert tokenizer.encode([text])[0] == [whole(folder, text, max_length)], name


@pytest.mark.parametrize("max_length", [8, 9])
def test_what_comes_after_the_clip_changes_nothing(folder, max_length):
    """Where a token reaches over white space: punctuation with the line's end, runs of spaces, added tokens."""
    tokenizer = Tokenizer(folder, max_length)
    draw = random.Random(max_length)
    bits = [" " * n for n in (1, 2, 3, 7, 64, 500)] + ["!" * n for n in (1, 5, 20, 60)]
    bits += ["\n", "\n\n", "!\n", "!!\n", "}}\n\n", "\r\n", "\n\n \n", "\u3000", "。\u3000", " \u0301", "/", " <mask>"]
    bits += ["the ", "naïve ", "1234567 ", "今日は天気が", "北京是中国的首都。\n", "word" * 30 + " ", "ꙮ", "שלום "]
    for _ in range(12):
        text = "".join(draw.choices(bits, k=draw.choice([60, 200])))
        assert tokenizer.encode([text])[0][0] == whole(folder, text, max_length), text[: 130 * max_length]


def test_a_token_over_white_space_is_not_torn_by_the_clip(folder, tmp_path):
    """ColBERT's "[Q] " and Qwen's "!\n" are one token, and others without their white space. Tokens of 200 characters
    before them: the clipped text would have just as many tokens as are asked for."""
    made = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    made.add_tokens([AddedToken(token, normalized=False) for token in ("[Q] ", "=" * 200, "+")])
    changed = write(tmp_path / "t", json.loads(made.to_str()), {})
    tokenizer = Tokenizer(changed, 12)
    for end in ("[Q] ", "the [Q] ", "!\n", "!!\n", "}}\n\n", "。\u3000\n", "(x)\r\n"):
        for short in range(12):
            text = "=" * 600 + "+" * short + end + "y" * 2_000
            assert tokenizer.encode([text])[0] == [whole(changed, text, 12)], (end, short)


def test_ten_megabytes_are_quick_for_every_kind(folder):
    tokenizer = Tokenizer(folder, 512)
    text = "a good deal of text, " * 500_000
    start = time.perf_counter()
    ids, cut = tokenizer.encode([text, "short", text])
    assert time.perf_counter() - start < 2.0
    assert [len(i) for i in ids[::2]] == [512, 512]
    assert cut == 2


# ---- prompts -------------------------------------------------------------------------------------------------------


def test_a_prompt_left_out_of_pooling_equals_sentence_transformers(folder, kind, make_checkpoint):
    """Its length is the prompt's alone, as sentence-transformers counts it, also where in the whole text its last
    space is part of the next word."""
    from sentence_transformers import SentenceTransformer

    import modernbert_lite as ml

    size = max(RustTokenizer.from_file(str(folder / "tokenizer.json")).get_vocab().values()) + 1
    checkpoint, _ = make_checkpoint(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=48,
        num_attention_heads=2,
        num_hidden_layers=2,
        pad_token_id=0,
    )
    for path in checkpoint.glob("*token*.json"):
        path.unlink()
    for path in folder.glob("*token*.json"):
        (checkpoint / path.name).write_bytes(path.read_bytes())
    st = "sentence_transformers.models."
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": st + "Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": st + "Pooling"},
    ]
    (checkpoint / "modules.json").write_text(json.dumps(modules))
    (checkpoint / "1_Pooling").mkdir()
    (checkpoint / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True, "include_prompt": False})
    )
    (checkpoint / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": 24, "do_lower_case": False}))
    texts = ["the quick brown fox", "Быстрая лиса", "今日は天気がいい", "a " * 40]
    embedder = ml.Embedder.from_pretrained(checkpoint)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = SentenceTransformer(str(checkpoint), device="cpu")
        for prompt in ("query: ", "検索クエリ: ", "passage:"):
            got = embedder.encode(texts, prompt=prompt)
            assert abs(got - reference.encode(texts, prompt=prompt)).max() < 2e-5, prompt
            assert abs(got - embedder.encode([prompt + text for text in texts])).max() > 1e-3, prompt


def test_prompt_length_by_hand(kinds):
    """<s> ▁query : -> as many as there are without </s>."""
    for name, ends in {"bert": 1, "xlmr": 1, "gemma": 1, "japanese": 1, "qwen": 1, "qwen_without_template": 0}.items():
        plain = RustTokenizer.from_file(str(kinds[name] / "tokenizer.json"))
        inside = len(plain.encode("query: ", add_special_tokens=False).ids)
        assert Tokenizer(kinds[name], 32).prompt_length("query: ") == inside + ends, name
    # Where words are cut apart first, the prompt's share of the whole is the same.
    for name in ("bert", "xlmr"):
        tokenizer = Tokenizer(kinds[name], 32)
        alone = tokenizer.prompt_length("query: ")
        (short, whole_text), _ = tokenizer.encode(["query: ", "query: the dog"])
        assert short[:alone] == whole_text[:alone]
