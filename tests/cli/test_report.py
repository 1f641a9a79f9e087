"""``hvd-dls report``: a page of its own from logs, whatever they hold."""

import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from hvd_dls.cli.main import main
from hvd_dls.core.balancing.layers import layer_spec
from tests.core.insight.test_logs import OTHER, write

ROOT = Path(__file__).parents[2]
_EMPTY = {"meta"}


class Page(HTMLParser):
    """A page's elements and words; refuses what is not closed in order."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text, self._open = [], "", []
        self.feed(path.read_text(encoding="utf-8"))
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in _EMPTY:
            self._open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        self.text += data

    def count(self, tag, **attributes):
        wanted = attributes.items()
        return sum(tag == name and wanted <= of.items() for name, of in self.elements)


def report(tmp_path, *runs):
    output = tmp_path / "out" / "page.html"
    assert main(["report", *map(str, runs), "-o", str(output)]) == 0
    return Page(output)


def test_a_page_shows_runs_beside_each_other_and_needs_nothing_from_outside(tmp_path):
    write(tmp_path / "runs" / "dls.jsonl", 12)
    write(tmp_path / "runs" / "layerwise.jsonl", 9, strategy="layerwise")
    page = report(tmp_path, tmp_path / "runs")
    for name in ("runs/dls", "runs/layerwise", "conv2.weight", "find", "settle", "dense training"):
        assert name in page.text
    for tag, attributes in page.elements:
        for name in ("src", "href", "xlink:href", "action"):
            assert attributes.get(name, "data:").startswith("data:"), (tag, name)
    content = (tmp_path / "out" / "page.html").read_text()
    assert "@import" not in content
    assert "http" not in content
    assert page.count("svg", **{"class": "map"}) == 2
    pictures = [a for tag, a in page.elements if tag == "svg" and "aria-hidden" not in a]
    assert all(a.get("role") == "img" and a.get("aria-label") for a in pictures)
    names = [a["data-name"] for tag, a in page.elements if tag == "polyline" and "data-name" in a]
    assert names.count("fc.weight") == 2


def test_one_run_with_one_step_is_enough(tmp_path):
    write(tmp_path / "run.jsonl", 1)
    page = report(tmp_path, f"called so={tmp_path / 'run.jsonl'}")
    assert "called so" in page.text


def test_hundreds_of_layers_make_a_page_of_bearable_size(tmp_path):
    layers = [layer_spec(f"block{i}.weight", (12, 10)) for i in range(400)]
    write(tmp_path / "many.jsonl", 30, layers=layers, density=0.1, dense_below=0)
    page = report(tmp_path, tmp_path / "many.jsonl")
    names = {a["data-name"] for tag, a in page.elements if tag == "polyline" and "data-name" in a}
    assert len(names) >= 400
    assert (tmp_path / "out" / "page.html").stat().st_size < 3_000_000


def test_models_with_other_layers_are_shown_beside_each_other(tmp_path):
    write(tmp_path / "a.jsonl", 5)
    write(tmp_path / "b.jsonl", 5, layers=OTHER, dense_below=0)
    page = report(tmp_path, tmp_path / "a.jsonl", tmp_path / "b.jsonl")
    assert "a.weight" in page.text
    assert "conv2.weight" in page.text


def test_what_is_cut_off_or_strange_is_told_and_the_rest_is_shown(tmp_path, capsys):
    write(tmp_path / "good.jsonl", 4)
    content = (tmp_path / "good.jsonl").read_bytes()
    (tmp_path / "cut.jsonl").write_bytes(content[:-30])
    (tmp_path / "bad.jsonl").write_bytes(b"\xff\xfe")
    page = report(tmp_path, tmp_path, tmp_path / "missing.jsonl")
    assert "cut: 1 line(s)" in page.text
    errors = capsys.readouterr().err
    assert "bad.jsonl" in errors
    assert "missing.jsonl" in errors


def test_names_are_shown_as_they_are(tmp_path):
    name = '<script>alert("&")</script>\'x'
    layers = [layer_spec(name, (40, 50)), layer_spec("b", (60, 20))]
    write(tmp_path / "run.jsonl", 3, layers=layers, dense_below=0)
    page = report(tmp_path, f"<b>={tmp_path / 'run.jsonl'}")
    assert page.count("script") == 1
    assert page.count("b") == 0
    assert any(attributes.get("data-name") == name for _, attributes in page.elements)


def test_a_training_of_which_nothing_is_compressed_has_a_page_too(tmp_path):
    write(tmp_path / "run.jsonl", 3, dense_below=1_000_000)
    assert "0 + 6 dense" in report(tmp_path, tmp_path / "run.jsonl").text


def test_dense_steps_at_first_are_shown(tmp_path):
    write(tmp_path / "run.jsonl", 6, dense_steps=3)
    report(tmp_path, tmp_path / "run.jsonl")


@pytest.mark.parametrize("argument", ["none.jsonl", "folder"])
def test_nothing_to_show_is_an_error(tmp_path, capsys, argument):
    (tmp_path / "folder").mkdir()
    assert main(["report", str(tmp_path / argument), "-o", str(tmp_path / "page.html")]) == 1
    assert "no log to show" in capsys.readouterr().err
    assert not (tmp_path / "page.html").exists()


def test_a_folder_without_logs_is_called_that(tmp_path, capsys):
    (tmp_path / "run.json").write_text("{}")
    assert main(["report", str(tmp_path)]) == 1
    assert "a folder without *.jsonl" in capsys.readouterr().err


def test_the_module_is_the_command_and_imports_no_framework(tmp_path):
    write(tmp_path / "run.jsonl", 2)
    program = (
        "import sys; from hvd_dls.cli.main import main\n"
        f"assert main(['report', {str(tmp_path / 'run.jsonl')!r}, '-o', sys.argv[1]]) == 0\n"
        "assert not {'torch', 'tensorflow', 'horovod', 'matplotlib'} & sys.modules.keys()\n"
    )
    page = tmp_path / "page.html"
    subprocess.run([sys.executable, "-c", program, page], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "hvd_dls", "report", tmp_path / "run.jsonl", "-o", page]
    ended = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    assert "1 run(s)" in ended.stdout
    assert np.char.startswith(page.read_text(), "<!doctype html>")
