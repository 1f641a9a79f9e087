"""The race to a target loss, on two hosts."""

from __future__ import annotations

import json

from tests.benchmarks.running import PNG, needs_hosts, run
from tests.jobs import needs


@needs_hosts
@needs("torch", "horovod", "sklearn")
def test_all_methods_train_to_the_end_and_their_ranks_agree(tmp_path):
    files = ["--json", str(tmp_path / "r.json"), "--picture", str(tmp_path / "r.png")]
    files += ["--times", str(tmp_path / "t.png")]
    methods = ["dense", "ddp", "powersgd:1", "local:3", "local-dls:3:0.1", "dls:0.01"]
    options = ["--hosts", "2", "--rates", "1gbit", "--task", "digits", "--steps", "8"]
    output = run("-m", "benchmarks.race", *options, "--methods", *methods, *files)
    assert "RANKS DIFFER" not in output
    (job,) = json.loads((tmp_path / "r.json").read_text())
    assert list(job["methods"]) == methods
    assert all(job["alike"].values())
    for name, result in job["methods"].items():
        ends = (
            [3.0, 6.0, 8.0] if name.startswith("local") else [float(step) for step in range(1, 9)]
        )
        assert result["curve"]["step"] == ends
        assert result["curve"]["seconds"] == sorted(result["curve"]["seconds"])
    dense, dls = (job["methods"][name]["sent_bytes"] for name in ("dense", "dls:0.01"))
    assert 0 < dls < dense
    assert job["methods"]["dense"]["accuracy"] == job["methods"]["ddp"]["accuracy"]
    for picture in ("r.png", "t.png"):
        assert (tmp_path / picture).read_bytes().startswith(PNG)
