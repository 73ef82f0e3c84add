"""modernbert-lite embed | rerank | fill-mask | info | doctor. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any, NoReturn

from . import __version__
from .reading import OptionError


class UsageError(Exception):
    """What the user typed can't be done as typed: exit status 2."""


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns 0, 1 for a failure, 2 for bad usage (130 for Ctrl-C); one line on stderr says why."""
    parser = _parser()
    args = parser.parse_args(argv)
    warnings.showwarning = _show_warning
    if isinstance(sys.stdout, io.TextIOWrapper):  # a character that a terminal can't show is no reason to fail
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        args.run(args)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt:
        return _fail(args, "interrupted", 130)
    except BrokenPipeError:  # `| head` has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (UsageError, OptionError) as error:
        return _fail(args, str(error), 2)
    except MemoryError:
        return _fail(args, "out of memory; a smaller --batch-tokens needs less", 1)
    except Exception as error:  # noqa: BLE001  a shell command prints no traceback
        return _fail(args, str(error) or type(error).__name__, 1)


def _fail(args: argparse.Namespace, message: str, status: int) -> int:
    if args.debug:
        traceback.print_exc()
    print("modernbert-lite: " + _plain(" ".join(message.split())), file=sys.stderr)
    return status


def _plain(text: str) -> str:
    """Without what a terminal would take for a command."""
    return "".join(c if c.isprintable() else repr(c)[1:-1] for c in text)


def _json(value: object, **options: Any) -> str:
    """JSON that is valid in whatever encoding standard output has."""
    return json.dumps(value, ensure_ascii=(sys.stdout.encoding or "").lower() not in ("utf-8", "utf8"), **options)


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    print(f"modernbert-lite: {message}", file=sys.stderr)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"modernbert-lite: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="modernbert-lite", description="ModernBERT embeddings, reranking and masked tokens.")
    parser.add_argument("--version", action="version", version=f"modernbert-lite {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Any, help: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=help, description=help)
        added.set_defaults(run=run)
        added.add_argument("--debug", action="store_true", help="show the traceback of a failure")
        return added

    embed = command("embed", _embed, "Texts to vectors.")
    embed.add_argument("texts", nargs="*", metavar="TEXT", help="texts; without any, --input or standard input")
    _add_input(embed)
    embed.add_argument("--output", "-o", type=Path, metavar="FILE", help="'-', the default, is standard output")
    embed.add_argument(
        "--format",
        choices=("jsonl", "npy", "npz"),
        help="default: by --output's ending, else jsonl (npz: 'embeddings')",
    )
    _add_model(embed, "default: the bundled 'tiny'")
    embed.add_argument("--prompt", help="put before every text")
    embed.add_argument("--prompt-name", help="one of the model's prompts (see info)")
    embed.add_argument("--normalize", action="store_true", help="vectors of unit length")
    embed.add_argument("--truncate-dim", type=_count, metavar="N", help="the first N dimensions")
    embed.add_argument(
        "--precision",
        choices=("float32", "float16", "int8", "uint8", "binary", "ubinary"),
        default="float32",
        help="default: float32; int8 and uint8 are cut by the range of all vectors, which are held in memory for it",
    )

    rerank = command("rerank", _rerank, "Documents by their relevance to a query, best first.")
    rerank.add_argument("query", metavar="QUERY")
    rerank.add_argument(
        "texts", nargs="*", metavar="DOCUMENT", help="documents; without any, --input or standard input"
    )
    _add_input(rerank)
    _add_model(rerank, "a reranker; default: the bundled embedding model's cosine similarity")
    rerank.add_argument("--top-k", type=_count, metavar="K", help="only the best K")
    rerank.add_argument("--format", choices=("table", "jsonl"), default="table", help="default: table")

    fill = command("fill-mask", _fill_mask, "The likeliest tokens for every [MASK] (in some models <mask>).")
    fill.add_argument("texts", nargs="*", metavar="TEXT", help="texts; without any, --input or standard input")
    _add_input(fill)
    _add_model(fill, "a masked language model", required=True)
    fill.add_argument("--top-k", type=_count, default=5, metavar="K", help="default: 5")
    fill.add_argument("--format", choices=("table", "jsonl"), default="table", help="default: table")

    info = command("info", _info, "What a checkpoint is.")
    info.add_argument("model", nargs="?", help="a folder, a hub id, or 'tiny' (the default)")
    info.add_argument("--json", action="store_true", help="as one JSON object")
    _add_hub(info)

    command("doctor", _doctor, "What this machine offers, and a self-check.")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1")
    return int(text)


def _add_input(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--input", "-i", metavar="FILE", help="a text a line (.txt) or a JSON object a line (.jsonl); '-' is stdin"
    )
    parser.add_argument("--input-format", choices=("txt", "jsonl"), help="default: by the file's ending, else txt")
    parser.add_argument("--field", default="text", metavar="NAME", help="the field of jsonl input; default: text")


def _add_model(parser: argparse.ArgumentParser, help: str, required: bool = False) -> None:
    parser.add_argument("--model", "-m", required=required, help=f"a folder or hub id; {help}")
    _add_hub(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ..; default: CUDA if there is one")
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16", "int8"), help="default: by the device")
    parser.add_argument("--max-seq-length", type=_count, metavar="N", help="instead of the model's own")
    parser.add_argument("--batch-tokens", type=_count, metavar="N", help="in a batch; default: by the device")
    parser.add_argument("--threads", type=_count, metavar="N", help="of the processor; default: all it may use")
    parser.add_argument("--on-long", choices=("truncate", "error"), default="truncate", help="default: truncate")


def _add_hub(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="a branch, tag or commit on the hub")
    parser.add_argument("--local-files-only", action="store_true", help="never ask the network")


def _options(args: argparse.Namespace) -> dict[str, Any]:
    names = ("device", "dtype", "revision", "local_files_only", "max_seq_length", "batch_tokens", "threads", "on_long")
    return {name: getattr(args, name) for name in names}


# ---- reading -------------------------------------------------------------------------------------------------------


def _read(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Records with the text under args.field: of arguments, a file (checked whole before it is used, so that a bad
    line is found before hours of work, not after), or standard input."""
    if args.texts:
        if args.input:
            raise UsageError("texts were given both as arguments and by --input; give one of them")
        args.field = "text"
        return [{"text": text} for text in args.texts]
    if args.input in (None, "-"):
        if args.input is None and sys.stdin.isatty():
            raise UsageError("no texts: give them as arguments, by --input FILE, or on standard input")
        return _records(sys.stdin.buffer, args, "standard input")
    path = Path(args.input)
    if not path.exists() or path.is_dir():
        raise UsageError(f"--input {args.input}: {'it is a folder' if path.is_dir() else 'there is no such file'}")
    if path.is_file():  # a pipe can be read only once
        for _ in _file_records(path, args):
            pass
    return _file_records(path, args)


def _file_records(path: Path, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    with path.open("rb") as file:
        yield from _records(file, args, args.input)


def _records(file: IO[bytes], args: argparse.Namespace, name: str) -> Iterator[dict[str, Any]]:
    is_json = args.input_format == "jsonl" or (args.input_format is None and name.endswith((".jsonl", ".ndjson")))
    for number, raw in enumerate(file, 1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}, line {number}: not UTF-8 ({error.reason} at byte {error.start})") from None
        if not is_json:
            if args.field != "text":
                raise UsageError(f"--field {args.field} needs jsonl input; {name} is read as plain text")
            yield {"text": line}
        elif line.strip():
            yield _json_record(line, args.field, f"{name}, line {number}")


def _json_record(line: str, field: str, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{where}: not valid JSON: {error}") from None
    if not isinstance(record, dict) or not isinstance(record.get(field), str):
        kind = type(record.get(field)).__name__ if isinstance(record, dict) and field in record else "missing"
        got = f"its {field!r} is {kind}" if isinstance(record, dict) else "it is no object"
        raise ValueError(f"{where}: {got}; an object with a string in {field!r} is needed (see --field)")
    return record


# ---- commands ------------------------------------------------------------------------------------------------------


def _embed(args: argparse.Namespace) -> None:
    args.output = None if args.output == Path("-") else args.output
    format = args.format or (args.output.suffix[1:].lower() if args.output else "jsonl")
    if format not in ("jsonl", "npy", "npz"):
        raise UsageError(f"--output {args.output}: its ending names no format; add --format jsonl, npy or npz")
    if format != "jsonl" and args.output is None and sys.stdout.isatty():
        raise UsageError(f"{format} is binary: give --output, or send standard output to a file or a program")
    if args.output is not None and not args.output.absolute().parent.is_dir():
        raise UsageError(f"--output {args.output}: there is no such folder")
    if args.output is not None and args.output.exists() and not args.output.is_file():
        raise UsageError(f"--output {args.output}: it is no regular file; send standard output there instead")
    records = _read(args)
    from .embedder import Embedder
    from .pooling import quantize_embeddings
    from .writers import VectorWriter

    with VectorWriter(args.output, format) as writer:
        model = Embedder.from_pretrained(args.model, truncate_dim=args.truncate_dim, **_options(args))
        waiting: list[dict[str, Any]] = []

        def texts() -> Iterator[str]:
            for record in records:
                if format == "jsonl":
                    waiting.append(record)
                yield record[args.field]

        options = {"prompt": args.prompt, "prompt_name": args.prompt_name, "normalize_embeddings": args.normalize}
        if args.precision in ("int8", "uint8"):  # cut by the range of all vectors, so there is nothing to write before
            blocks: Iterable[Any] = [model.encode(texts(), precision=args.precision, **options)]
        else:
            blocks = (quantize_embeddings(block, args.precision) for block in model.stream(texts(), **options))
        for block in blocks:
            writer.write(waiting[: len(block)], block)
            del waiting[: len(block)]
        if not writer.rows:
            writer.write([], model.encode([], precision=args.precision))


def _rerank(args: argparse.Namespace) -> None:
    documents = [record[args.field] for record in _read(args)]
    results: list[dict[str, Any]]
    if args.model is None:
        from .embedder import Embedder
        from .reranker import ranked

        embedder = Embedder.from_pretrained(**_options(args))
        print("modernbert-lite: no --model: ranking by its cosine similarity, no cross-encoder", file=sys.stderr)
        scores = embedder.similarity(embedder.encode_query(args.query), embedder.encode_document(documents))[0]
        results = ranked(scores, documents, args.top_k, True)
    else:
        from .reranker import Reranker

        reranker = Reranker.from_pretrained(args.model, **_options(args))
        results = reranker.rank(args.query, documents, top_k=args.top_k, return_documents=True)
    if args.format == "jsonl":
        for result in results:
            print(_json(result))
        return
    _table(
        ["rank", "score", "document", "text"],
        [[str(i), f"{r['score']:.4f}", str(r["corpus_id"]), _one_line(r["text"])] for i, r in enumerate(results, 1)],
    )


def _fill_mask(args: argparse.Namespace) -> None:
    texts = [record[args.field] for record in _read(args)]
    from .fill_mask import FillMask

    predictions = FillMask.from_pretrained(args.model, **_options(args)).predict(texts, top_k=args.top_k)
    if args.format == "jsonl":
        for text, masks in zip(texts, predictions, strict=True):
            print(_json({"text": text, "masks": masks}))
        return
    _table(
        ["text", "mask", "token", "probability"],
        [
            [str(t), str(m), repr(p["token"]), f"{p['score']:.4f}"]
            for t, masks in enumerate(predictions)
            for m, tokens in enumerate(masks)
            for p in tokens
        ],
    )


def _info(args: argparse.Namespace) -> None:
    from .describe import describe

    facts = describe(args.model or "tiny", revision=args.revision, local_files_only=args.local_files_only)
    if args.json:
        print(_json(facts, indent=2))
    else:
        _table(["what", "value"], [[key, str(value)] for key, value in facts.items()])


def _doctor(args: argparse.Namespace) -> None:
    from .describe import machine, self_check

    _table(["what", "value"], [[key, str(value)] for key, value in machine().items()])
    print(self_check())


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else line[:99] + "…"


def _table(header: list[str], rows: list[list[str]]) -> None:
    rows = [[_plain(cell) for cell in row] for row in rows]
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, *rows]:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
