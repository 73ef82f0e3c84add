"""How many threads compute: affinity, containers' quotas, what was asked for, and the tokenizer's own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from modernbert_lite import Embedder
from modernbert_lite.ops import threads
from modernbert_lite.ops.threads import available, set_threads
from modernbert_lite.reading import OptionError

LINUX = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux's affinity and /proc")


@pytest.fixture(autouse=True)
def settings(monkeypatch):
    """As in a new process: no variable set, torch's number put back afterwards."""
    for name in ("MODERNBERT_LITE_THREADS", "RAYON_NUM_THREADS"):
        monkeypatch.setenv(name, "")  # so that what a test leaves is taken back
        monkeypatch.delenv(name)
    monkeypatch.setattr(threads, "_ours", None)
    kept = torch.get_num_threads()
    yield
    torch.set_num_threads(kept)


@pytest.fixture
def processors(monkeypatch):
    """processors(n): the process may use n, whatever this machine has."""
    return lambda count: monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(count)), raising=False)


def tree(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


# ---- what may be used ----------------------------------------------------------------------------------------------


def test_affinity_counts_and_not_the_machine(monkeypatch, tmp_path, processors):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    processors(5)
    assert available(tmp_path) == 5


def test_without_affinity_the_machine_counts(monkeypatch, tmp_path):
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    assert available(tmp_path) == 6
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available(tmp_path) == 1


V1_QUOTA, V1_PERIOD = "sys/fs/cgroup/cpu/cpu.cfs_quota_us", "sys/fs/cgroup/cpu/cpu.cfs_period_us"
QUOTAS = {
    "version 2": ({"sys/fs/cgroup/cpu.max": "400000 100000\n"}, 4),
    "rounded up": ({"sys/fs/cgroup/cpu.max": "250000 100000\n"}, 3),
    "at least one": ({"sys/fs/cgroup/cpu.max": "1000 100000\n"}, 1),
    "another period": ({"sys/fs/cgroup/cpu.max": "40000 20000\n"}, 2),
    "more than there is": ({"sys/fs/cgroup/cpu.max": "9900000 100000\n"}, 16),
    "version 2, none": ({"sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
    "version 1": ({V1_QUOTA: "350000\n", V1_PERIOD: "100000\n"}, 4),
    "version 1, none": ({V1_QUOTA: "-1\n", V1_PERIOD: "100000\n"}, 16),
    "version 1, half": ({V1_QUOTA: "100000\n"}, 16),
    "both": ({V1_QUOTA: "350000\n", V1_PERIOD: "100000\n", "sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_a_container_s_quota_is_kept(tmp_path, processors, name):
    files, expected = QUOTAS[name]
    processors(16)
    assert available(tree(tmp_path, files)) == expected


GARBAGE = [
    "",
    "\n",
    "max",
    "nonsense",
    "1 2 3",
    "1.5 1",
    "-5 100000",
    "100000 0",
    "0 0",
    "9" * 5_000 + " 1",
    b"\xff\xfe",
]


@pytest.mark.parametrize("content", GARBAGE, ids=range(len(GARBAGE)))
def test_what_can_not_be_understood_limits_nothing(tmp_path, processors, content):
    processors(16)
    assert available(tree(tmp_path, {"sys/fs/cgroup/cpu.max": content})) == 16
    for name in (V1_QUOTA, V1_PERIOD):
        assert available(tree(tmp_path / name, {name: content})) == 16


@LINUX
def test_this_machine_has_an_answer():
    assert 1 <= available() <= len(os.sched_getaffinity(0))


# ---- setting -------------------------------------------------------------------------------------------------------


def test_the_argument_is_set(processors):
    processors(4)
    for count in (3, 4, 1):
        set_threads(count)
        assert torch.get_num_threads() == count


def test_the_variable_is_set_and_the_argument_comes_before_it(processors, monkeypatch):
    processors(4)
    monkeypatch.setenv("MODERNBERT_LITE_THREADS", " 3 ")
    set_threads(None)
    assert torch.get_num_threads() == 3
    set_threads(2)
    assert torch.get_num_threads() == 2
    monkeypatch.setenv("MODERNBERT_LITE_THREADS", "nonsense")
    set_threads(4)
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize("bad", [0, -1, 5, 1.0, True, "2", 10**30])
def test_a_bad_number_is_refused(processors, bad):
    processors(4)
    before = torch.get_num_threads()
    with pytest.raises(OptionError, match=r"^threads is .*; it must be a whole number from 1 to 4, the processors"):
        set_threads(bad)
    assert torch.get_num_threads() == before
    assert "RAYON_NUM_THREADS" not in os.environ


@pytest.mark.parametrize("bad", ["0", "-1", "5", "2.0", "abc", "1 2", "²", "9" * 5_000])
def test_a_bad_variable_is_refused_by_name(processors, monkeypatch, bad):
    processors(4)
    monkeypatch.setenv("MODERNBERT_LITE_THREADS", bad)
    with pytest.raises(OptionError, match=r"^MODERNBERT_LITE_THREADS is '.*; it must be a whole number from 1 to 4"):
        set_threads(None)


def test_a_quota_bounds_what_may_be_asked_for(processors, monkeypatch):
    processors(16)
    monkeypatch.setattr(threads, "_quotas", lambda _: [2, 7])
    with pytest.raises(OptionError, match="from 1 to 2"):
        set_threads(3)


def test_without_a_number_torch_s_own_is_lowered_only(processors, monkeypatch):
    processors(8)
    for own, quota, expected in ((2, 4, 2), (4, 4, 4), (6, 4, 4)):
        torch.set_num_threads(own)
        monkeypatch.setattr(threads, "_quotas", lambda _, quota=quota: [quota])
        monkeypatch.setenv("MODERNBERT_LITE_THREADS", "")
        set_threads(None)
        assert torch.get_num_threads() == expected


def python(program: str, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "RAYON_", "TOKENIZERS_", "MODERNBERT"))}
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, env={**clean, **environment}
    )
    assert done.returncode == 0, done.stderr[-1_000:]
    assert done.stderr == ""
    return done.stdout


# ---- through the classes; the tokenizer's own threads --------------------------------------------------------------


def test_from_pretrained_sets_them_before_it_looks_for_the_model(processors):
    processors(3)
    Embedder.from_pretrained("tiny", threads=2)
    assert torch.get_num_threads() == 2
    with pytest.raises(OptionError, match="threads is 4"):
        Embedder.from_pretrained("no/such-model", threads=4)


def test_the_tokenizer_gets_as_many_unless_its_own_variable_is_set(processors, monkeypatch):
    processors(4)
    for count in (3, 2):
        set_threads(count)
        assert os.environ["RAYON_NUM_THREADS"] == str(count)
    monkeypatch.setenv("RAYON_NUM_THREADS", "7")
    set_threads(4)
    assert os.environ["RAYON_NUM_THREADS"] == "7"


def test_on_the_cpu_the_tokenizer_gets_no_more_than_torch_without_a_number(processors):
    processors(4)
    torch.set_num_threads(3)
    Embedder.from_pretrained("tiny", device="cpu")
    assert os.environ["RAYON_NUM_THREADS"] == "3"


@LINUX
def test_the_process_has_no_more_threads_than_asked_for():
    """Main, one of the tokenizer: torch's pool is the main thread alone."""
    program = """
import os
import torch
from modernbert_lite import Embedder
from tqdm import tqdm
tqdm.monitor_interval = 0  # the progress bar's own thread
before = len(os.listdir("/proc/self/task"))
model = Embedder.from_pretrained("tiny", device="cpu", threads=1)
model.encode(["one", "two", "three"] * 20)
print(torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before)
"""
    assert python(program) == "1 1\n"


FORK = """
import os, signal
from modernbert_lite import Embedder
model = Embedder.from_pretrained("tiny", device="cpu", threads=1)
model.encode(["one", "two"])
child = os.fork()
if not child:
    signal.alarm(20)  # a child that waits for threads that it doesn't have
    print(len(model.tokenizer.encode(["one", "two"])[0]), flush=True)
    os._exit(0)
print(os.waitpid(child, 0)[1], os.environ.get("TOKENIZERS_PARALLELISM"), flush=True)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_tokenizes_without_a_warning():
    assert python(FORK) == "2\n0 None\n"
