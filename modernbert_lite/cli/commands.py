"""modernbert-lite embed | rerank | fill-mask | info | doctor. Nothing heavy is imported before a command runs."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

from .. import __version__
from ..reading import DTYPES, INPUT_FORMATS, ON_LONG, OUTPUT_FORMATS, PRECISIONS, OptionError, shown
from . import console


def main(argv: list[str] | None = None) -> int:
    """Runs a command. Returns 0; 1 for a failure; 2 for bad usage; 128 + its number for a signal (130 for Ctrl-C, 143
    for SIGTERM, 129 for SIGHUP). One line on stderr says why. Raises SystemExit as argparse does."""
    with console.quiet_streams(), console.stoppable():
        try:
            status = _run(argv)
        except console.Stopped as error:  # while a failure was being reported
            status = error.status
    if argv is None:
        console.end_quietly()
    return status


def _run(argv: list[str] | None) -> int:
    parser = _parser()
    try:
        args = parser.parse_args(argv)
    except SystemExit as end:
        if end.code == 0:  # --help, --version
            args = argparse.Namespace(run=lambda _: console.check_stdout(), debug=False)
        else:
            raise
    try:
        try:
            args.run(args)
        except Exception:
            console.check_signals()
            raise
        if sys.stdout is not None:
            sys.stdout.flush()
        return 0
    except KeyboardInterrupt as error:
        return _fail(args, str(error) or "interrupted", getattr(error, "status", 130))
    except BrokenPipeError as error:
        console.hold()
        if getattr(args, "output", None) is not None:  # of a network, say
            return _fail(args, str(error), 1)
        console.silence(sys.stdout)  # `| head` has seen enough
        return 1
    except OptionError as error:
        return _fail(args, _without_advice(error), 2)
    except MemoryError:
        return _fail(args, "out of memory; a smaller --batch-tokens needs less", 1)
    except Exception as error:  # noqa: BLE001  a shell command prints no traceback
        return _fail(args, _without_advice(error) or type(error).__name__, 1)


def _without_advice(error: Exception) -> str:
    """The message without its advice for Python users, see inputs.keeping."""
    return str(error).removesuffix(getattr(error, "advice", ""))


def _fail(args: argparse.Namespace, message: str, status: int) -> int:
    console.hold()
    if args.debug:
        traceback.print_exc()
    console.say(message)
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        console.silence(sys.stdout)
    return status


def _json(value: object, **options: Any) -> str:
    """JSON that is valid in standard output's encoding."""
    is_utf8 = (sys.stdout.encoding or "").lower() in ("utf-8", "utf8")
    try:
        return json.dumps(value, ensure_ascii=not is_utf8, allow_nan=False, **options)
    except ValueError:
        raise ValueError("the result holds NaN or infinity, which JSON has no word for") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        console.say(f"{message} (see {self.prog} --help)")
        self.exit(2)


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
    _add_texts(embed, "TEXT")
    embed.add_argument("--output", "-o", type=Path, metavar="FILE", help="'-', the default, is standard output")
    embed.add_argument(
        "--format",
        choices=OUTPUT_FORMATS,
        help="default: by --output's ending, else jsonl (npz: 'embeddings')",
    )
    _add_model(embed, "default: the bundled 'tiny'")
    embed.add_argument("--prompt", type=_text, help="put before every text")
    embed.add_argument("--prompt-name", type=_text, help="one of the model's prompts (see info)")
    embed.add_argument("--normalize", action="store_true", help="vectors of unit length")
    embed.add_argument("--truncate-dim", type=_count, metavar="N", help="the first N dimensions")
    embed.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="default: float32; int8 and uint8 are cut by the range of all vectors, which are held in memory for it",
    )

    rerank = command("rerank", _rerank, "Documents by their relevance to a query, best first.")
    rerank.add_argument("query", type=_text, metavar="QUERY")
    _add_texts(rerank, "DOCUMENT")
    _add_model(rerank, "a reranker; default: the bundled embedding model's cosine similarity")
    rerank.add_argument("--top-k", type=_count, metavar="K", help="only the best K")
    rerank.add_argument("--format", choices=("table", "jsonl"), default="table", help="default: table")

    fill = command("fill-mask", _fill_mask, "The likeliest tokens for every [MASK] (in some models <mask>).")
    _add_texts(fill, "TEXT")
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
    if not text.isdecimal() or len(text) > 10 or not 0 < int(text) < 1 << 31:
        raise argparse.ArgumentTypeError(f"{shown(text)} is no whole number from 1 to {(1 << 31) - 1}")
    return int(text)


def _text(argument: str) -> str:
    """An argument, which is bytes, as a text: UTF-8 in every locale (C and POSIX too)."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeError:
        raise argparse.ArgumentTypeError(f"{shown(argument)} is not UTF-8") from None


def _add_texts(parser: argparse.ArgumentParser, metavar: str) -> None:
    help = f"{metavar.lower()}s; without any, --input or standard input"
    parser.add_argument("texts", nargs="*", type=_text, metavar=metavar, help=help)
    parser.add_argument(
        "--input",
        "-i",
        metavar="FILE",
        help="by its ending: a JSON object a line (.jsonl), a table with a header (.csv, .tsv), one JSON array, read "
        "whole (.json), else a text a line; '-' is stdin",
    )
    parser.add_argument("--input-format", choices=INPUT_FORMATS, help="default: by the file's ending; of stdin: txt")
    parser.add_argument(
        "--field",
        type=_text,
        default="text",
        metavar="NAME",
        help="what has the text: a column, or a field of JSON; default: text",
    )


def _add_model(parser: argparse.ArgumentParser, help: str, required: bool = False) -> None:
    parser.add_argument("--model", "-m", required=required, help=f"a folder or hub id; {help}")
    _add_hub(parser)
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ..; default: CUDA if there is one")
    parser.add_argument("--dtype", choices=DTYPES, help="default: by the device")
    parser.add_argument("--max-seq-length", type=_count, metavar="N", help="instead of the model's own")
    parser.add_argument("--batch-tokens", type=_count, metavar="N", help="in a batch; default: by the device")
    parser.add_argument("--threads", type=_count, metavar="N", help="of the processor; default: all it may use")
    parser.add_argument("--on-long", choices=ON_LONG, default="truncate", help="default: truncate")


def _add_hub(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", help="a branch, tag or commit on the hub")
    parser.add_argument("--local-files-only", action="store_true", help="never ask the network")


def _open(kind: Any, args: argparse.Namespace, **own: Any) -> Any:
    """A model of the class `kind`."""
    names = ("device", "dtype", "revision", "local_files_only", "max_seq_length", "batch_tokens", "threads", "on_long")
    model = kind.from_pretrained(args.model, **{name: getattr(args, name) for name in names}, **own)
    console.check_signals()
    return model


# ---- reading ----


def _read(args: argparse.Namespace) -> Iterable[dict[str, Any]]:
    """Records that have the text under args.field: from arguments, a file, or standard input. A file is checked whole
    before it is used, so that a bad line is found before hours of work."""
    from .inputs import format_of, records

    if args.texts:
        if args.input is not None:
            raise OptionError("texts were given both as arguments and by --input; give one of them")
        if args.field != "text" or args.input_format is not None:
            raise OptionError("--field and --input-format are for --input and standard input, not for arguments")
        return [{"text": text} for text in args.texts]
    if args.input in (None, "-"):
        if sys.stdin is None:
            raise OptionError("no texts: standard input is closed; give them as arguments or by --input FILE")
        if args.input is None and sys.stdin.isatty():
            raise OptionError("no texts: give them as arguments, by --input FILE, or on standard input")
        return records(sys.stdin.buffer, args.input_format or "txt", args.field, "standard input")
    path = Path(args.input)
    if not path.exists() or path.is_dir():
        raise OptionError(f"--input {args.input}: {'it is a folder' if path.is_dir() else 'there is no such file'}")
    if path.is_block_device():
        raise OptionError(f"--input {args.input}: it is a device; give a file, or a pipe")
    format = format_of(args.input, args.input_format)

    def read() -> Iterator[dict[str, Any]]:
        with path.open("rb") as file:
            yield from records(file, format, args.field, args.input)

    if path.is_file():  # a pipe can be read only once
        for _ in read():
            pass
    return read()


# ---- commands ----


def _embed(args: argparse.Namespace) -> None:
    args.output = None if args.output == Path("-") else args.output
    format = args.format or (args.output.suffix[1:].lower() if args.output else "jsonl")
    if format not in OUTPUT_FORMATS:
        raise OptionError(
            f"--output {args.output}: its ending names no format; add --format, one of {', '.join(OUTPUT_FORMATS)}"
        )
    if format == "jsonl" and args.field == "embedding":
        raise OptionError("--field embedding: jsonl output has the vector there; rename the field, or write npy")
    if args.output is None:
        console.check_stdout()
    if args.output is None and not hasattr(sys.stdout, "buffer"):
        raise OptionError("standard output is a stream of text only: give --output")
    if format != "jsonl" and args.output is None and sys.stdout.isatty():
        raise OptionError(f"{format} is binary: give --output, or send standard output to a file or a program")
    if args.output is not None and not args.output.absolute().parent.is_dir():
        raise OptionError(f"--output {args.output}: there is no such folder")
    if args.output is not None and args.output.exists() and not args.output.is_file():
        raise OptionError(f"--output {args.output}: it is no regular file; send standard output there instead")
    records = _read(args)
    from ..embedder import Embedder
    from ..pipeline.vectors import quantize_embeddings
    from .writers import VectorWriter

    with VectorWriter(args.output, format) as writer:
        model = _open(Embedder, args, truncate_dim=args.truncate_dim)
        waiting: list[dict[str, Any]] = []

        def texts() -> Iterator[str]:
            for record in records:
                console.check_signals()
                if format == "jsonl":
                    waiting.append(record)
                yield record[args.field]

        options = {"prompt": args.prompt, "prompt_name": args.prompt_name, "normalize_embeddings": args.normalize}
        if args.precision in ("int8", "uint8"):  # cut by the range of all vectors: nothing is written before the last
            blocks: Iterable[Any] = [_cut_by_range(args, model, texts(), options, waiting, writer)]
        else:
            blocks = (
                quantize_embeddings(block, args.precision, first=writer.rows)
                for block in model.stream(texts(), **options)
            )
        for block in blocks:
            writer.write(waiting[: len(block)], block)
            del waiting[: len(block)]
        if not writer.rows:
            writer.write([], model.encode([], precision=args.precision))


def _cut_by_range(
    args: argparse.Namespace,
    model: Any,
    texts: Iterator[str],
    options: dict[str, Any],
    waiting: list[dict[str, Any]],
    writer: Any,
) -> Any:
    """All vectors in int8 or uint8. After a failure the range of all vectors is unknown, so the finished rows go to
    NAME.partial in float32. (They don't go to standard output, whose reader expects whole numbers.)"""
    from ..pipeline.vectors import quantize_embeddings

    vectors: Any = ()
    try:
        vectors = model.encode(texts, **options)
        if len(vectors) != 1:
            return quantize_embeddings(vectors, args.precision)
    except BaseException as error:
        vectors = getattr(error, "finished", vectors)
        if args.output is not None and len(vectors):
            with suppress(Exception):  # a full disk, say: the first error is the one to tell
                writer.write(waiting[: len(vectors)], vectors)
                console.say(f"what is finished is kept in float32: {args.precision} needs the range of all vectors")
        raise
    raise OptionError(
        f"--precision {args.precision}: one text has no range to be cut by; give two or more, or another precision"
    )


def _rerank(args: argparse.Namespace) -> None:
    console.check_stdout()
    documents = [record[args.field] for record in _read(args)]
    if args.model is None:
        from ..embedder import Embedder
        from ..reranker import ranked

        embedder = _open(Embedder, args)
        console.say("no --model: ranking by its cosine similarity, no cross-encoder")
        scores = embedder.similarity(embedder.encode_query(args.query), embedder.encode_document(documents))[0]
        results = ranked(scores, documents, args.top_k, True)
    else:
        from ..reranker import Reranker

        reranker = _open(Reranker, args)
        results = reranker.rank(args.query, documents, top_k=args.top_k, return_documents=True)
    if args.format == "jsonl":
        for result in results:
            print(_json(result))
        return
    console.table(
        ["rank", "score", "document", "text"],
        [[str(i), f"{r['score']:.4f}", str(r["corpus_id"]), _one_line(r["text"])] for i, r in enumerate(results, 1)],
    )


def _fill_mask(args: argparse.Namespace) -> None:
    console.check_stdout()
    texts = [record[args.field] for record in _read(args)]
    from ..fill_mask import FillMask

    predictions = _open(FillMask, args).predict(texts, top_k=args.top_k)
    if args.format == "jsonl":
        for text, masks in zip(texts, predictions, strict=True):
            print(_json({"text": text, "masks": masks}))
        return
    console.table(
        ["text", "mask", "token", "probability"],
        [
            [str(t), str(m), repr(p["token"]), f"{p['score']:.4f}"]
            for t, masks in enumerate(predictions)
            for m, tokens in enumerate(masks)
            for p in tokens
        ],
    )


def _info(args: argparse.Namespace) -> None:
    console.check_stdout()
    from .about import describe

    facts = describe(args.model or "tiny", revision=args.revision, local_files_only=args.local_files_only)
    if args.json:
        print(_json(facts, indent=2))
    else:
        console.table(["what", "value"], [[key, str(value)] for key, value in facts.items()])


def _doctor(args: argparse.Namespace) -> None:
    console.check_stdout()
    from .about import machine, self_check

    console.table(["what", "value"], [[key, str(value)] for key, value in machine().items()])
    print(self_check())


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 100 else line[:99] + "…"
