"""What docs/adam.md says to write for Adam: torch takes it, and so does the compressor."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("horovod.torch")

PAGE = Path(__file__).parents[2] / "docs" / "adam.md"


@pytest.mark.parametrize("number", [0, 1], ids=["Adam in the compressor", "its first moment"])
def test_the_lines_run(number):
    from hvd_dls.torch import DLSCompressor
    from hvd_dls.torch.refusals import refuse_optimizer

    lines = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)[number]
    names = {
        "torch": torch,
        "hvd": SimpleNamespace(size=lambda: 4),
        "DLSCompressor": DLSCompressor,
        "model": torch.nn.Linear(3, 2),
    }
    exec(lines, names)
    optimizer, config = names["optimizer"], names["compression"].config
    optimizer.op = None
    refuse_optimizer(optimizer, config, None)
    assert config.adam or config.momentum
