"""The files that sentence-transformers writes beside a checkpoint, in their old (3-5) and new (6) forms.

Module classes are known by namespace (sentence_transformers., pylate.) and class name, and never imported.
"""

from __future__ import annotations

import string
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..ops.pooling import POOLING
from ..reading import MAX_TOKENIZER_JSON_BYTES, CheckpointError, OptionError, Reader, inside, shown, warn
from .folder import Folder, module_kind
from .settings import Settings, own_settings, read_settings
from .sparse import SparseConfig, read_sparse

SIMILARITIES = ("cosine", "dot", "euclidean", "manhattan")
LATE_SIMILARITIES = ("maxsim", "meanmaxsim")
# Names of sentence-transformers' functions that mean one of these.
_SIMILARITY_ALIASES = {
    **{"cos_sim": "cosine", "dot_score": "dot", "dot_product": "dot"},
    **{"euclidean_sim": "euclidean", "manhattan_sim": "manhattan", "mean_maxsim": "meanmaxsim"},
}
USUAL_PROMPTS = ("query", "document")  # every encoder has these, empty where no file has them
_MODEL_TYPES = ("SentenceTransformer", "CrossEncoder", "MultiVectorEncoder", "ColBERT", "SparseEncoder")
_OLD_POOLING_KEYS = {
    "cls": "pooling_mode_cls_token",
    "max": "pooling_mode_max_tokens",
    "mean": "pooling_mode_mean_tokens",
    "mean_sqrt_len_tokens": "pooling_mode_mean_sqrt_len_tokens",
    "weightedmean": "pooling_mode_weightedmean_tokens",
    "lasttoken": "pooling_mode_lasttoken",
}
_POOLING_KEYS = {
    *("pooling_mode", "include_prompt", *_OLD_POOLING_KEYS.values()),
    *("word_embedding_dimension", "embedding_dimension"),  # what the network's width says already
}


@dataclass(frozen=True)
class Pooling:
    modes: tuple[str, ...] = ("mean",)
    include_prompt: bool = True  # false: the prompt's tokens are not pooled


@dataclass(frozen=True)
class Late:
    """What late interaction needs besides the rest. Queries of fewer than `padded_length` tokens are padded to it."""

    query_length: int | None = None  # the most tokens of a query; None: as any text
    document_length: int | None = None
    padded_length: int = 0
    padding_token: str | None = None  # None: the mask token
    attends: bool = False  # whether the padding is seen by the query's tokens, which it sees itself in any case
    skiplist_words: tuple[str, ...] = ()  # tokens without a vector
    skiplist_tasks: tuple[str, ...] = ("document",)
    prefixes: tuple[str, ...] = ()  # tokens at a text's start that no normalizer may take apart


@dataclass(frozen=True)
class SentenceConfig:
    """What a repository's files say about sentence vectors. Without files: mean pooling, as in
    sentence-transformers."""

    model_type: str | None = None  # the class of sentence-transformers that wrote the files, where they say so
    pooling: Pooling | None = None  # None: no file says so
    on_tokens: tuple[tuple[str, str], ...] = ()  # modules before the pooling, on every token: kind and path
    dense: tuple[tuple[str, str], ...] = ()  # modules after it, or, in late interaction, on every token
    scores: bool = False  # the last of them gives a cross-encoder's scores
    normalize: bool = False  # after all of them
    prompts: Mapping[str, str] | None = None
    default_prompt_name: str | None = None
    similarity_fn_name: str = "cosine"
    truncate_dim: int | None = None
    settings: Settings = field(default_factory=Settings)  # of the network and its tokenizer
    activation_fn: str | None = None  # of a cross-encoder's scores
    sparse: SparseConfig | None = None  # of a sparse encoder (SPLADE) only
    late: Late | None = None  # of a late-interaction model only; its prompts are named "query" and "document"


def read_sentence_config(folder: Folder) -> SentenceConfig:
    """Raises CheckpointError, naming it, for an unknown module, pooling mode, similarity or setting."""
    found: dict[str, Any] = {}
    path = folder.root / "config_sentence_transformers.json"
    texts = folder.optional_json(path)
    model_type = texts.get("model_type")
    if model_type is not None and model_type not in _MODEL_TYPES:
        raise CheckpointError(f"{path}: model_type is {shown(model_type)}; known: {', '.join(_MODEL_TYPES)}")
    # PyLate's files have neither a module for the mask nor one for the norm; its older ones have no model_type.
    pylate = model_type == "ColBERT" or "query_prefix" in texts
    late = pylate or model_type == "MultiVectorEncoder"
    mask: dict[str, Any] = {}
    if pylate:
        words = texts.get("skiplist_words")
        mask["skiplist_words"] = list(string.punctuation) if words is None else words
    modules, own = folder.modules, own_settings(folder)
    if not modules and not late:  # sentence-transformers then reads neither file
        if told := [file.name for file, content in ((path, texts), own) if content]:
            warn(f"{folder.root} has no modules.json: what {' and '.join(told)} says doesn't count")
        return SentenceConfig()
    found["settings"] = settings = read_settings(folder, late)
    # Of everything that a module makes: the modules that it takes from the network's output on, in order.
    made: dict[str, tuple[tuple[str, str], ...]] = {}
    names = [module["name"] for module in modules if "name" in module]
    if len({str(name) for name in names}) < len(names):  # the last one of a name takes the place of the first there
        raise CheckpointError(f"modules.json: two modules have one name: {shown(names)}")
    sparse = found["sparse"] = None if late else read_sparse(folder, texts, own[1])
    for module in [] if sparse else modules:
        kind, place = module_kind(module), module.get("path", "")
        where = inside(folder.root, place, "modules.json")
        if kind == "Transformer" and module is modules[0]:
            made[settings.output] = ()
        elif kind == "Pooling" and not late:
            if any(step[0] == "Pooling" for step in _taken(made, "token_embeddings", kind, place)):
                raise CheckpointError("modules.json: Pooling of what was pooled before is not supported")
            made["sentence_embedding"] = (*made["token_embeddings"], (kind, place))
        elif kind == "Dense":
            source, target = _names(folder, where, "token_embeddings" if late else "sentence_embedding")
            made[target] = (*_taken(made, source, kind, place), (kind, place))
        elif kind == "LayerNorm" and not late:
            made["sentence_embedding"] = (*_taken(made, "sentence_embedding", kind, place), (kind, place))
        elif kind == "Dropout" and not late:
            _taken(made, "sentence_embedding", kind, place)  # nothing is dropped but in training
        elif kind == "Normalize":
            source, target = _names(folder, where, "sentence_embedding")
            if source in made:  # else it does nothing there, either
                made[target] = (*made[source], (kind, place))
        elif kind == "MultiVectorMask" and late:
            mask = folder.json(where / "config.json")
        else:
            raise _unknown(module, late)
    found |= {"model_type": model_type, **_texts(path, texts, late, model_type)}
    if sparse and texts.get("similarity_fn_name") is None:
        found["similarity_fn_name"] = "dot"  # SparseEncoder's default
    found["scores"] = not late and bool(made.get("scores")) and model_type != "SentenceTransformer"
    wanted = "token_embeddings" if late else "scores" if found["scores"] else "sentence_embedding"
    if len(modules) > 1 and not sparse and wanted not in made:
        raise CheckpointError(f"modules.json: none of its modules makes {wanted!r}: is one missing, such as Pooling?")
    steps = made.get(wanted, ())
    if steps and not late:
        kinds = [kind for kind, _ in steps]
        if "Pooling" not in kinds:
            raise CheckpointError(f"modules.json: {wanted!r} is made without Pooling, which is not supported")
        pooled = kinds.index("Pooling")
        found["pooling"] = _pooling(folder, folder.root / steps[pooled][1])
        found["on_tokens"], steps = steps[:pooled], steps[pooled + 1 :]
    while steps and steps[-1][0] == "Normalize":
        found["normalize"], steps = True, steps[:-1]
    found["dense"] = steps
    if late:
        found["normalize"] = pylate or found.get("normalize", False)
        try:
            found["late"] = _late(texts if pylate else {}, settings.late, mask)
        except CheckpointError as error:
            raise CheckpointError(f"{folder.root}: {error}") from None
    return SentenceConfig(**found)


def _unknown(module: Mapping[str, Any], late: bool) -> CheckpointError:
    own = "" if module_kind(module) else " (a class of its own: a repository's code is never run)"
    known = "Transformer, Dense, Normalize, " + ("MultiVectorMask" if late else "LayerNorm, Dropout, Pooling")
    name = shown(module.get("type"))
    return CheckpointError(f"modules.json: module {name}{own} is not supported; known: {known}")


def _taken(
    made: Mapping[str, tuple[tuple[str, str], ...]], name: str, kind: str, place: str
) -> tuple[tuple[str, str], ...]:
    if name not in made:
        raise CheckpointError(f"modules.json: {kind} ({place}) works on {shown(name)}, which no module before it makes")
    return made[name]


def _names(files: Folder, folder: Path, default: str) -> tuple[str, str]:
    """The name of the vectors that a Dense or Normalize module takes, and the name of those that it makes."""
    path = folder / "config.json"
    config = files.optional_json(path)
    source, target = config.get("module_input_name", default), config.get("module_output_name")
    target = source if target is None else target
    if not isinstance(source, str) or not isinstance(target, str):
        raise CheckpointError(
            f"{path}: the module's input and output are {shown((source, target))}; they must be names"
        )
    return source, target


def _pooling(files: Folder, folder: Path) -> Pooling:
    config = files.json(folder / "config.json")
    if config.keys() - _POOLING_KEYS:
        raise CheckpointError(
            f"{folder}: Pooling's {shown(sorted(config.keys() - _POOLING_KEYS))} is not known; known: "
            f"{', '.join(sorted(_POOLING_KEYS))}"
        )
    modes = config.get("pooling_mode")
    if modes is None:
        modes = [mode for mode, key in _OLD_POOLING_KEYS.items() if config.get(key)] or ["mean"]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not modes or any(mode not in list(POOLING) for mode in modes):
        raise CheckpointError(f"{folder}: pooling_mode {shown(modes)} is not supported; known: {', '.join(POOLING)}")
    return Pooling(tuple(modes), bool(config.get("include_prompt", True)))


def _texts(path: Path, config: dict[str, Any], late: bool, model_type: str | None) -> dict[str, Any]:
    """What config_sentence_transformers.json says that counts. `__version__` and `requirements` change no vector. Nor
    does `keep_in_fp32_modules`: modules after the network compute in fp32 in any case."""
    prompts = config.get("prompts") or {}
    if isinstance(prompts, dict):
        prompts = {name: "" if text is None else text for name, text in prompts.items()}
    if not isinstance(prompts, dict) or not all(isinstance(p, str) for p in prompts.values()):
        raise CheckpointError(f"{path}: prompts is {shown(prompts)}; it must map names to strings")
    prefixes = {task: config.get(f"{task}_prefix") or "" for task in ("query", "document") if late}
    if not all(isinstance(p, str) for p in prefixes.values()):
        raise CheckpointError(f"{path}: the prefixes of queries and documents are {shown(prefixes)}, no strings")
    for text in (*prompts.values(), *prefixes.values()):
        if text != text.encode(errors="replace").decode():
            raise CheckpointError(f"{path}: {shown(text)} is not valid Unicode")
    default = config.get("default_prompt_name")
    # Encoders always have these two; a cross-encoder has its own prompts only.
    usual = () if model_type == "CrossEncoder" else USUAL_PROMPTS
    if default is not None and default not in [*prompts, *usual]:
        raise CheckpointError(
            f"{path}: default_prompt_name {shown(default)} is not among the prompts {shown(sorted(prompts))}"
        )
    known = LATE_SIMILARITIES if late else SIMILARITIES
    similarity = config.get("similarity_fn_name") or known[0]
    # sentence-transformers, too, ignores a similarity that belongs to the other kind of model; in late interaction, any
    # other name (such as PyLate's "MaxSim").
    if similarity not in known and (late or similarity in LATE_SIMILARITIES):
        similarity = known[0]
    cut = config.get("truncate_dim")
    if cut is not None and (type(cut) is not int or cut < 1):
        raise CheckpointError(f"{path}: truncate_dim is {shown(cut)}; it must be null or a whole number from 1")
    return {
        "prompts": prompts | {task: p + prompts.get(task, "").removeprefix(p) for task, p in prefixes.items()},
        "default_prompt_name": default,
        "similarity_fn_name": similarity_name(similarity, known, CheckpointError, f"{path}: "),
        "truncate_dim": cut,
        "activation_fn": config.get("activation_fn"),
    }


def similarity_name(
    value: object, known: tuple[str, ...], error: type[ValueError] = OptionError, where: str = ""
) -> str:
    """The one of `known` that is meant. It may be given by its own name, by the name of sentence-transformers' function
    ("cos_sim"), or by a member of sentence-transformers' enumeration. None means the first of `known`. Raises `error`
    for anything else."""
    name = known[0] if value is None else getattr(value, "value", value)
    name = _SIMILARITY_ALIASES.get(name, name) if isinstance(name, str) else name
    if name not in list(known):
        raise error(f"{where}similarity_fn_name is {shown(value)}; known: {', '.join(known)}")
    return str(name)


def _late(pylate: dict[str, Any], own: Mapping[str, Any], mask: dict[str, Any]) -> Late:
    """pylate: config_sentence_transformers.json, if PyLate wrote it. own: the network's file, where
    sentence-transformers has the same settings. mask: the config of the module MultiVectorMask."""
    get = Reader({**pylate, **own})
    longest, padded, raw = _length(get, "query_length"), 0, get.mapping("query_expansion")
    if "query_expansion" not in get.raw and pylate and get.flag("do_query_expansion", True, strings=True):
        older = get.flag("attend_to_mask_tokens", False, strings=True)
        attends = get.flag("attend_to_expansion_tokens", older, strings=True)
        raw = {"strategy": "fixed", "attend": attends, "length": longest or 32}
    expansion = Reader(raw)
    if raw:
        padded = expansion.whole("length", 0)
        if longest is not None and longest < padded:
            raise CheckpointError(f"query_length is {longest}; it must be at least query_expansion's length, {padded}")
        longest = padded if expansion.choice("strategy", "", ("fixed", "min")) == "fixed" else longest
    if mask.get("keep_only_token_ids"):
        raise CheckpointError("keep_only_token_ids, for pictures, is not supported; it must be null")
    words, tasks = mask.get("skiplist_words") or [], mask.get("skiplist_tasks") or ["document"]
    for name, value in (("skiplist_words", words), ("skiplist_tasks", tasks)):
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise CheckpointError(f"{name} is {shown(value)}; it must be a list of strings")
    token = expansion.raw.get("token")
    if token is not None and not isinstance(token, str):
        raise CheckpointError(f"token of query_expansion is {shown(token)}; it must be a string or null")
    return Late(
        query_length=longest,
        document_length=_length(get, "document_length"),
        padded_length=padded,
        padding_token=token,
        attends=expansion.flag("attend", False),
        skiplist_words=tuple(words),
        skiplist_tasks=tuple(tasks),
        prefixes=tuple(filter(None, (pylate.get("query_prefix"), pylate.get("document_prefix")))),
    )


def _length(get: Reader, key: str) -> int | None:
    return None if get.raw.get(key) is None else get.whole(key, 1)


def length_limit(files: Folder, folder: Path, sentence: SentenceConfig, max_position_embeddings: int) -> int:
    """The repository's own limit; without one the smaller of the tokenizer's limit (1e30 in some files) and the
    model's. folder: the tokenizer's."""
    if sentence.settings.max_seq_length is not None:
        return sentence.settings.max_seq_length
    stored = files.optional_json(folder / "tokenizer_config.json", MAX_TOKENIZER_JSON_BYTES)
    limit = stored.get("model_max_length", stored.get("max_len"))  # its older name
    if isinstance(limit, (int, float)) and 0 < limit < max_position_embeddings:
        return int(limit)
    return max_position_embeddings
