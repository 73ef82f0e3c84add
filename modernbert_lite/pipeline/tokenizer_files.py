"""A folder's tokenizer as transformers 5.23's AutoTokenizer makes it: tokenizer.json, changed by the files beside it.

transformers takes tokenizer.json whole for ModernBERT. For GTE the class that tokenizer_config.json names decides:
BertTokenizer and XLMRobertaTokenizer keep the file's vocabulary only, and build the rest by their own rules.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as RustTokenizer

from ..checkpoint.folder import Folder
from ..reading import (
    MAX_TOKENIZER_BYTES,
    MAX_TOKENIZER_JSON_BYTES,
    CheckpointError,
    OptionError,
    cache_advice,
    is_there,
    optional_json,
    read_bytes,
    shown,
)

_WHOLE = "TokenizersBackend"  # tokenizer.json as it is
_BERT, _XLMR = "BertTokenizer", "XLMRobertaTokenizer"
_CLASSES = {"PreTrainedTokenizer": _WHOLE, "PythonBackend": _WHOLE, _WHOLE: _WHOLE, _BERT: _BERT, _XLMR: _XLMR}
# A class's own names of special tokens, where no file has the key.
_OWN_NAMES: dict[str, dict[str, str]] = {
    _WHOLE: {},
    _BERT: {
        "unk_token": "[UNK]",
        "sep_token": "[SEP]",
        "pad_token": "[PAD]",
        "cls_token": "[CLS]",
        "mask_token": "[MASK]",
    },
    _XLMR: {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "sep_token": "</s>",
        "cls_token": "<s>",
        "unk_token": "<unk>",
        "pad_token": "<pad>",
        "mask_token": "<mask>",
    },
}
_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_OF_A_TOKEN = ("content", "single_word", "lstrip", "rstrip", "normalized", "special")
_SIDES = ("right", "left")
# Keys by which a file could put another tokenizer in the place of tokenizer.json's. Nobody has them.
_REFUSED = ("init_inputs", "post_processor", "tokenizer_object", "tokenizer_truncation", "tokenizer_padding")
_SPECIAL, _ADDED = _OLDER_FILES = ("special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class TokenizerFiles:
    """What a folder's files say about its tokenizer."""

    rust: RustTokenizer  # without truncation and padding
    names: Mapping[str, str]  # "mask_token" -> "[MASK]": the special tokens that the files name
    extra: tuple[str, ...]  # special tokens that they list without a name
    truncation_side: str
    padding_side: str
    gives_types: bool  # whether a network gets token types
    cleans_up: bool  # whether a decoded text loses the spaces before punctuation


def read_tokenizer(folder: Path, given: Mapping[str, Any] | None = None, files: Folder | None = None) -> TokenizerFiles:
    """given: keys that win over those of tokenizer_config.json, as keywords of AutoTokenizer.from_pretrained do. files:
    the checkpoint that the folder belongs to, with the files that are read already.

    Raises CheckpointError, naming the file, for a missing or malformed file and for a setting that isn't supported.
    """
    path, beside = folder / "tokenizer.json", folder / "tokenizer_config.json"
    files = Folder(folder) if files is None else files
    stored = files.optional_json(beside, MAX_TOKENIZER_JSON_BYTES)
    if not is_there(path):
        raise CheckpointError(_advice(folder, stored))
    content = read_bytes(path, MAX_TOKENIZER_BYTES)
    if content.startswith(b"version https://git-lfs"):
        raise CheckpointError(f"{path} is a pointer of git-lfs, not the tokenizer: run `git lfs pull` in its folder")
    for name in _OLDER_FILES:  # also where tokenizer_config.json says all that they do, so that they aren't read
        is_there(folder / name)
    given = given or {}
    kind = _class(files, folder, stored, beside)
    with no_panic(f"{path} can't be read", cache_advice(path)):
        made: dict[str, Any] = {}
        if kind == _WHOLE:
            rust = RustTokenizer.from_buffer(content)
            there = rust.get_added_tokens_decoder()
        else:  # its vocabulary goes into another model: reading it twice would take a second
            made = json.loads(content)
            bare = {"added_tokens": [], "model": {"type": "BPE", "vocab": {}, "merges": []}}
            rust = RustTokenizer.from_str(json.dumps({**made, **bare}))
            there = {token["id"]: _token(token) for token in made.get("added_tokens") or []}
    with no_panic(f"{beside} and the files beside it can't be used"):
        return _apply(folder, kind, rust, made, _settings(folder, there, stored, given))


def _class(files: Folder, folder: Path, stored: Mapping[str, Any], beside: Path) -> str:
    """The name of the class that AutoTokenizer takes."""
    config = files.optional_json(folder / "config.json")
    auto, family = stored.get("auto_map"), config.get("model_type")
    own_code = isinstance(auto, list) or (isinstance(auto, dict) and auto.get("AutoTokenizer") is not None)
    if family == "modernbert" and not own_code:
        return _WHOLE  # whatever the files say
    named = stored.get("tokenizer_class") or config.get("tokenizer_class") or (_XLMR if family == "gte" else _WHOLE)
    found = _CLASSES.get(named.removesuffix("Fast")) if isinstance(named, str) else None
    if found is None:
        raise CheckpointError(
            f"{beside}: tokenizer_class is {shown(named)}; transformers builds such a tokenizer by rules of its class, "
            f"known are {_BERT}, {_XLMR} and PreTrainedTokenizerFast, which takes tokenizer.json as it is: set the one "
            "that the model was trained with"
        )
    return found


def _settings(
    folder: Path, there: dict[int, AddedToken], stored: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """All settings. The special tokens and `added_tokens_decoder` are among them, as AddedToken or str."""
    beside = folder / "tokenizer_config.json"
    settings = {key: value for key, value in stored.items() if key not in ("add_bos_token", "add_eos_token")}
    settings.update(given)
    for key in _REFUSED:
        if settings.get(key):
            raise CheckpointError(f"{beside}: {key} is {shown(settings[key])}; it is not supported: take it out")
    files = settings.get("fast_tokenizer_files")
    if files not in (None, ["tokenizer.json"]):
        raise CheckpointError(
            f"{beside}: fast_tokenizer_files is {shown(files)}; one tokenizer.json for all versions is supported"
        )
    if "additional_special_tokens" in settings and not settings.get("extra_special_tokens"):
        settings["extra_special_tokens"] = settings.pop("additional_special_tokens")
    specific = {key: settings.pop(key) for key in _own_tokens(settings)}
    if isinstance(settings.get("extra_special_tokens"), dict):
        specific |= settings.pop("extra_special_tokens")
    if specific:
        settings["model_specific_special_tokens"] = specific
    if "added_tokens_decoder" in settings:
        listed = settings["added_tokens_decoder"]
        if not isinstance(listed, dict) or not all(isinstance(token, (dict, AddedToken)) for token in listed.values()):
            raise CheckpointError(f"{beside}: added_tokens_decoder is {shown(listed)}; it must map ids to tokens")
        added = {int(i): _token(token) for i, token in listed.items()}
    else:
        added = _older_files(folder, there, settings, given)
    settings = {key: _typed(value) for key, value in settings.items()}
    by_content = {str(token): token for token in added.values()}
    for key in _NAMES:
        if settings.get(key) is not None:
            settings[key] = by_content.get(str(settings[key]), settings[key])
    return {**settings, "added_tokens_decoder": added}


def _older_files(
    folder: Path, there: dict[int, AddedToken], settings: dict[str, Any], given: Mapping[str, Any]
) -> dict[int, AddedToken]:
    """If tokenizer_config.json lists no added tokens: those of added_tokens.json and tokenizer.json (`there`).
    special_tokens_map.json wins over `settings`, which are changed."""
    for key, value in optional_json(folder / _SPECIAL).items():
        if given.get(key):
            continue
        if key == "extra_special_tokens" and isinstance(value, list):
            before = settings.get(key) or []
            new = [_token(token) if isinstance(token, dict) else token for token in value]
            value = [*before, *(token for token in new if token not in before)]
        elif isinstance(value, dict) and key != "extra_special_tokens":
            value = _token({**value, "special": True})
        settings[key] = value
    if isinstance(settings.get("extra_special_tokens"), dict):
        specific = settings.get("model_specific_special_tokens") or {}
        settings["model_specific_special_tokens"] = specific | settings.pop("extra_special_tokens")
    special = {str(settings[key]) for key in _NAMES if settings.get(key)}
    special.update(str(token) for token in settings.get("extra_special_tokens") or [])
    more = optional_json(folder / _ADDED, MAX_TOKENIZER_JSON_BYTES)
    added = {
        i: AddedToken(token, normalized=token not in special, special=token in special) for token, i in more.items()
    }
    return added | there


def _apply(
    folder: Path, kind: str, rust: RustTokenizer, made: dict[str, Any], settings: dict[str, Any]
) -> TokenizerFiles:
    beside = folder / "tokenizer_config.json"
    truncation, padding = rust.truncation or {}, rust.padding or {}
    named = {key: settings.get(key, own) for key, own in {**dict.fromkeys(_NAMES), **_OWN_NAMES[kind]}.items()}
    if kind == _WHOLE and padding and "pad_token" not in settings:
        named["pad_token"] = padding["pad_token"]
    # In the order in which those that are new get their ids.
    named |= {key: settings[key] for key in _own_tokens(settings)}
    named |= settings.get("model_specific_special_tokens") or {}
    extra = settings.get("extra_special_tokens", settings.get("additional_special_tokens")) or []
    if not isinstance(extra, list):
        raise CheckpointError(f"{beside}: extra_special_tokens is {shown(extra)}; it must be a list or an object")
    for key, value in [*named.items(), *(("extra_special_tokens", value) for value in extra)]:
        if not isinstance(value, (str, AddedToken, type(None))):
            raise CheckpointError(f"{beside}: {key} is {shown(value)}; it must be a token or its name")
    if kind != _WHOLE:
        if kind == _XLMR and not isinstance(made["model"].get("vocab"), list):
            raise CheckpointError(
                f"{folder / 'tokenizer.json'} holds a {shown(made['model'].get('type'))}, and {_XLMR} needs a Unigram "
                "vocabulary: name another tokenizer_class in tokenizer_config.json"
            )
        rust = (_bert if kind == _BERT else _xlmr)(made, settings, named)
    if getattr(rust.model, "dropout", None):
        raise CheckpointError(
            f"{folder / 'tokenizer.json'}: dropout of its model is {rust.model.dropout}: every call would "
            "give other tokens; set it to null there"
        )
    # Truncation is done by our own code, not by the library, which keeps all that it cuts off: for a pair every cut
    # piece of one side with every one of the other, gigabytes for two texts of 100 kB.
    rust.no_padding()
    rust.no_truncation()
    _add(rust, settings["added_tokens_decoder"], named, extra)
    rust.encode_special_tokens = _flag(settings, "split_special_tokens", False)
    _set_template(beside, kind, rust, settings, named)
    sides = {}
    for key, default in (("truncation_side", truncation), ("padding_side", padding)):
        sides[key] = settings.get(key) or default.get("direction", "right")
        if sides[key] not in _SIDES:
            raise CheckpointError(f"{beside}: {key} is {shown(sides[key])}; it must be 'right' or 'left'")
    asked = settings.get("model_input_names") or (["token_type_ids"] if kind == _BERT else [])
    clean = settings.get("clean_up_tokenization_spaces", False)
    if isinstance(rust.model, models.BPE):  # it would take spaces that are part of the text
        clean = clean and settings.get("clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output")
    return TokenizerFiles(
        rust,
        {key: str(token) for key, token in named.items() if token is not None},
        tuple(map(str, extra)),
        **sides,
        gives_types="token_type_ids" in asked,
        cleans_up=bool(clean),
    )


def _add(rust: RustTokenizer, added: dict[int, AddedToken], named: dict[str, Any], extra: list[Any]) -> None:
    """Adds the tokens that the files name. Their flags win over tokenizer.json's. A token that isn't in the vocabulary
    gets the next free id, whatever id a file gives it."""
    adding: list[Any] = [token for _, token in sorted(added.items())]
    there = {str(token) for token in (*rust.get_added_tokens_decoder().values(), *adding)}
    adding += [token for token in (*named.values(), *extra) if token is not None and str(token) not in there]
    special = {str(token) for token in named.values() if token}
    for i, token in enumerate(adding):
        if isinstance(token, str):
            adding[i] = AddedToken(token, special=True)
        elif str(token) in special:
            token.special = True
    rust.add_tokens(adding)


def _bert(stored: dict[str, Any], settings: dict[str, Any], named: dict[str, Any]) -> RustTokenizer:
    vocab = stored["model"]["vocab"]
    if isinstance(vocab, list):
        vocab = {token[0] if isinstance(token, list) else token: i for i, token in enumerate(vocab)}
    made = RustTokenizer(models.WordPiece(vocab, unk_token=str(named["unk_token"])))
    made.normalizer = normalizers.BertNormalizer(
        clean_text=True,
        handle_chinese_chars=_flag(settings, "tokenize_chinese_chars", True),
        strip_accents=_flag(settings, "strip_accents", None),
        lowercase=_flag(settings, "do_lower_case", True),
    )
    made.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    made.decoder = decoders.WordPiece(prefix="##")
    return made


def _xlmr(stored: dict[str, Any], settings: dict[str, Any], named: dict[str, Any]) -> RustTokenizer:
    made = RustTokenizer(models.Unigram([tuple(piece) for piece in stored["model"]["vocab"]], 3, False))
    steps = stored.get("normalizer") or {}
    for step in steps["normalizers"] if steps.get("type") == "Sequence" else [steps]:
        if step.get("type") == "Precompiled":
            made.normalizer = normalizers.Precompiled(base64.b64decode(step["precompiled_charsmap"]))
            break
    scheme: Any = "always" if settings.get("add_prefix_space", True) else "never"
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace(prepend_scheme=scheme)]
    )
    made.decoder = decoders.Metaspace(prepend_scheme=scheme)
    return made


def _set_template(
    beside: Path, kind: str, rust: RustTokenizer, settings: dict[str, Any], named: dict[str, Any]
) -> None:
    """Sets the special tokens of texts and pairs, if the class or keywords say so."""
    ends = {_BERT: ("cls_token", "sep_token"), _XLMR: ("bos_token", "eos_token")}.get(kind, ())
    for key in ends:
        if named[key] is None:
            raise CheckpointError(f"{beside}: {key} is null; a {kind} needs one")
    if kind == _BERT:
        first, last = str(named["cls_token"]), str(named["sep_token"])
        single, pair = [first, "$A", last], [first, "$A", last, "$B:1", f"{last}:1"]
    elif kind == _XLMR:
        first, last = str(named["bos_token"]), str(named["eos_token"])
        single, pair = [first, "$A", last], [first, "$A", last, last, "$B", last]
    elif "add_bos_token" in settings or "add_eos_token" in settings:
        first = str(named["bos_token"]) if settings.get("add_bos_token") and named["bos_token"] else ""
        last = str(named["eos_token"]) if settings.get("add_eos_token") and named["eos_token"] else ""
        single = [part for part in (first, "$A", last) if part]
        pair = [*single, *(f"{part}:1" for part in (first, "$B", last) if part)]
    else:
        return
    ids = [(token, rust.token_to_id(token)) for token in {first, last} if token]
    rust.post_processor = processors.TemplateProcessing(single=single, pair=pair, special_tokens=ids)


def _flag(settings: Mapping[str, Any], key: str, default: bool | None) -> Any:
    value = settings.get(key, default)
    if not isinstance(value, bool) and (value, default) != (None, None):
        raise CheckpointError(f"{key} of the tokenizer is {shown(value)}; it must be true or false")
    return value


def _own_tokens(settings: Mapping[str, Any]) -> list[str]:
    """Keys of tokens that only this checkpoint has, such as "image_token"."""
    return [
        key
        for key, value in settings.items()
        if key.endswith("_token") and key not in _NAMES and isinstance(value, (str, AddedToken))
    ]


def _token(value: Any) -> AddedToken:
    if isinstance(value, AddedToken):
        return value
    return AddedToken(**{key: part for key, part in value.items() if key in _OF_A_TOKEN})  # it prints others' names


def _typed(value: Any) -> Any:
    """The value, in which what is marked as a token is an AddedToken."""
    if isinstance(value, dict):
        return _token(value) if value.get("__type") == "AddedToken" else {k: _typed(v) for k, v in value.items()}
    return [_typed(item) for item in value] if isinstance(value, list) else value


def _advice(folder: Path, stored: Mapping[str, Any]) -> str:
    """What to do about a folder without tokenizer.json."""
    named = str(stored.get("tokenizer_class")).removesuffix("Fast")
    named = (
        named if named.isidentifier() and len(named) < 60 and _CLASSES.get(named) != _WHOLE and named != "None" else ""
    )
    made_by = {"vocab.txt": _BERT, "sentencepiece.bpe.model": _XLMR, "merges.txt": "", "tokenizer.model": ""}
    for name, usual in made_by.items():
        if (named or usual) and is_there(folder / name):
            return (
                f'no tokenizer.json in {folder}; transformers makes one of {name}: python -c "from transformers import '
                f"{named or usual} as T; T.from_pretrained('FOLDER').save_pretrained('FOLDER')\", FOLDER being its path"
            )
    return (
        f"no tokenizer.json in {folder} (a Trainer's checkpoint may have none): copy it, tokenizer_config.json and "
        "special_tokens_map.json, those that there are, from the base model that it was trained from"
    )


@contextmanager
def no_panic(what: str, advice: str = "") -> Iterator[None]:
    """Makes errors of the tokenizers library CheckpointErrors. Rust panics are among them: they are a BaseException of
    their own, and would pass every `except Exception`."""
    try:
        yield
    except (CheckpointError, OptionError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what}: {shown(error) or type(error).__name__}{advice}") from None
