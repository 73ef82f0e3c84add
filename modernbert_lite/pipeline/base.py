"""What all classes share: how they are opened, and their settings."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from ..batch import CPU_BATCH_TOKENS, GPU_BATCH_TOKENS
from ..checkpoint.open import Checkpoint
from ..models.registry import encoder_of, network_class
from ..ops.graphs import MAX_TOKENS, Graphed
from ..ops.threads import bound_tokenizer, set_threads
from ..reading import ON_LONG, OptionError, as_whole, one_of, shown, whole_number
from .feed import Feeder, Lenient
from .keywords import keyworded, refuse_attribute
from .tokenizer import Tokenizer

_STRONGER_MODEL = "Alibaba-NLP/gte-modernbert-base"

P = TypeVar("P", bound="Pipeline")


class Pipeline(Feeder):
    """A network, its tokenizer, and how texts are fed to them."""

    opens: ClassVar[str]  # what this class opens, for messages: "reranker"
    head: ClassVar[str]  # how the name of its network ends: "ForMaskedLM"
    default_model: ClassVar[str | None] = None
    forward: Callable[..., Tensor]  # what runs on batches

    @classmethod
    @keyworded
    def from_pretrained(
        cls: type[P],
        path_or_id: str | os.PathLike[str] | None = None,
        *,
        device: str | torch.device | None = None,
        dtype: str | torch.dtype | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
        max_seq_length: int | None = None,
        batch_tokens: int | None = None,
        threads: int | None = None,
        on_long: str = "truncate",
        cuda_graphs: bool = True,
    ) -> P:
        """path_or_id: a folder, a hub id, or "tiny", the bundled embedding model. device, dtype, revision, token,
        local_files_only: as in `load_model`. max_seq_length: in tokens, instead of the repository's limit.
        batch_tokens: the most tokens in a batch; by default what suits the device.

        threads: how many compute on the CPU, in this whole process (torch has one such number). By default
        MODERNBERT_LITE_THREADS, else torch's own number, but no more than the process or its container may use.
        on_long: "truncate" or "error", for texts over max_seq_length. cuda_graphs: on CUDA, replays small batches from
        captured graphs (MODERNBERT_LITE_CUDA_GRAPHS=0 turns it off, too).

        Raises CheckpointError for a checkpoint that is missing, damaged or unsupported, and for one that another class
        opens, which the message names. Raises OptionError for more threads than there are processors.
        """
        return cls._open(locals())

    @classmethod
    def _open(cls: type[P], arguments: dict[str, Any]) -> P:
        """arguments: of `from_pretrained`, by name."""
        options = {name: value for name, value in arguments.items() if name != "cls"}
        path_or_id = options.pop("path_or_id")
        hub = {name: options.pop(name) for name in ("revision", "token", "local_files_only")}
        set_threads(options.pop("threads"))
        if path_or_id is None:
            if cls.default_model is None:
                raise TypeError(f"{cls.__name__}.from_pretrained needs a model: a folder or a hub id")
            path_or_id = cls.default_model
            note = (
                f"modernbert-lite: using the bundled model {path_or_id!r} (English, 384 dimensions). A stronger one: "
                f"{_STRONGER_MODEL} (--model in the shell, the first argument in Python)."
            )
            if sys.stderr is not None:  # print(file=None) would write to standard output
                print(note, file=Lenient(sys.stderr))
        checkpoint = Checkpoint.find(path_or_id, **hub)
        with torch.autocast("cpu", enabled=False):  # the caller may have turned it on
            return cls(checkpoint, **options)

    def __init__(
        self,
        checkpoint: Checkpoint,
        network: type[nn.Module],
        *,
        device: str | torch.device | None,
        dtype: str | torch.dtype | None,
        max_seq_length: int | None,
        batch_tokens: int | None,
        on_long: str,
        cuda_graphs: bool,
    ):
        self.on_long = on_long
        self.batch_tokens = CPU_BATCH_TOKENS if batch_tokens is None else batch_tokens
        config = checkpoint.config
        self.config = config
        longest = checkpoint.max_length if max_seq_length is None else self._within_positions(max_seq_length)
        own = checkpoint.sentence.settings
        self.tokenizer = Tokenizer(
            checkpoint.folder, longest, own.lower_case, settings=own.tokenizer, files=checkpoint.files
        )
        self.typed = self.tokenizer.has_types and config.type_vocab_size > 1
        # With its head (if it has one), and without.
        self.network = checkpoint.load(network, device, dtype)
        self.encoder = encoder_of(self.network)
        on_cpu = self.device.type == "cpu"
        if batch_tokens is None and not on_cpu:
            self.batch_tokens = GPU_BATCH_TOKENS
        self.max_graph_tokens = MAX_TOKENS if cuda_graphs else 0
        if on_cpu:
            bound_tokenizer()

    @classmethod
    def head_of(cls, checkpoint: Checkpoint) -> type[nn.Module]:
        """The network's class, which must end in `head`. Raises CheckpointError for another class's checkpoint."""
        cls.check(checkpoint)
        architecture = checkpoint.architecture(cls.head)
        if not architecture.endswith(cls.head):
            raise checkpoint.refuse(cls.opens)
        return network_class(architecture)

    @classmethod
    def check(cls, checkpoint: object) -> None:
        """Raises TypeError if the constructor was given a model's name."""
        if not isinstance(checkpoint, Checkpoint):
            raise TypeError(f"to open a model use {cls.__name__}.from_pretrained({shown(checkpoint, 60)})")

    def __setattr__(self, name: str, value: Any) -> None:
        """Raises AttributeError for another library's name of a setting, and for one that can't be changed."""
        refuse_attribute(self, name)
        super().__setattr__(name, value)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.config.architecture}, {self.max_seq_length} tokens, {self.device})"

    @property
    def max_seq_length(self) -> int:
        """The most tokens of a text, special tokens included. May be set; OptionError for an impossible value."""
        return self.tokenizer.max_length

    @max_seq_length.setter
    def max_seq_length(self, value: int) -> None:
        self.tokenizer.max_length = self._within_positions(value)

    def _within_positions(self, value: int) -> int:
        """Returns `value`, a max_seq_length. Raises OptionError if it is larger than the table of positions. The
        tokenizer refuses what is no whole number."""
        most, tokens = self.config.max_positions, as_whole(value)
        if most is not None and tokens is not None and tokens > most:
            raise OptionError(
                f"max_seq_length is {shown(tokens)}; it must be no more than {most}, what the model has positions for"
            )
        return value

    @property
    def batch_tokens(self) -> int:
        """The most tokens of a batch. May be set; raises OptionError for an impossible value."""
        return self._batch_tokens

    @batch_tokens.setter
    def batch_tokens(self, value: int) -> None:
        self._batch_tokens = whole_number("batch_tokens", value)

    @property
    def on_long(self) -> str:
        """What happens to texts over max_seq_length: "truncate" or "error". May be set; OptionError for others."""
        return self._on_long

    @on_long.setter
    def on_long(self, value: str) -> None:
        self._on_long = one_of("on_long", value, ON_LONG)

    def graphed(self, network: Any, forward: Callable[..., Tensor] | None = None) -> Graphed:
        """A network, or a function of it, to be called on batches. It runs from CUDA graphs where they pay."""
        return Graphed(network, forward, max_tokens=self.max_graph_tokens)
