"""Every kind of tokenizer that the family's checkpoints have, small, built here: ids and types equal transformers'."""

import functools
import json
import random
import time
import warnings
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer

from modernbert_lite.pipeline.tokenizer import Tokenizer

REAL = Path(__file__).parent / "data" / "modernbert-tokenizer"

CORPUS = [
    "The quick brown fox jumps over the lazy dog. The dog sleeps, and the fox walks on; query: what is a passage?",
    "query: how do tokenizers of words and pieces work? passage: they cut words into pieces, and pieces into letters.",
    "naïve café, Ångström: der schnelle braune Fuchs springt über den faulen Hund. Les mots sont coupés en morceaux.",
    "Быстрая коричневая лиса прыгает через ленивую собаку. Слова делятся на части.",
    "今日は天気がいいので散歩に行きます。検索クエリ: 日本語の文章を単語に分ける。検索文書: 東京都の人口は一千万。",
    "今天天气很好，我们去公园散步。北京是中国的首都！\n\n中文没有空格。",
    "الثعلب البني السريع يقفز فوق الكلب الكسول. שלום עולם, מה שלומך היום?",
    "def f(x):\n    return x + 1  # 12345 comments {}\n\nif a == b:\n    print('!')\n!!\n",
] * 3

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


def pieces(trainer, splitter, normalizer=None, model=None):
    """The model of a tokenizer trained on CORPUS, as tokenizer.json has it."""
    made = RustTokenizer(model or models.BPE())
    made.pre_tokenizer = splitter
    if normalizer:
        made.normalizer = normalizer
    made.train_from_iterator(CORPUS, trainer)
    return json.loads(made.to_str())["model"]


def special(*names, **options):
    return [AddedToken(name, special=True, normalized=False, **options) for name in names]


def bert():
    """gte-base/large-en-v1.5: uncased WordPiece, types 0 and 1."""
    made = RustTokenizer(models.WordPiece(unk_token="[UNK]"))
    made.normalizer = normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(CORPUS, trainers.WordPieceTrainer(vocab_size=400, special_tokens=names))
    made.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    made.decoder = decoders.WordPiece()
    return made, {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "mask_token": "[MASK]",
    }


def bert_processing():
    """The same with the older post-processor, which has no template to read."""
    made, names = bert()
    made.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return made, names


def xlmr():
    """gte-multilingual, snowflake-arctic-embed-m-v2.0: Unigram of words, two </s> between the texts of a pair."""
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    splitter = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    trainer = trainers.UnigramTrainer(
        vocab_size=400, special_tokens=names, unk_token="<unk>", show_progress=False, max_piece_length=8
    )
    trained = pieces(trainer, splitter, normalizers.NFKC(), models.Unigram())
    made = RustTokenizer(models.Unigram([tuple(piece) for piece in trained["vocab"]], 3, False))
    made.normalizer = normalizers.NFKC()
    made.pre_tokenizer = splitter
    made.decoder = decoders.Metaspace()
    made.add_special_tokens(special(*names))
    made.add_special_tokens(special("<mask>", lstrip=True))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> </s> $B </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return made, {
        "bos_token": "<s>",
        "cls_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "model_max_length": 1000000000000000019884624838656,
    }


def gemma(pair="<bos> $A <eos> $B <eos>"):
    """mmBERT: BPE of the whole text, "▁" for a space, bytes for what is unknown."""
    trained = pieces(
        trainers.BpeTrainer(vocab_size=400, show_progress=False),
        pre_tokenizers.Metaspace(prepend_scheme="never"),
    )
    names = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    tokens = [*names, *(f"<0x{byte:02X}>" for byte in range(256)), "\n", "\n\n", "\n\n\n", "▁▁", "▁▁▁▁"]
    tokens += [token for token in sorted(trained["vocab"], key=trained["vocab"].get) if token not in tokens]
    merges = [("▁", "▁"), ("▁▁", "▁▁"), *map(tuple, trained["merges"])]
    made = RustTokenizer(
        models.BPE({t: i for i, t in enumerate(tokens)}, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    made.normalizer = normalizers.Replace(" ", "▁")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(special(*names))
    made.add_tokens([AddedToken(run, normalized=False) for run in ("\n", "\n\n", "\n\n\n")])
    made.post_processor = processors.TemplateProcessing(
        single="<bos> $A <eos>", pair=pair, special_tokens=[("<bos>", 2), ("<eos>", 1)]
    )
    return made, {
        "bos_token": "<bos>",
        "eos_token": "<eos>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
        "model_max_length": 1e30,
    }


def granite_311m():
    """Like Gemma 3's, with types in its template."""
    return gemma("<bos> $A <eos> <bos>:1 $B:1 <eos>:1")


def byte_level(pattern, specials, template, normalizer=None):
    """BPE of bytes, the text split by a regular expression. specials: name -> id, which may be far above the rest."""
    splitter = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    trained = pieces(trainer, splitter, normalizer)
    made = RustTokenizer(models.BPE({**trained["vocab"], **specials}, [tuple(m) for m in trained["merges"]]))
    if normalizer:
        made.normalizer = normalizer
    made.pre_tokenizer = splitter
    made.decoder = decoders.ByteLevel()
    made.add_special_tokens(special(*specials))
    made.post_processor = template
    return made


def granite_97m():
    """o200k's splits; ids of cls, pad and sep in the middle of the added tokens."""
    word = (
        r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+(?i:'s|'t|'re)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    names = ["<|start_of_text|>", "[CLS]", "[PAD]", "[MASK]", "[UNK]", "[SEP]", "<|end_of_text|>"]
    ids = {name: 179933 + i for i, name in enumerate(names)}
    template = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B [SEP]", special_tokens=[("[CLS]", 179934), ("[SEP]", 179938)]
    )
    return byte_level(word, ids, template), {
        "bos_token": "[CLS]",
        "cls_token": "[CLS]",
        "eos_token": "[SEP]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "unk_token": "[UNK]",
        "mask_token": {"__type": "AddedToken", "content": "[MASK]", "special": True},
    }


def qwen():
    """Zhinao: Qwen's splits, in which punctuation takes the line's end with it; a template of one token, in front."""
    word = r"(?i:'s|'t|'re|'ve|'m)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    template = processors.TemplateProcessing(single="[CLS] $A", pair="[CLS] $A [SEP] $B", special_tokens=ENDS)
    specials = {"<|endoftext|>": 700, **dict(ENDS), "[MASK]": 703}
    return byte_level(word, specials, template, normalizers.NFC()), {
        "cls_token": "[CLS]",
        "sep_token": "[SEP]",
        "pad_token": "<|endoftext|>",
        "mask_token": "[MASK]",
    }


ENDS = [("[CLS]", 701), ("[SEP]", 702)]


def qwen_without_template():
    made, names = qwen()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    return made, names


def japanese():
    """modernbert-ja: Unigram of the whole text, with bytes for what is unknown."""
    names = ["<unk>", "<s>", "</s>", "<pad>", "<sep>", "<mask>", "<cls>"]
    trainer = trainers.UnigramTrainer(vocab_size=500, special_tokens=names, unk_token="<unk>", show_progress=False)
    trained = pieces(trainer, pre_tokenizers.Metaspace(prepend_scheme="never"), model=models.Unigram())
    vocab = [tuple(piece) for piece in trained["vocab"]]
    vocab += [(f"<0x{byte:02X}>", 0.0) for byte in range(256)] + [("▁▁", -12.0), ("▁▁▁▁", -13.0)]
    vocab += [("zz", -3.9), ("zzz", -4.0)]  # whose best cut of "zzzz..." depends on its end
    made = RustTokenizer(models.Unigram(vocab, 0, True))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    made.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    made.add_special_tokens(special(*names))
    made.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", pair="<s> $A </s> $B:1 </s>:1", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return made, {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "cls_token": "<cls>",
        "sep_token": "<sep>",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "mask_token": "<mask>",
    }


KINDS = {
    made.__name__: made
    for made in (
        bert,
        bert_processing,
        xlmr,
        gemma,
        granite_311m,
        granite_97m,
        qwen,
        qwen_without_template,
        japanese,
    )
}
TYPED = {"bert", "bert_processing", "granite_311m", "qwen_without_template", "japanese"}


@pytest.fixture(scope="session")
def kinds(tmp_path_factory):
    """A folder of each kind."""
    folders = {"granite_english": REAL}
    for name, make in KINDS.items():
        folders[name] = tmp_path_factory.mktemp(name)
        made, settings = make()
        write(folders[name], json.loads(made.to_str()), settings)
    return folders


def write(folder: Path, stored: dict, settings: dict) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(stored), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **settings}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


@pytest.fixture(params=["granite_english", *KINDS])
def kind(request):
    return request.param


@pytest.fixture
def folder(kinds, kind):
    return kinds[kind]


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


@functools.cache
def plain(folder: Path) -> RustTokenizer:
    """The file's tokenizer without truncation."""
    made = RustTokenizer.from_file(str(folder / "tokenizer.json"))
    made.no_truncation()
    return made


def whole(folder: Path, text: str, max_length: int) -> list[int]:
    """All of the text tokenized, and cut by hand."""
    made = plain(folder)
    ends = made.num_special_tokens_to_add(False)
    inside = made.encode(text, add_special_tokens=False).ids[: max_length - ends]
    outside = made.encode("fox").ids
    middle = len(made.encode("fox", add_special_tokens=False).ids)
    before = outside.index(made.encode("fox", add_special_tokens=False).ids[0])
    return [*outside[:before], *inside, *outside[before + middle :]]


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
