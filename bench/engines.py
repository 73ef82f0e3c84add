"""The engines that bench_cpu measures beside us, and the checkpoint that all of them read."""

from __future__ import annotations

import functools
import json
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parents[1]
TOKENIZER = ROOT / "tests" / "data" / "modernbert-tokenizer"
OURS, REFERENCE = "modernbert-lite", "transformers"
DTYPES = ("float32", "bfloat16", "int8")
ONNX = ("onnx", "onnxscript")
# provider -> (dtypes, the packages that it needs)
PROVIDERS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    OURS: (DTYPES, ()),
    REFERENCE: (("float32", "bfloat16"), ()),  # without it there is no checkpoint at all
    "sentence-transformers": (("float32",), ("sentence-transformers",)),
    "onnxruntime": (("float32", "int8"), ("onnxruntime", *ONNX)),
    "openvino": (("float32", "bfloat16"), ("openvino", *ONNX)),
}
SMOKE = {
    "hidden_size": 96,
    "intermediate_size": 144,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "vocab_size": 50_368,
    "local_attention": 16,
}


class Engine(NamedTuple):
    """prepare(texts, rows) -> inputs; run(inputs) -> outputs, timed; hidden(outputs, inputs) -> (T, C) float32."""

    prepare: Callable[[list[list[int]], int], Any]
    run: Callable[[Any], Any]
    hidden: Callable[[Any, Any], Any]


def padded(texts: list[list[int]], rows: int) -> list[tuple[Any, Any]]:
    """[(ids, mask)], int64 (rows, longest of them)."""
    import numpy as np

    batches = []
    for i in range(0, len(texts), rows):
        batch = texts[i : i + rows]
        shape = len(batch), max(map(len, batch))
        ids, mask = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
        for row, text in enumerate(batch):
            ids[row, : len(text)], mask[row, : len(text)] = text, 1
        batches.append((ids, mask))
    return batches


def real_tokens(outputs: list[Any], inputs: list[tuple[Any, Any]]) -> Any:
    import numpy as np

    return np.concatenate([np.asarray(o, dtype=np.float32)[m == 1] for o, (_, m) in zip(outputs, inputs, strict=True)])


def load_ours(folder: Path, dtype: str, threads: int) -> Engine:
    import torch

    import modernbert_lite

    torch.set_num_threads(threads)
    model = modernbert_lite.load_model(folder / "checkpoint", device="cpu", dtype=dtype)

    def run(batch: Any) -> Any:
        with torch.inference_mode():
            return model(batch)

    return Engine(lambda texts, rows: modernbert_lite.pack(texts), run, lambda out, _: out.float().numpy())


def torch_engine(call: Callable[[Any, Any], Any], threads: int) -> Engine:
    """call(ids, mask) -> (rows, length, C)"""
    import torch

    torch.set_num_threads(threads)

    def prepare(texts: list[list[int]], rows: int) -> Any:
        return [(torch.from_numpy(ids), torch.from_numpy(mask)) for ids, mask in padded(texts, rows)]

    def run(inputs: Any) -> Any:
        with torch.inference_mode():
            return [call(*batch) for batch in inputs]

    def hidden(outputs: Any, inputs: Any) -> Any:
        return real_tokens([o.float().numpy() for o in outputs], [(i, m.numpy()) for i, m in inputs])

    return Engine(prepare, run, hidden)


def load_transformers(folder: Path, dtype: str, threads: int) -> Engine:
    import torch
    from transformers import ModernBertModel

    model = ModernBertModel.from_pretrained(
        folder / "checkpoint", dtype=getattr(torch, dtype), attn_implementation="sdpa"
    ).eval()
    return torch_engine(lambda ids, mask: model(input_ids=ids, attention_mask=mask).last_hidden_state, threads)


def load_sentence_transformers(folder: Path, dtype: str, threads: int) -> Engine:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder / "checkpoint"), device="cpu").eval()  # a bare checkpoint: mean pooling

    def call(ids: Any, mask: Any) -> Any:
        return model({"input_ids": ids, "attention_mask": mask})["token_embeddings"]

    return torch_engine(call, threads)


def load_onnxruntime(folder: Path, dtype: str, threads: int) -> Engine:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    path = folder / ("int8" if dtype == "int8" else "onnx") / "model.onnx"
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(inputs: Any) -> Any:
        return [session.run(None, {"input_ids": ids, "attention_mask": mask})[0] for ids, mask in inputs]

    return Engine(padded, run, real_tokens)


def load_openvino(folder: Path, dtype: str, threads: int) -> Engine:
    import openvino

    core = openvino.Core()
    wanted = {"INFERENCE_PRECISION_HINT": {"float32": "f32", "bfloat16": "bf16"}[dtype]}
    wanted |= {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": str(threads)}
    model = core.compile_model(core.read_model(folder / "onnx" / "model.onnx"), "CPU", wanted)
    request = model.create_infer_request()

    def run(inputs: Any) -> Any:
        feeds = ({"input_ids": ids, "attention_mask": mask} for ids, mask in inputs)
        return [request.infer(feed, share_inputs=True)[0] for feed in feeds]

    return Engine(padded, run, real_tokens)


LOADERS = {
    OURS: load_ours,
    REFERENCE: load_transformers,
    "sentence-transformers": load_sentence_transformers,
    "onnxruntime": load_onnxruntime,
    "openvino": load_openvino,
}


def worker(provider: str, dtype: str, folder: str, threads: str) -> int:
    """Answers each line of JSON with one: {"texts", "rows", "save"} is a case, run once and kept; {"turn": seconds}
    runs it again and again."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer

    def say(**answer: Any) -> None:
        print(json.dumps(answer | {"peak_mb": peak_mb()}), file=answers, flush=True)

    inputs: Any = None
    try:
        engine = LOADERS[provider](Path(folder), dtype, int(threads))
        say()
        for line in sys.stdin:
            command = json.loads(line)
            if "texts" in command:
                inputs = engine.prepare(command["texts"], command["rows"])
                outputs = engine.run(inputs)
                if command["save"]:
                    import numpy as np

                    np.save(command["save"], engine.hidden(outputs, inputs))
                del outputs
                say()
            else:
                say(seconds=statistics.median(calls(functools.partial(engine.run, inputs), command["turn"])))
    except Exception as error:  # noqa: BLE001  a peer's loss, of whatever kind, is a note in its row
        print(f"{provider} {dtype}:", file=sys.stderr)
        sys.excepthook(type(error), error, error.__traceback__)
        text = (str(error).strip().splitlines() or [""])[0]
        say(error=f"{type(error).__name__}: {text}"[:200])
        return 1
    return 0


def calls(run: Callable[[], Any], seconds: float) -> Iterator[float]:
    """Seconds of each call, one at least, until they make up `seconds`."""
    spent = 0.0
    while not spent or spent < seconds:
        begin = time.perf_counter()
        run()
        took = time.perf_counter() - begin
        spent += took
        yield took


def peak_mb() -> float:
    """This process's peak of resident memory, 10^6 bytes."""
    try:
        # Not getrusage: a process inherits there what the one that started it had.
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024 / 1e6
    except (OSError, IndexError):
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


# ---- what they all read ----


def make_checkpoint(to: Path, smoke: bool) -> None:
    import torch
    from transformers import ModernBertConfig, ModernBertModel

    torch.manual_seed(0)
    ModernBertModel(ModernBertConfig(**(SMOKE if smoke else {}))).save_pretrained(to)
    for path in TOKENIZER.iterdir():  # sentence-transformers opens no folder without one
        if path.name != "config.json":
            shutil.copy(path, to)


def make_onnx(to: Path, smoke: bool) -> None:
    import torch
    from transformers import ModernBertModel

    model = ModernBertModel.from_pretrained(to.parent / "checkpoint", attn_implementation="sdpa").eval()

    class Network(torch.nn.Module):
        def forward(self, input_ids: Any, attention_mask: Any) -> Any:
            return model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state

    ids, mask = torch.arange(2 * 96).view(2, 96), torch.ones(2, 96, dtype=torch.int64)
    mask[1, 50:] = 0
    sizes = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    torch.onnx.export(
        Network().eval(), (ids, mask), str(to / "model.onnx"), dynamo=True, verbose=False,
        input_names=["input_ids", "attention_mask"], output_names=["last_hidden_state"],
        dynamic_shapes={"input_ids": sizes, "attention_mask": sizes},
    )  # fmt: skip


def make_int8(to: Path, smoke: bool) -> None:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    source = to.parent / "onnx" / "model.onnx"
    quantize_dynamic(source, to / "model.onnx", per_channel=True, weight_type=QuantType.QInt8)


MAKERS = {"checkpoint": make_checkpoint, "onnx": make_onnx, "int8": make_int8}


MAKERS = {"checkpoint": make_checkpoint, "onnx": make_onnx, "int8": make_int8}


def make(name: str, folder: str, smoke: str) -> int:
    """One of MAKERS, in a process of its own."""
    new = Path(folder) / f"{name}.new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    MAKERS[name](new, smoke == "smoke")
    new.rename(Path(folder) / name)  # so that what is there is whole
    return 0
