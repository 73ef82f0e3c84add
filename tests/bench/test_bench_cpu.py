"""The bench of the CPU's engines: who is compared, timed and let off; its tables; one tiny run as a process."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]
OURS = "modernbert-lite"


@pytest.fixture(autouse=True)
def bench_can_be_imported(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))


WHERE = {"machine": "a CPU", "threads": "2", "torch": "2.13", "transformers": "5.23", "sentence-transformers": "6.2"}
WHERE |= {"onnxruntime": "1.31", "openvino": "2026", "commit": "abc", "date": "2026-01-01"}


def row(case: str, dtype: str, provider: str, speed: int | str = "", note: str = "", **more: str) -> dict[str, str]:
    tokens = {"1x32": 32, "1x8192": 8192}.get(case, 1024)
    given = {"case": case, "tokens": str(tokens), "dtype": dtype, "provider": provider, "note": note}
    return given | {"tokens_per_s": str(speed)} | more


def sample_rows() -> list[dict[str, str]]:
    from bench.bench_cpu import with_ratios

    seen = {"peak_mb": "1400", "load_s": "1.26", "first_s": "1.44"}
    return [
        *with_ratios([row("1x32", "float32", OURS, 1500, **seen), row("1x32", "float32", "openvino", 1200)]),
        *with_ratios(
            [
                row("1x8192", "float32", OURS, 900, **seen | {"load_s": "1.1"}),
                row("1x8192", "float32", "openvino", 250, peak_mb="3012"),
            ]
        ),
        *with_ratios(
            [row("1x32", "int8", OURS, note="OptionError: no"), row("1x32", "int8", "onnxruntime", 2852)],
        ),
    ]


def test_ratios_are_to_the_peer_that_is_named():
    from bench.bench_cpu import with_ratios

    speeds = [(OURS, 300), ("transformers", 100), ("onnxruntime", 400), ("openvino", 200)]
    rows = with_ratios([row("1x32", "float32", *speed) for speed in speeds])
    assert [r["ratio"] for r in rows] == ["1.50", "0.50", "2.00", "1.00"]
    rows = with_ratios([row("1x32", "int8", OURS, 300), row("1x32", "int8", "onnxruntime", 400)])
    assert [r["ratio"] for r in rows] == ["0.75", "1.00"]
    rows = with_ratios([row("1x32", "float32", OURS, 300), row("1x32", "float32", "openvino", note="not installed")])
    assert [r["ratio"] for r in rows] == ["", ""]


def test_check_knows_what_is_promised():
    from bench.bench_cpu import PEAK_MB, PROMISES, missed

    for dtype, promised in PROMISES.items():
        for case, least in promised.items():
            met, short = (row(case, dtype, OURS, 100, ratio=f"{r:.2f}", peak_mb="1") for r in (least, least - 0.01))
            assert missed([met]) == []
            assert missed([short]) == [f"{dtype} {case}: {short['ratio']} x {PEER[dtype]}, promised {least}"]
    peaks = [row("1x8192", "float32", OURS, 100, ratio="9", peak_mb=str(PEAK_MB - less)) for less in (1, 0)]
    assert missed(peaks) == ["float32 1x8192: peak memory 1500 MB, promised less than 1500"]
    assert missed([row("1x8192", "bfloat16", OURS, 100, ratio="9", peak_mb="1600")]) == []
    assert missed([row("1x8192", "int8", OURS, 100)]) == []  # nothing is promised there
    assert missed([row("1x32", "float32", "transformers", 1, ratio="0.01")]) == []


PEER = {"float32": "openvino", "bfloat16": "openvino", "int8": "onnxruntime"}


def test_what_cannot_be_compared_is_not_kept():
    from bench.bench_cpu import missed

    rows = [row("1x32", "int8", OURS, note="no int8"), row("8x128", "float32", OURS, 100, ratio="")]
    assert missed(rows) == ["int8 1x32: no ratio to onnxruntime (no int8)", "float32 8x128: no ratio to openvino"]


def test_table():
    from bench.bench_cpu import table as cpu

    lines = cpu([r | WHERE for r in sample_rows()]).splitlines()
    assert lines[0] == "| dtype | engine | 1x32 | 1x8192 | peak MB, 1x8192 | loaded, s | first result, s |"
    assert lines[1] == "|---|---|---|---|---|---|---|"
    assert lines[2] == f"| float32 | {OURS} | 1,500 (1.25 x) | 900 (3.60 x) | 1,400 | 1.2 | 1.4 |"
    assert lines[3] == "| float32 | openvino | 1,200 | 250 | 3,012 | – | – |"
    assert lines[4] == f"| int8 | {OURS} | – | – | – | – | – |"
    assert f"- {OURS}, int8: OptionError: no (1x32)" in lines
    assert "openvino 2026, commit abc" in lines[-1]


def test_readme_gets_the_table(tmp_path):
    from bench import records, tables

    text = "<!-- table: cpu -->\nold\n<!-- end -->\n"
    assert tables.NOT_MEASURED_CPU in tables.fill(text, tmp_path)
    rows = [{"ratio": "", "peak_mb": "", "load_s": "", "first_s": "", **r, **WHERE} for r in sample_rows()]
    records.write_csv(tmp_path / "cpu.csv", [r | {"smoke": "smoke"} for r in rows])
    assert tables.NOT_MEASURED_CPU in tables.fill(text, tmp_path)
    records.write_csv(tmp_path / "cpu.csv", rows)
    assert "| 1,500 (1.25 x) |" in tables.fill(text, tmp_path)


def test_plot_has_a_bar_a_speed():
    from bench.plot import speeds

    for rows, bars in ((sample_rows(), 5), ([], 0), ([row("1x32", "int8", OURS)], 0)):
        root = ElementTree.fromstring(speeds(rows, "a < b"))
        heights = [float(e.get("height")) for e in root.iter() if e.tag.endswith("rect") and e.get("x")]
        assert len([h for h in heights if h != 10]) == bars  # the names' squares are 10 high
        assert "a < b" in [e.text for e in root.iter()]


def test_compare_pools_each_text():
    from bench.bench_cpu import WorkerError, compare

    expected = np.array([[1, 0], [3, 0], [0, 2]], dtype=np.float32)
    got = np.array([[1, 0], [3, 0], [2, 2]], dtype=np.float32)
    found = compare(got, expected, [2, 1])
    assert found["max_difference"] == 2
    assert found["worst_cosine"] == pytest.approx(2**-0.5)
    assert found["cosine"] == pytest.approx((1 + 2**-0.5) / 2)
    with pytest.raises(WorkerError, match=r"\(2, 2\), not \(3, 2\)"):
        compare(got[:2], expected, [2, 1])


@pytest.mark.parametrize(
    ("provider", "dtype", "parity", "passes"),
    [
        (OURS, "float32", (2e-5, 1), True),
        (OURS, "float32", (3e-5, 1), False),
        ("openvino", "float32", (9e-5, 1), True),
        ("openvino", "float32", (2e-4, 1), False),
        (OURS, "bfloat16", (1, 0.9991), True),
        (OURS, "bfloat16", (1, 0.9989), False),
        (OURS, "int8", (1, 0.981), True),
        (OURS, "int8", (1, 0.979), False),
        ("onnxruntime", "int8", (1, 0.2), True),
        (OURS, "float32", (float("nan"), float("nan")), False),
        ("openvino", "bfloat16", (float("nan"), float("nan")), False),
    ],
)
def test_who_is_equal_enough(provider, dtype, parity, passes):
    from bench.bench_cpu import unequal

    difference, cosine = parity
    why = unequal(provider, dtype, {"max_difference": difference, "cosine": cosine, "worst_cosine": cosine})
    assert (why == "") is passes
    assert passes or why.startswith("unequal: ")


HIDDEN = np.linspace(-1, 1, 3 * 4, dtype=np.float32).reshape(3, 4)


class FakeWorker:
    """Stands for bench_cpu.Worker: as exact and as fast as its name says."""

    log: list[str]
    load_s, first_s, peak_mb = 1.0, 2.0, 500.0

    def __init__(self, provider, dtype, folder, threads, log):
        self.provider = provider
        self.turns = 0

    def start(self, case, save):
        from bench.bench_cpu import WorkerError

        assert [len(text) for text in case["texts"]] == [2, 1]
        if self.provider == "sentence-transformers":
            raise WorkerError("its process ended with -9")
        np.save(save, HIDDEN + (1e-3 if self.provider == OURS else 0))

    def turn(self):
        from bench.bench_cpu import WorkerError

        self.log.append(self.provider)
        self.turns += 1
        if self.provider == "onnxruntime" and self.turns == 2:
            raise WorkerError("out of memory")
        return {1: 1.0, 2: 7.0, 3: 2.0}[self.turns]

    def close(self):
        self.log.append(f"closed {self.provider}")

    def close_if_short_of_memory(self):
        pass


def test_who_is_unequal_or_fails_gets_a_note_and_no_speed(monkeypatch, tmp_path):
    from bench import bench_cpu as bench

    names = [OURS, "transformers", "sentence-transformers", "onnxruntime", "openvino"]
    FakeWorker.log = []
    monkeypatch.setattr(bench, "Worker", FakeWorker)
    monkeypatch.setattr(bench, "reference", lambda *_: HIDDEN)
    run = bench.Run(tmp_path, tmp_path / "log", 1, 3, {("openvino", "float32"): "not installed: openvino"})
    found = {r["provider"]: r for r in bench.measure_case(run, "1x32", [2, 1], 8, "float32", names)}
    assert found[OURS]["note"] == "unequal: hidden states differ by 1.0e-03, more than 2e-05"
    assert found[OURS]["max_difference"] == "1.0e-03"
    assert found["sentence-transformers"]["note"] == "its process ended with -9"
    assert found["onnxruntime"]["note"] == "out of memory"
    assert found["openvino"]["note"] == "not installed: openvino"
    good = found.pop("transformers")
    assert (good["tokens_per_s"], good["note"], good["peak_mb"], good["first_s"]) == ("2", "", "500", "2.00")
    assert not any("tokens_per_s" in other for other in found.values())
    started = {f"closed {name}" for name in names if name != "openvino"}
    assert started == {line for line in FakeWorker.log if line.startswith("closed")}
    turns = [line for line in FakeWorker.log if not line.startswith("closed")]
    assert turns == ["transformers", "onnxruntime", "onnxruntime", "transformers", "transformers"]


def test_without_a_reference_nothing_is_timed(monkeypatch, tmp_path):
    from bench import bench_cpu as bench

    def broken(*_):
        raise bench.WorkerError("its process ended with -9")

    monkeypatch.setattr(bench, "reference", broken)
    run = bench.Run(tmp_path, tmp_path / "log", 1, 3, {})
    (found,) = bench.measure_case(run, "1x32", [2, 1], 8, "float32", [OURS])
    assert found["note"] == "nothing to compare with: its process ended with -9"
    assert "tokens_per_s" not in found


def test_slow_rounds_are_fewer(monkeypatch):
    from bench import bench_cpu as bench

    now = [0.0]
    monkeypatch.setattr(bench.time, "monotonic", lambda: now[0])

    class Slow:
        def __init__(self, seconds):
            self.seconds = seconds

        def turn(self):
            now[0] += self.seconds
            return self.seconds

        def close_if_short_of_memory(self):
            pass

    for seconds, rounds in ((1.0, 15), (4.0, 8), (29.0, 3), (70.0, 2)):
        times = bench.take_turns({"one": Slow(seconds)}, 15, lambda name: contextlib.nullcontext())
        assert len(times["one"]) == rounds


STUB = """
import json, os, sys
print(json.dumps({"peak_mb": 1.0}), flush=True)
for line in sys.stdin:
    command = json.loads(line)
    answer = {"peak_mb": len(command.get("texts", ())), "seconds": 0.5, "pid": os.getpid()}
    if command.get("rows") == 13:
        print(json.dumps(answer | {"error": "MemoryError: full"}), flush=True)
    elif command.get("rows") == 14:
        sys.exit(3)
    elif command.get("rows") != 15:
        print(json.dumps(answer), flush=True)
"""


@pytest.fixture
def worker(tmp_path, monkeypatch):
    from bench import bench_cpu as bench

    monkeypatch.setattr(bench, "PAUSE_S", 0)
    one = bench.Worker("openvino", "float32", tmp_path, 1, tmp_path / "log")
    one.command = [sys.executable, "-c", STUB]
    yield one
    one.close()


def test_a_worker_is_kept_while_there_is_memory(worker, monkeypatch):
    from bench import bench_cpu as bench

    worker.start({"texts": [[5]] * 7, "rows": 8})
    first, times = worker.process.pid, (worker.load_s, worker.first_s)
    assert 0 < worker.load_s < worker.first_s
    for free, kept in ((5000, True), (3000, False)):
        monkeypatch.setattr(bench, "available_mb", lambda free=free: free)
        assert worker.turn() == 0.5
        worker.close_if_short_of_memory()
        assert (worker.process is not None) is kept
    assert worker.turn() == 0.5
    assert worker.process.pid != first
    assert (worker.load_s, worker.first_s) == times
    assert worker.peak_mb == 7


@pytest.mark.parametrize(
    ("rows", "why"), [(13, "MemoryError: full"), (14, "its process ended with 3"), (15, "its process ended with -9")]
)
def test_a_worker_that_fails_ends_or_hangs_says_so(worker, monkeypatch, rows, why):
    from bench import bench_cpu as bench

    monkeypatch.setattr(bench, "ANSWER_S", 1.0)
    with pytest.raises(bench.WorkerError, match=why):
        worker.start({"texts": [[5]], "rows": rows})


def test_a_worker_starts_light():
    code = "import mmap, sys, bench.bench_cpu; from bench.engines import peak_mb; "
    code += "untouched = mmap.mmap(-1, 300 << 20); "
    code += "print(peak_mb(), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    peak, torch = done.stdout.split()
    assert 5 < float(peak) < 60  # not what the process that started it has
    assert torch == "False"


def main(monkeypatch, tmp_path, cases, *more):
    """main() with made-up measurements: cases is case -> rows, or what is raised."""
    from bench import bench_cpu as bench

    def measured(run, case, lengths, rows, dtype, providers):
        if isinstance(cases[case], BaseException):
            raise cases[case]
        return bench.with_ratios(cases[case])

    monkeypatch.setattr(bench, "prepare", lambda *_: "")
    monkeypatch.setattr(bench, "measure_case", measured)
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    return bench.main([*folders, "--providers", OURS, "--dtype", "float32", "--cases", *cases, *more])


@pytest.mark.parametrize(
    ("ours", "plain", "check"),
    [(1000, 0, 0), (900, 0, 1), ("", 1, 1)],  # equal speed; 0.9 of the peer's; unequal
)
def test_exit_status(monkeypatch, tmp_path, capsys, ours, plain, check):
    rows = [
        row("1x32", "float32", OURS, ours, note="" if ours else "unequal: 1"),
        row("1x32", "float32", "openvino", 1000),
    ]
    if not ours:
        del rows[0]["tokens_per_s"]
    assert main(monkeypatch, tmp_path, {"1x32": rows}) == plain
    assert capsys.readouterr().err == ("not as promised: float32 1x32: unequal: 1\n" if plain else "")
    assert main(monkeypatch, tmp_path, {"1x32": rows}, "--check") == check
    assert ("not as promised: float32 1x32: " in capsys.readouterr().err) is bool(check)


def test_what_was_measured_before_a_stop_is_written(monkeypatch, tmp_path):
    from bench.records import read_csv

    rows = [row("1x32", "float32", OURS, 1000), row("1x32", "float32", "openvino", 1000)]
    with pytest.raises(KeyboardInterrupt):
        main(monkeypatch, tmp_path, {"1x32": rows, "8x128": KeyboardInterrupt()})
    found = read_csv(tmp_path / "out" / "cpu.csv")
    assert [(r["provider"], r["ratio"], r["threads"].isdigit()) for r in found] == [
        (OURS, "1.00", True),
        ("openvino", "1.00", True),
    ]
    ElementTree.parse(tmp_path / "out" / "cpu.svg")


def test_what_cannot_be_made_is_said_and_kept_out(monkeypatch, tmp_path, capsys):
    from bench import bench_cpu as bench

    monkeypatch.setitem(bench.PROVIDERS, "onnxruntime", (("float32", "int8"), ("torch", "onnx")))
    monkeypatch.setattr(bench.importlib.util, "find_spec", lambda name: name)
    monkeypatch.setattr(bench, "prepare", lambda name, *_: "int8 could not be made" if name == "int8" else "")
    found = bench.absences(["onnxruntime"], ["int8", "float32"], tmp_path, True, tmp_path / "log")
    assert found == {("onnxruntime", "int8"): "int8 could not be made"}
    assert capsys.readouterr().err == "onnxruntime is skipped: int8 could not be made\n"


def test_a_part_that_fails_says_why_and_leaves_nothing(tmp_path, capsys):
    from bench import bench_cpu as bench

    why = bench.prepare("int8", tmp_path, True, tmp_path / "log")  # there is no ONNX file to start from, or no package
    assert why.startswith("int8 could not be made: ")
    assert not (tmp_path / "int8").exists()
    assert "Traceback" in (tmp_path / "log").read_text()


SMOKE = """
import sys
from bench import bench_cpu as bench
bench.PROVIDERS["openvino"] = (("float32",), ("no-such-package",))
sys.exit(bench.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_smoke_run_against_transformers_without_a_peer(tmp_path):
    from bench.records import read_csv

    words = "--smoke --cases ragged --dtype float32 --threads 1 --repeats 1 --check --providers modernbert-lite"
    folders = ["--work", str(tmp_path / "work"), "--out", str(tmp_path / "out")]
    command = [sys.executable, "-c", SMOKE, *words.split(), "transformers", "openvino", *folders]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "openvino is skipped: not installed: no-such-package (pip install" in done.stderr
    found = {r["provider"]: r for r in read_csv(tmp_path / "out" / "cpu.csv")}
    assert found["openvino"]["note"] == "not installed: no-such-package"
    assert found["openvino"]["tokens_per_s"] == ""
    for name in (OURS, "transformers"):
        assert int(found[name]["tokens_per_s"]) > 0
        assert float(found[name]["max_difference"]) <= 2e-5
        assert float(found[name]["worst_cosine"]) > 0.9999
        assert 100 < float(found[name]["peak_mb"]) < 2000
        assert 0 < float(found[name]["load_s"]) <= float(found[name]["first_s"])
    assert {r["tokens"] for r in found.values()} == {"103"}
    assert {r["smoke"] for r in found.values()} == {"smoke"}
    assert f"| float32 | {OURS} |" in done.stdout
    parts = {path.name for path in (tmp_path / "work" / "smoke").iterdir()}
    assert "checkpoint" in parts
    assert not parts & {"checkpoint.new", "onnx"}  # nobody here needs the export
