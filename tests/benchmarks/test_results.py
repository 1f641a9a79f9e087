"""The page of all benchmarks, from outputs that are kept."""

from __future__ import annotations

from benchmarks import results


def test_the_page_has_a_section_for_each_output_that_is_kept(monkeypatch, tmp_path):
    kept, page = tmp_path / "build" / "results", tmp_path / "docs" / "results.md"
    kept.mkdir(parents=True)
    page.parent.mkdir()
    for name, path in (("ROOT", tmp_path), ("KEPT", kept), ("PAGE", page)):
        monkeypatch.setattr(results, name, path)
    for name in ("network8", "cost_model"):
        (kept / f"{name}.txt").write_text(f"2 cores\noutput of {name}\n")
    picture = tmp_path / "docs" / "images" / "network8.png"
    picture.parent.mkdir()
    picture.touch()
    results.build_page()
    text = page.read_text()
    assert text.startswith(results.INTRODUCTION)
    assert text.count("\n## ") == 2
    command = "python -m benchmarks.network --hosts 8 --model mlp1m --rates 1gbit 100mbit"
    assert f"`{command} --density 0.01 --rounds 3` (2 cores)" in text
    assert "```\noutput of network8\n```\n\n![" in text
    files = "build/results/exchange.json build/results/network.json"
    assert f"`python -m benchmarks.cost_model {files}` (2 cores)" in text
    assert text.count("](images/") == 1
