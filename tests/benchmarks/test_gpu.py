"""The benchmarks of a GPU: dry runs on the CPU, and the page of their figures."""

from __future__ import annotations

import copy
import json
import sys

import numpy as np
import pytest

from tests.benchmarks.running import run
from tests.jobs import horovodrun, needs

pytest.importorskip("torch")
import torch

from benchmarks.gpu import methods, passes, report, settling, tables, waits

CPU = torch.device("cpu")
SPREAD = {"median": 0.2, "min": 0.1, "max": 0.3}
CALLS = {"calls": {"cudaEventSynchronize": 3}, "ms": {"cudaEventSynchronize": 1.5}, "launches": 9}
FIGURES = {
    "about": {
        "device": "cuda",
        "card": {"name": "A card", "memory_gib": 80.0, "l2_mib": 50.0},
        "cores": 16,
        "machine": "x86_64",
        "date": "2026-01-01",
        "quick": False,
        "python": "3.12",
        "torch": "2.11",
        "missing": {passes.KERNELS: "do not run here: CompilationError: no"},
    },
    "stalls": {
        "complete": True,
        "rows": [
            {
                "model": "resnet50",
                "method": passes.OPERATIONS,
                "layers": 161,
                "behind_sleep": {"did_not_wait": 160, "waited": ["fc.weight"], "longest_ms": 9.0},
                "warnings": {"compress": 0, "rest": 4},
                "calls": {"compress": CALLS, "rest": CALLS, "device_busy_ms": 12.0},
            },
        ],
    },
    "memory": {
        "complete": False,
        "rows": [
            {
                "model": "resnet50",
                "method": passes.OPERATIONS,
                "density": 0.01,
                "gradient_bytes": 100_000_000,
                "steady_bytes": 105_000_000,
                "peak_bytes": 150_000_000,
            }
        ],
    },
    "settle": {
        "complete": True,
        "rows": [
            {
                "n": 1_000_000,
                "density": 0.01,
                "ranks": 4,
                "ms": {methods.FLOOR: {"device": SPREAD}},
                "errors": {passes.KERNELS: "OutOfMemoryError: too little"},
            }
        ],
    },
}


def test_a_dry_run_measures_all_parts_and_leaves_their_figures(tmp_path):
    files = ["--json", f"{tmp_path}/x.json", "--markdown", f"{tmp_path}/x.md"]
    output = run(
        "-m", "benchmarks.gpu", "--device", "cpu", "--quick", "--only",
        "step,launches,stalls,memory,selection", *files,
    )  # fmt: skip
    figures = json.loads((tmp_path / "x.json").read_text())
    for name in ("step", "launches", "stalls", "memory", "selection"):
        assert figures[name]["complete"]
        assert report.PARTS[name][0] in output
    rows = figures["selection"]["rows"]
    assert {row["n"] for row in rows} == {100_000, 1_000_000}
    assert all(row["exact"][passes.OPERATIONS] for row in rows)
    assert not any("device" in times for row in rows for times in row["ms"].values())
    (row,) = figures["launches"]["rows"]
    assert row["counts"]["settled"]["operations"] > row["compressed"]
    assert row["counts"]["dense"]["operations"] == row["layers"] - row["compressed"]
    assert all(milliseconds > 0 for milliseconds in row["host_ms"].values())
    assert "a CPU: a dry run" in output
    assert (tmp_path / "x.md").read_text() in run("-m", "benchmarks.gpu.report", files[1])


def test_without_horovod_the_passes_are_still_there():
    code = "import sys; sys.modules['horovod'] = None\n"
    code += "import importlib.util as u; find = u.find_spec\n"
    code += "u.find_spec = lambda name, *more: None if name == 'horovod' else find(name, *more)\n"
    code += "import torch; from benchmarks.gpu import __main__, passes\n"
    code += "print(list(passes.ways(torch.device('cpu')).makers))"
    assert passes.OPERATIONS in run("-c", code)


def test_a_part_that_fails_is_named_and_the_others_go_on(monkeypatch, capsys, tmp_path):
    from benchmarks.gpu import __main__ as command

    def fails(device, found, quick, keep):
        keep(FIGURES["memory"]["rows"][0])
        raise RuntimeError("out of luck")

    monkeypatch.setitem(command.PARTS, "memory", fails)
    arguments = ["gpu", "--device", "cpu", "--quick", "--only", "memory", "--json"]
    monkeypatch.setattr(sys, "argv", [*arguments, f"{tmp_path}/x.json"])
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    assert "This part ended early: RuntimeError: out of luck" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "x.json").read_text())["memory"]["rows"]) == 1


def test_the_report_says_what_was_measured_and_what_not():
    text = report.section(copy.deepcopy(FIGURES))
    assert "A card (80 GiB, second-level cache of 50 MiB); 16 cores of x86_64" in text
    assert "Not measured: fused kernels, which do not run here: CompilationError: no." in text
    assert "| 100.0 | 105.0 (1.05×) | 150.0 (1.50×) |" in text
    assert text.count("This part was not finished.") == 1
    assert "| 160 of 161 | 9.00 | 0, 4 | 3 cudaEventSynchronize (1.50 ms); 3" in text
    assert "the host waited at: fc.weight" in text
    assert "| 0.200 (0.100 to 0.300) | failed |" in text
    assert "Failed: fused kernels: OutOfMemoryError: too little" in text
    assert "Time of the host" not in text  # not measured in these figures


def test_it_is_told_which_ways_leave_the_same_bits():
    about = {"model": "tiny", "density": 0.01}
    rows = [
        {**about, "method": method, "checksum": checksum}
        for method, checksum in (("one", 7), ("two", 7), ("three", 8))
    ]
    assert "tiny, 0.01: residuals and sums" in tables._same_bits(rows)
    assert tables._same_bits(rows).endswith("the same bits as one: two\n")
    assert tables._same_bits(rows[:1]) == ""


@pytest.mark.parametrize(
    ("value", "text"), [(1234.5, "1,234"), (12.34, "12.3"), (1.234, "1.23"), (0.01234, "0.012")]
)
def test_numbers_are_rounded_to_what_they_tell(value, text):
    assert tables.number(value) == text


def test_what_ranks_send_is_ascending_and_unique():
    for indices, values in settling.sent_by_all(1000, 900, 3, np.random.default_rng(0)):
        assert indices.dtype == np.uint32
        assert len(indices) == len(values) == 900
        assert (np.diff(indices.astype(int)) > 0).all()
        assert indices[-1] < 1000


def test_the_sampled_threshold_finds_about_k_large_entries():
    torch.manual_seed(0)
    gradient = torch.randn(100_000)
    layer = methods.Layer(torch.zeros(100_000), [gradient], torch.empty(100_000), 1000)
    found = methods.sampled(layer).launch(0)
    assert 500 < len(found) <= 1000
    assert found.abs().min() > 2


def test_a_wrong_result_is_seen():
    gradient = torch.arange(1.0, 5001.0)
    layer = methods.Layer(torch.zeros(5000), [gradient], torch.empty(5000), 10)
    right = methods.ours(layer, passes.ways(CPU).makers[passes.OPERATIONS])
    assert methods.is_exact(layer, right)

    def lacks_one(future):
        found = right.finish(future)
        return found._replace(indices=found.indices[1:], values=found.values[1:])

    assert not methods.is_exact(layer, methods.Method(right.launch, lacks_one))


class Event:
    """As the profiler's, on the host's side or on the device's."""

    def __init__(self, name, start, end, on_host=True):
        kinds = torch.autograd.DeviceType
        self.name, self.device_type = name, kinds.CPU if on_host else kinds.CUDA
        self.time_range = torch.autograd.profiler_util.Interval(start, end)


def test_calls_are_counted_in_the_part_that_they_are_in():
    events = [
        Event("part compress", 0, 100),
        Event("part compress", 5, 150, on_host=False),
        Event("cuLaunchKernelEx", 10, 12),
        Event("kernel", 20, 60, on_host=False),
        Event("part rest", 100, 200),
        Event("cudaEventSynchronize", 110, 160),
        Event("cudaMemcpyAsync", 161, 165),
        Event("cudaDeviceSynchronize", 250, 260),  # the profiler's own
    ]
    counted = waits._counted(events)
    assert counted["compress"] == {"calls": {}, "ms": {}, "launches": 1}
    assert counted["rest"] == {
        "calls": {"cudaEventSynchronize": 1},
        "ms": {"cudaEventSynchronize": 0.05},
        "launches": 1,
    }
    assert counted["device_busy_ms"] == 0.04
    assert "no records" in waits._counted(events[:1])["note"]


@needs("horovod")
def test_a_training_on_two_ranks_keeps_them_equal(tmp_path):
    options = ["--device", "cpu", "--steps", "22", "--batch", "8", "--json", f"{tmp_path}/x.json"]
    output = horovodrun(2, ["-m", "benchmarks.gpu.two_ranks", *options])
    assert "A training on two ranks that share the device" in output
    rows = {
        row["method"]: row
        for row in json.loads((tmp_path / "x.json").read_text())["two_ranks"]["rows"]
    }
    row = rows[passes.OPERATIONS]
    assert (row["same"], row["compared"], row["ranks"]) == (2, 2, 2)
    assert row["loss"][1] < row["loss"][0]
    assert "ms" in rows["dense"]
