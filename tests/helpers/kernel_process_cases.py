"""Shared by test_compile and test_launch, which run themselves in another process."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def said_outside_the_interpreter(file: str, cache: Path) -> Any:
    """What a test file prints as JSON when it is run as a program. There Triton compiles: whether kernels are
    interpreted is decided once a process. cache: a folder for what is compiled. Skips where nothing can be compiled."""
    triton = pytest.importorskip("triton")
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    if not list(tools.glob("ptxas*")) and "TRITON_PTXAS_PATH" not in os.environ:
        pytest.skip("this triton has no ptxas, so it compiles for no NVIDIA card")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, file], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)
