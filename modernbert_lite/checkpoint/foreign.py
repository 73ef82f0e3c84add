"""What a folder may hold instead of a network's safetensors: adapters, pickles, other formats. None of these files is
read. The errors name what is there, and say how to make safetensors from it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from ..reading import CheckpointError, cached_repo, is_there, optional_json, printable, shown

# PEFT's files. The first is what transformers and sentence-transformers look for.
ADAPTER = ("adapter_config.json", "adapter_model.safetensors", "adapter_model.bin")
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_OTHERS = (".safetensors", ".onnx", ".gguf", ".h5", ".msgpack", ".xml", ".tflite", ".npz", ".mlpackage", ".ot")
_NO_WEIGHTS = ("training_args.bin", "optimizer.pt", "scheduler.pt", "scaler.pt", "rng_state.pth")
_LISTED = 8

# clone: tied tensors share memory, which safetensors refuses. state_dict: in files of Lightning.
_CONVERT = (
    'Convert it once, in its folder: python -c "import glob, torch, safetensors.torch as s; s.save_file({{k: v.clone() '
    "for f in glob.glob('{}') for d in [torch.load(f, weights_only=True)] for k, v in d.get('state_dict', d).items()}}"
    ", 'model.safetensors')\""
)
# The adapter's files go first: transformers applies an adapter that it finds beside the base.
_MERGE = (
    "python -c \"import pathlib, peft, transformers; p = pathlib.Path('adapter'); p.mkdir(exist_ok=True); "
    "[f.rename(p / f.name) for f in pathlib.Path().glob('adapter_*')]; b = transformers.{}.from_pretrained('{}'); "
    "peft.PeftModel.from_pretrained(b, 'adapter').merge_and_unload().save_pretrained('{}')\""
)
_CLASSES = {"SEQ_CLS": "AutoModelForSequenceClassification", "TOKEN_CLS": "AutoModelForTokenClassification"}


def adapter_files(root: Path, network: Path) -> list[Path]:
    """PEFT's files in a checkpoint's folder `root`, and in the folder of its network."""
    return [folder / name for folder in dict.fromkeys((network, root)) for name in ADAPTER if is_there(folder / name)]


def no_adapter(path: Path, network: Path, *, whole: bool) -> CheckpointError:
    """The error for an adapter at `path`. It names the base model, and the command that merges the two. whole: the
    folder `network` holds the base model, too."""
    folder = path.parent
    settings = optional_json(folder / ADAPTER[0])
    base, class_name = settings.get("base_model_name_or_path"), settings.get("auto_mapping")
    # The adapter must be merged in the class that it was trained in: its tensors have the names of that class.
    class_name = class_name.get("base_model_class") if isinstance(class_name, dict) else None
    if not (isinstance(class_name, str) and class_name.isidentifier()):
        class_name = _CLASSES.get(str(settings.get("task_type")), "AutoModel")
    at = _plain(network.relative_to(folder).as_posix() if network.is_relative_to(folder) else ".", ".")
    merge = _MERGE.format(class_name, at if whole else _plain(base, "BASE"), at)
    repo = cached_repo(folder)
    where = f"copy the repository (hf download {repo} --local-dir FOLDER), and run in the copy" if repo else "run there"
    return CheckpointError(
        f"{folder} holds a PEFT adapter ({path.name}){'' if base is None else f' for {shown(base)}'}"
        f"{'' if whole else ', and no weights of a whole model'}. Adapters are not applied here. To merge it into its "
        f"base once, {where}: {merge}. To go without it, move adapter_* elsewhere"
    )


def no_weights(where: str, files: Iterable[Path]) -> CheckpointError:
    """The error for a folder or repository without model.safetensors. It names the files that may be weights. files:
    paths relative to the folder."""
    found = sorted((f for f in files if f.suffix in _PICKLES + _OTHERS), key=lambda f: (len(f.parts), f.as_posix()))
    more = f" and {len(found) - _LISTED} more" if len(found) > _LISTED else ""
    told = f"it has only {', '.join(printable(f.as_posix(), 80) for f in found[:_LISTED])}{more}" if found else ""
    pickled = [f.name for f in found if len(f.parts) == 1 and f.suffix in _PICKLES and f.name not in _NO_WEIGHTS]
    named = [f for f in found if f.suffix == ".safetensors"]
    if pickled:
        first = min(pickled, key=lambda name: not name.startswith("pytorch_model"))
        every = re.sub(r"-\d+-of-\d+(?=\.)", "-*-of-*", first)  # the shards of one model
        todo = "pickle files can run code and are never read. "
        todo += _CONVERT.format(every if re.fullmatch(r"[\w.*-]+", every) else "FILE")
    elif named:
        todo = f"if {printable(named[0].as_posix(), 80)} holds the whole model, give it that name (a link will do)"
    elif found:
        todo = "only safetensors are read: take those of its repository, or of the model that it was made from"
    else:
        told, todo = "it has no weights at all", "was the checkpoint copied or downloaded whole?"
    return CheckpointError(f"no model.safetensors in {where}: {told}; {todo}")


def _plain(name: object, otherwise: str) -> str:
    """A name in a form that is safe in a command that the reader will run."""
    return name if isinstance(name, str) and re.fullmatch(r"[\w./@+ -]+", name) else otherwise
