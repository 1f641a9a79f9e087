"""The demo from end to end, as ``make demo`` runs it, with fewer epochs."""

import re
import subprocess
import sys

from tests.jobs import JOB, ROOT


def test_the_demo_prints_its_table_and_draws_its_picture(tmp_path):
    command = [sys.executable, "examples/demo.py", "-np", "2", "--density", "0.02"]
    job = subprocess.run(
        [*command, "--epochs", "3", "--output", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=JOB,
    )
    assert job.returncode == 0, job.stdout + job.stderr
    rows = dict(re.findall(r"^\| (dense|layer-wise top-k|DLS) \| (.*) \|$", job.stdout, re.M))
    assert set(rows) == {"dense", "layer-wise top-k", "DLS"}
    sent = {kind: float(re.search(r"([\d.]+) kB", row)[1]) for kind, row in rows.items()}
    assert sent["dense"] > 10 * sent["layer-wise top-k"]
    assert re.search(r"DLS: spread below 1\.5 from step \d", job.stdout)
    assert (tmp_path / "thresholds.png").read_bytes().startswith(b"\x89PNG")
