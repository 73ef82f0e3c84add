"""Triton kernels compiled for real cards, without one: the launchers' own configurations, read back from the code.

Kernels are interpreted in the tests' own process, and that is decided once, so this file runs itself in another one:
there the launchers are called on CPU tensors, compile as they would for a card, and start nothing.
"""

import ast
import functools
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

triton = pytest.importorskip("triton") if __name__ != "__main__" else __import__("triton")

from modernbert_lite.kernels import attention, float8, geglu, launch, layer_norm, pooling, rope  # noqa: E402

pytestmark = pytest.mark.slow

MODULES = (attention, float8, geglu, layer_norm, pooling, rope)
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# What one program may have of shared memory (CUDA programming guide, "technical specifications per compute capability";
# AMD's CDNA3 guide). sm_80's code is also checked against sm_86 and sm_89, which run it as it is.
SHARED = {"sm_120": 99, "sm_100": 227, "sm_90": 227, "sm_89": 99, "sm_80": 163, "sm_75": 64, "sm_70": 96, "gfx942": 64}
OLD = ("sm_75", "sm_70")  # V100, T4: attention is torch's there
NEW = ("sm_89", "sm_100", "sm_120")  # L4 and RTX 40, B200, RTX 50: what sm_90 and sm_80 are checked for, in bf16
# Registers that are taken back in a loop of 500 instructions: heads of 128, which no known checkpoint has.
SPILLED = {("sm_120", "bfloat16", "attention", 128, variant): 3 for variant in ("local", "global")}
# Loads that can't be 16 bytes wide: a value a row or a program (positions, lengths, the tile), tables and weights that
# every row shares, which a thread may hold fewer of.
NARROW = {
    "_rope_kernel": 3,
    "_geglu_kernel": 0,
    "_geglu_backward_kernel": 0,
    "_layer_norm_kernel": 2,
    "_layer_norm_backward_kernel": 1,
    "_sum_kernel": 3,
    "_finish_kernel": 2,
    "_quantize_kernel": 0,
    "_attention_kernel": 4,
}


class Case(NamedTuple):
    target: str
    dtype: str
    op: str
    width: int  # C, N or head_dim
    variant: str = ""

    def __str__(self) -> str:
        return "-".join(map(str, self)).rstrip("-")


def _cases() -> list[Case]:
    """bf16 most thoroughly: it is what a card that has it runs in. AMD's compiler takes seconds for attention."""
    cases = []
    for target in ("sm_90", "sm_80", "gfx942", *OLD):
        for dtype in ("bfloat16", "float16", "float32") if target not in OLD else ("float16",):
            add, main = functools.partial(Case, target, dtype), dtype == "bfloat16"
            cases += [add("rope", 64), add("geglu", 1152), add("geglu_backward", 1152)]
            for width in (384, 768, 1792) if main else (768,):
                cases += [add(op, width) for op in ("layer_norm", "add_layer_norm", "layer_norm_backward")]
            cases.append(add("pool", 768))
            if main:
                cases += [add("rope", 128, "inverse"), add("pool", 1792)]
            if target in OLD:
                continue
            cases += [add("attention", 64, "local"), add("attention", 64, "global")]
            if main:
                cases += [add("attention", 64, "short"), add("attention", 64, "row")]
            if main and target != "gfx942":
                others = [D for D in attention.HEAD_DIMS if D != 64]
                cases += [add("attention", D, v) for D in others for v in ("local", "global", "short")]
    cases += [Case("sm_90", "bfloat16", "quantize", width) for width in (384, 768, 1792, 31)]
    for target in NEW:
        add = functools.partial(Case, target, "bfloat16")
        cases.append(add("quantize", 768))
        cases += [add(op, 768) for op in ("layer_norm", "add_layer_norm", "layer_norm_backward")]
        cases += [add("rope", 64), add("geglu", 1152), add("geglu_backward", 1152), add("pool", 768)]
        cases += [add("attention", D, v) for D in attention.HEAD_DIMS for v in ("local", "global", "short")]
    for odd in (("rope", 6), ("geglu", 1151), ("layer_norm", 31), ("layer_norm_backward", 31), ("pool", 31)):
        cases.append(Case("sm_90", "bfloat16", *odd))
    cases += [
        Case(target, "float32", "attention", 128, v) for target in ("sm_90", "sm_80") for v in ("local", "global")
    ]
    return cases


CASES = _cases()


def _launch(case: Case) -> None:
    """Calls the public function, as a model of that width would. T is small: no kernel is specialised on it."""
    dtype, width = getattr(torch, case.dtype), case.width
    attention._is_hopper = lambda device: case.target == "sm_90"
    cu_seqlens = torch.tensor([0, 5, 200], dtype=torch.int32)
    x, weight = torch.zeros(200, width, dtype=dtype), torch.zeros(width, dtype=dtype)
    if case.op == "rope":
        angles = torch.zeros(200, width // 2)
        qkv = torch.zeros(200, 36, width, dtype=dtype)
        rope.rope_(qkv, angles, angles, torch.arange(200), heads=24, inverse=case.variant == "inverse")
    elif case.op == "quantize":
        float8.quantize(x)
    elif case.op == "geglu":
        geglu.geglu(*torch.zeros(200, 2 * width, dtype=dtype).chunk(2, -1))
    elif case.op == "geglu_backward":
        geglu.geglu_backward(x, *torch.zeros(200, 2 * width, dtype=dtype).chunk(2, -1))
    elif case.op == "layer_norm":
        layer_norm.layer_norm(x, weight)
    elif case.op == "add_layer_norm":
        layer_norm.add_layer_norm(x, x.clone(), weight, weight.clone())
    elif case.op == "layer_norm_backward":
        layer_norm.layer_norm_backward(x.clone(), x, weight, weight.clone(), 1e-5, x.clone())
    elif case.op == "pool":
        pooling.pool(x, cu_seqlens)
    else:
        qkv = torch.zeros(200, 3, 2, width, dtype=dtype)
        window = (64, 64) if case.variant.startswith("local") else (-1, -1)
        if case.variant == "short":
            attention.attention(qkv[:64], torch.tensor([0, 64], dtype=torch.int32))
        elif case.variant == "row":
            attention.row_attention(qkv[:2, 0], qkv[:, 1:], cu_seqlens)
        else:
            attention.attention(qkv, cu_seqlens, window)


def _facts(kernel: Any) -> dict[str, Any]:
    facts = {"kernel": kernel.metadata.name, "shared": kernel.metadata.shared}
    ptx = kernel.asm.get("ptx")
    if ptx is None:
        return facts
    # Bytes of each access: ld.global.L1::evict_first.v4.b32 -> 16.
    for kind in ("ld", "st"):
        widths = re.findall(rf"\b{kind}\.global(?:\.\w+(?:::\w+)*)*?(?:\.v(\d))?\.[bfsu](\d+)\b", ptx)
        facts[kind] = [int(n or 1) * int(bits) // 8 for n, bits in widths]
    facts["ld"] += [int(n, 0) for n in re.findall(r"\bcp\.async\.c[ag]\.shared\.global[^;]*?\], \[[^]]*\], (\w+)", ptx)]
    facts["wgmma"], facts["mma"] = ptx.count("wgmma.mma_async"), len(re.findall(r"\bmma\.sync", ptx))
    facts["tcgen05"] = len(re.findall(r"\btcgen05\.mma", ptx))
    if (TOOLS / "cuobjdump").is_file():
        usage = _cuobjdump("-res-usage", kernel.asm["cubin"])
        facts["registers"], facts["stack"] = (int(re.search(rf"{k}:(\d+)", usage)[1]) for k in ("REG", "STACK"))
        facts["warps"] = kernel.metadata.num_warps
        counted = kernel.metadata.target.arch == 90  # the tool doesn't list the code of every card
        sass = _cuobjdump("-sass", kernel.asm["cubin"]) if counted or facts["stack"] else ""
        if counted:
            facts["instructions"], facts["loop"], facts["skipped"] = _counts(sass)
        if facts["stack"]:
            facts["loops"], facts["spills"] = _spills(sass)
    return facts


def _cuobjdump(option: str, cubin: bytes) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [TOOLS / "cuobjdump", option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _code(sass: str) -> list[tuple[int, str]]:
    lines = re.findall(r"/\*([0-9a-f]{4,})\*/ +(.*?);", sass)
    return [(int(address, 16), line) for address, line in lines if not re.search(r"\bNOP\b", line)]


def _branches(code: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """(address, where it leads) of each branch."""
    found = [(address, re.search(r"\bBRA\b.*?0x([0-9a-f]+)", line)) for address, line in code]
    return [(address, int(target[1], 16)) for address, target in found if target]


def _counts(sass: str) -> tuple[int, int, int]:
    """Instructions of a warp: all, those of the longest loop, and how many selections (the mask of attention's scores)
    a branch inside that loop skips."""
    code = _code(sass)
    branches = _branches(code)
    low, high = max(((to, at) for at, to in branches if to < at), key=lambda loop: loop[1] - loop[0], default=(0, -1))
    inside = [(at, to) for at, to in branches if low <= at < to <= high]
    skipped = max((sum("FSEL" in line for a, line in code if at < a < to) for at, to in inside), default=0)
    return len(code), sum(low <= address <= high for address, _ in code), skipped


def _spills(sass: str) -> tuple[int, int]:
    """The number of loops, and how often registers are saved or restored inside of them. A loop is what lies between
    a branch backwards and where it leads."""
    code = _code(sass)
    loops = [(to, at) for at, to in _branches(code) if to < at]
    spills = [address for address, line in code if re.search(r"\b(LDL|STL)\b", line)]
    assert spills, "a stack, but nothing that uses it: the listing was not understood"
    return len(loops), sum(any(low <= address <= high for low, high in loops) for address in spills)


def _compile_all() -> dict[str, Any]:
    """str(case) -> what is known of each of its kernels, or the error."""
    found: list[Any] = []

    def compile_only(self: Any, grid: Any) -> Callable[..., None]:
        return lambda *args, **options: found.append(self.run(*args, grid=grid, warmup=True, **options))

    from bench.bench_host import Card

    triton.JITFunction.__getitem__ = compile_only
    results: dict[str, Any] = {}
    for case in CASES:
        triton.runtime.driver.set_active(Card(case.target))
        found.clear()
        try:
            _launch(case)
            results[str(case)] = [_facts(kernel) for kernel in found]
        except Exception as error:
            results[str(case)] = f"{type(error).__name__}: {error}"[:2000]
    return results


if __name__ == "__main__":
    json.dump(_compile_all(), sys.stdout)
    sys.exit()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from kernel_process_cases import said_outside_the_interpreter

    return said_outside_the_interpreter(__file__, tmp_path_factory.mktemp("triton"))


def kernels_of(compiled: dict[str, Any], case: Case) -> list[dict[str, Any]]:
    facts = compiled[str(case)]
    if isinstance(facts, str):
        if case.target.startswith("gfx") and "lld" in facts:
            pytest.skip("this triton has no linker of AMD's")
        pytest.fail(facts)
    return facts


def each(*, nvidia: bool = True, vectors: bool = False, attention: bool | None = None) -> Callable[..., Any]:
    chosen = [case for case in CASES if not nvidia or case.target.startswith("sm_")]
    if vectors:
        chosen = [case for case in chosen if case.width % 16 == 0]
    if attention is not None:
        chosen = [case for case in chosen if (case.op == "attention") == attention]
    return pytest.mark.parametrize("case", chosen, ids=str)


@each(nvidia=False)
def test_it_compiles_and_its_shared_memory_fits(compiled, case):
    facts = kernels_of(compiled, case)
    assert facts
    targets = [case.target, "sm_89"] if case.target == "sm_80" else [case.target]
    for kernel in facts:
        for target in targets:
            assert kernel["shared"] <= SHARED[target] * 1024, f"{kernel['kernel']} on {target}"


# Warp instructions, counted for sm_90 in bf16, and the most that is allowed: per row, per number, per block of keys.
MOST = {
    Case("sm_90", "bfloat16", "layer_norm", 768): 260,
    Case("sm_90", "bfloat16", "add_layer_norm", 768): 330,
    Case("sm_90", "bfloat16", "quantize", 768): 275,
    Case("sm_90", "bfloat16", "geglu", 1152): 27,
    Case("sm_90", "bfloat16", "geglu_backward", 1152): 35,
    Case("sm_90", "bfloat16", "attention", 64, "local"): 480,
}


@pytest.mark.parametrize("case", MOST, ids=str)
def test_instructions_stay_few(compiled, case):
    (kernel,) = kernels_of(compiled, case)
    if "instructions" not in kernel:
        pytest.skip("this triton has no cuobjdump")
    if case.op == "attention":
        assert kernel["loop"] <= MOST[case]
        assert kernel["skipped"] >= 32, "blocks that need no mask are masked"  # 64 x 64 scores, 128 threads
    elif case.op in ("layer_norm", "add_layer_norm", "quantize"):
        assert kernel["instructions"] * kernel["warps"] / launch.row_shape(case.width)["ROWS"] <= MOST[case]
    else:
        numbers = geglu.BLOCK_T * geglu.BLOCK_N / (32 * kernel["warps"])
        assert kernel["instructions"] / numbers <= MOST[case]


def test_four_programs_of_local_attention_fit_a_multiprocessor(compiled):
    """By registers (of 65,536; given out eight a thread at a time) and by shared memory."""
    (kernel,) = kernels_of(compiled, Case("sm_90", "bfloat16", "attention", 64, "local"))
    if "registers" not in kernel:
        pytest.skip("this triton has no cuobjdump")
    assert 4 * 32 * kernel["warps"] * -(-kernel["registers"] // 8) * 8 <= 65_536
    assert 4 * (kernel["shared"] + 1024) <= SHARED["sm_90"] * 1024 + 1024


def test_additions_and_products_are_fused_at_every_launch():
    """Triton 3.9 warns where a launch doesn't say so, and 3.10 would not fuse. All launches go through launch.py."""
    launches = {}
    for path in Path(attention.__file__).parent.glob("*.py"):
        calls = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
        for call in calls:
            if isinstance(call.func, ast.Subscript):  # kernel[programs](..)
                launches[path.stem] = {word.arg: ast.unparse(word.value) for word in call.keywords}
    assert {name: words["enable_fp_fusion"] for name, words in launches.items()} == {"launch": "True"}


@pytest.mark.parametrize("target", ["sm_90", "sm_80", "gfx942", *OLD])
def test_no_kernel_is_left_out(compiled, target):
    """In each dtype of the card. Files and kernels are counted, so that a new one is missed here."""
    folder = Path(attention.__file__).parent
    assert {path.stem for path in folder.glob("*.py")} - {"launch"} == {
        module.__name__.rpartition(".")[2] for module in MODULES
    }
    names = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    assert set(NARROW) == names
    if target in OLD:
        names.remove("_attention_kernel")
    for dtype in ("float16",) if target in OLD else ("bfloat16", "float16", "float32"):
        cases = [case for case in CASES if (case.target, case.dtype) == (target, dtype)]
        left_out = set() if (target, dtype) == ("sm_90", "bfloat16") else {"_quantize_kernel"}  # of 8-bit floats
        assert {kernel["kernel"] for case in cases for kernel in kernels_of(compiled, case)} == names - left_out


@each(vectors=True)
def test_memory_is_read_and_written_16_bytes_at_a_time(compiled, case):
    for kernel in kernels_of(compiled, case):
        assert 16 in kernel["ld"]
        assert sum(width < 16 for width in kernel["ld"]) <= NARROW[kernel["kernel"]], kernel
        assert kernel["st"]
        assert sum(width < 16 for width in kernel["st"]) <= (kernel["kernel"] == "_quantize_kernel"), kernel  # a scale


def test_an_odd_width_is_told_from_an_aligned_one(compiled):
    """That the test above sees something: rows of 1151 values of two bytes can't be moved 16 bytes at a time."""
    (kernel,) = kernels_of(compiled, Case("sm_90", "bfloat16", "geglu", 1151))
    assert set(kernel["ld"]) == set(kernel["st"]) == {2}


@each()
def test_no_register_is_spilled_in_a_loop(compiled, case):
    """What is put aside before a loop and taken back after it costs next to nothing. Kernels without a loop get two
    registers' worth, which is what calls (of the square root) may take."""
    for kernel in kernels_of(compiled, case):
        if "stack" not in kernel:
            pytest.skip("this triton has no cuobjdump")
        if kernel["stack"]:
            known = f"{kernel['kernel']}: {kernel['registers']} registers, {kernel['stack']} bytes of stack"
            assert kernel["spills"] <= SPILLED.get(case, 0), known
            assert kernel["loops"] or kernel["stack"] <= 8, known


@each(attention=True)
def test_attention_uses_the_matrix_units(compiled, case):
    (kernel,) = kernels_of(compiled, case)
    used = {name for name in ("wgmma", "mma", "tcgen05") if kernel[name]}
    if case.dtype == "float32":  # full fp32, which the matrix units don't have
        assert not used
    else:
        assert used == {{"sm_90": "wgmma", "sm_100": "tcgen05"}.get(case.target, "mma")}


@each(attention=False)
def test_the_elementwise_kernels_use_none(compiled, case):
    for kernel in kernels_of(compiled, case):
        assert kernel["wgmma"] == kernel["mma"] == kernel["tcgen05"] == 0
