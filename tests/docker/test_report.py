"""What the matrix writes of its results."""

import pytest


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("==== 153 passed, 12 skipped, 3 deselected in 32.10s ====\n", (153, 12)),
        ("=== 1 failed, 2 passed in 61.20s (0:01:01) ===\n", (2, 0)),
        ("[1]<stdout>:5 passed in 1.00s\n7 passed, 1 warning in 2.00s\n", (7, 0)),
        ("no summary\n", (0, 0)),
    ],
)
def test_counts(report, output, expected):
    assert report.counts(output) == expected


def test_a_document_without_markers_is_left_alone(report, tmp_path):
    document = tmp_path / "docker.md"
    document.write_text("text")
    with pytest.raises(ValueError, match="between"):
        report.write_between(document, "table")
    assert document.read_text() == "text"


@pytest.mark.parametrize("text", ["", "[]", '{"a": {"unknown": 1}}', "{"])
def test_results_of_another_version_are_as_none(report, tmp_path, text):
    (tmp_path / "results.json").write_text(text)
    assert report.load(tmp_path / "results.json") == {}


def test_a_reason_cannot_break_the_table(report):
    text = report.table([report.Result("a", "failed", "one | two\nthree")])
    assert len({line.count("|") for line in text.splitlines()}) == 1
