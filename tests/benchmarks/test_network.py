"""The network benchmark, on two hosts."""

from __future__ import annotations

import json

from tests.benchmarks.running import PNG, QUICK, needs_hosts, run
from tests.jobs import needs


@needs_hosts
@needs("torch", "horovod")
def test_network_counts_what_telemetry_claims_and_headers(tmp_path):
    files = ["--json", str(tmp_path / "n.json"), "--picture", str(tmp_path / "n.png")]
    options = ["--hosts", "2", "--rates", "1gbit", "--density", "0.05", *files]
    peers = ["--peers", "ddp", "powersgd:1"]
    output = run("-m", "benchmarks.network", *QUICK, *options, *peers)
    assert "2 hosts, 1gbit: tiny" in output
    (job,) = json.loads((tmp_path / "n.json").read_text())["jobs"]
    assert [row["method"] for row in job["rows"]][3:] == [
        "ddp",
        "powersgd:1",
        "layerwise:0.05",
        "dls:0.05",
        "dls:0.05:bfloat16",
        "sparse_allreduce:0.05",
    ]
    for row in job["rows"]:
        assert row["counted_bytes"] > row["claimed_bytes"]
    assert (tmp_path / "n.png").read_bytes().startswith(PNG)
