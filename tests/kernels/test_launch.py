"""Launches that are bound once: they start what Triton would start, with what Triton would pass.

Whether kernels are interpreted is decided once a process, so this file runs itself in another one, for a card that
isn't there (bench/bench_host.py): `launched` holds what its driver was asked to start.
"""

import json
import os
import sys
from typing import Any

import pytest
import torch

OWN, ENTER = 9, 7  # a launch's own arguments begin here; the hook that is called before a launch


def _calls() -> dict[str, Any]:
    """name -> what the parent tests."""
    from bench.bench_host import Card
    from modernbert_lite.kernels import attention, float8, geglu, layer_norm, pooling, rope
    from modernbert_lite.kernels import launch as launching

    triton = launching.triton
    card = Card()
    card.install()

    def new(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    def launched(run: Any) -> list[Any]:
        card.calls.clear()
        run()
        return list(card.calls)

    def same(first: tuple[Any, ...], second: tuple[Any, ...]) -> bool:
        """But for the hooks, and for results, which are new tensors."""
        pairs = list(zip(first[:6] + first[OWN:], second[:6] + second[OWN:], strict=True))
        return all(
            (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())
            if isinstance(a, torch.Tensor)
            else (type(a), a) == (type(b), b)
            for a, b in pairs
        )

    x, w, qkv, h = new(5, 96), new(96), new(5, 9, 32), new(5, 96)
    ends, cos = torch.tensor([0, 2, 5], dtype=torch.int32), new(8, 16, dtype=torch.float32)
    places, table = torch.arange(5, dtype=torch.int32), attention.tiles([2, 3], 64)
    runs = {
        "layer_norm": lambda: layer_norm.layer_norm(x, w, None, 1e-5),
        "add_layer_norm": lambda: layer_norm.add_layer_norm(x, x, w, w),
        "layer_norm_backward": lambda: layer_norm.layer_norm_backward(x, x, w),
        "geglu": lambda: geglu.geglu(*h.chunk(2, 1), "silu"),
        "geglu_backward": lambda: geglu.geglu_backward(x, x, x),
        "quantize": lambda: float8.quantize(x),
        "rope": lambda: rope.rope_(qkv, cos, cos, places, heads=6),
        "pool": lambda: pooling.pool(x, ends),
        "attention": lambda: attention.attention(qkv, ends, (3, 3), heads=3, tile_table=table, block=64),
        "row_attention": lambda: attention.row_attention(qkv[:2, :3], qkv[:, 3:], ends),
    }
    found: dict[str, Any] = {}
    for name, run in runs.items():
        first, second = launched(run), launched(run)
        bound = all(call[ENTER] is None for call in second) and not any(call[ENTER] is None for call in first)
        alike = len(first) == len(second) and all(same(*pair) for pair in zip(first, second, strict=True))
        found[name] = {"launches": len(first), "bound": bound, "same": alike}

    def code(activated: torch.Tensor, gate: torch.Tensor) -> str:
        """Which compiled kernel starts, the second time."""
        geglu.geglu(activated, gate, check=False)
        ((*_, function, _, _, enter, _), *_) = [call[:OWN] for call in launched(lambda: geglu.geglu(activated, gate))]
        assert enter is None
        return function

    odd = new(5 * 96 + 1)[1:].view(5, 96)  # its first number is no multiple of 16 bytes away from memory's begin
    cases = {
        "plain": (x, x),
        "other tokens": (new(7, 96), new(7, 96)),
        "odd pointer": (odd, x),
        "odd width": (new(5, 95), new(5, 95)),
        "odd stride": (new(5, 97)[:, :96], x),
        "width 1": (new(5, 1), new(5, 1)),
        "other dtype": (x.half(), x.half()),
    }
    found["codes"] = {name: code(*pair) for name, pair in cases.items()}
    hook = triton.knobs.runtime.launch_enter_hook
    hook.add(print)
    found["a hook"] = launched(runs["geglu"])[0][ENTER] is hook
    hook.remove(print)
    launching._bound.clear()
    launching._BINDS = False
    launched(runs["geglu"])
    found["unknown version"] = launched(runs["geglu"])[0][ENTER] is not None
    return found


if __name__ == "__main__":
    json.dump(_calls(), sys.stdout)
    sys.exit()


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from kernel_process_cases import said_outside_the_interpreter

    return said_outside_the_interpreter(__file__, tmp_path_factory.mktemp("triton"))


@pytest.mark.parametrize(
    ("name", "launches"),
    {
        "layer_norm": 1,
        "add_layer_norm": 1,
        "layer_norm_backward": 1,
        "geglu": 1,
        "geglu_backward": 1,
        "rope": 1,
        "pool": 2,
        "attention": 1,
        "row_attention": 1,
    }.items(),
)
def test_the_second_launch_starts_what_the_first_one_did_without_triton_between(found, name, launches):
    assert found[name] == {"launches": launches, "bound": True, "same": True}


def test_what_triton_compiles_anew_is_bound_anew(found):
    codes = found["codes"]
    assert codes.pop("other tokens") == codes["plain"]  # a batch of another size: nothing new is compiled
    assert len(set(codes.values())) == len(codes)


def test_a_profiler_is_told_of_launches(found):
    assert found["a hook"]


def test_an_unknown_triton_launches_by_itself(found):
    assert found["unknown version"]


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1")
def test_a_triton_without_knobs_is_not_asked_for_them(monkeypatch):
    """Before 3.4 there are none, and nothing is bound."""
    triton = pytest.importorskip("triton")
    from modernbert_lite.kernels import geglu

    monkeypatch.delattr(triton, "knobs")
    x = torch.ones(3, 5)
    assert (geglu.geglu(x, x) - 0.8413447).abs().max() < 1e-6  # the normal distribution's cumulative function at 1
