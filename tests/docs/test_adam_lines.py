"""What docs/adam.md says to write for Adam: torch takes it, and so does the compressor."""

import re
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("horovod.torch")

PAGE = Path(__file__).parents[2] / "docs" / "adam.md"


def test_the_lines_run():
    from hvd_dls.torch import DLSCompressor

    lines = re.search(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[1]
    names = {"torch": torch, "DLSCompressor": DLSCompressor, "model": torch.nn.Linear(3, 2)}
    exec(lines, names)
    assert names["optimizer"].param_groups[0]["betas"][0] == 0
    assert names["compression"].config.momentum > 0
