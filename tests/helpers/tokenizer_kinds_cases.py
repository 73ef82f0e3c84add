"""Shared by tests/pipeline: test_tokenizer_kinds, test_tokenizer_kinds_long."""

import functools
import json
from pathlib import Path

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as RustTokenizer

REAL = Path(__file__).parents[1] / "data" / "modernbert-tokenizer"


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
