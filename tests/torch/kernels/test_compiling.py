"""The kernels compiled for cards, without one: that they run, or how fast, it does not tell."""

import os
import re

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("horovod.torch")
triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from benchmarks.gpu.compiled import BY_SCAN, BY_WORDS, passes  # noqa: E402
from hvd_dls.torch.kernels import finding, selector, settling, settling_all  # noqa: E402
from hvd_dls.torch.on_device import have_triton  # noqa: E402

pytestmark = [
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") == "1", reason="Triton interprets, and compiles nothing"
    ),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there: they are run on it"),
    pytest.mark.skipif(not have_triton(), reason="this Triton is too old"),
]
CARDS = [80, 90]
BLOCKS = {"BLOCK": selector.BLOCK, "TILE": selector.TILE}
COOPERATIVE = {"maxnreg": selector.REGISTERS, "launch_cooperative_grid": True}
FLOAT, INT, LONG = "*fp32", "*i32", "*i64"


def compiled(kernel, types, constants, card, **options):
    """The program of a card; arrays begin at 16 bytes."""
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in types if types[n][0] == "*"},
    )
    return triton.compile(source, target=GPUTarget("cuda", card, 32), options=options).asm


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_kernels_of_several_layers(kind, aligned, card):
    kind = getattr(tl, kind)
    types = {"table": LONG, "layer_of": LONG, "where": INT, "what": INT, "words": INT, "work": INT}
    constants = {"KIND": kind, "ALIGNED": aligned, **BLOCKS}
    found = compiled(finding.find_all, types, constants, card, **COOPERATIVE)
    types = {"table": LONG, "layer_of": INT, "indices": INT, "values": FLOAT, "starts": INT}
    constants = {"ALIGNED": aligned, "BLOCK": settling.BLOCK, "LANES": settling.LANES}
    constants |= {"GRADIENT": kind, "OUT": kind}
    settled = compiled(settling_all.settle_all, types, constants, card)
    for program in (found, settled):
        assert program["cubin"]
        # What is aligned is read by 16 bytes at once, as by the kernels of one layer.
        wide = re.search(r"ld\.global[^;]*\.v4", program["ptx"])
        assert (wide is not None) == aligned


@pytest.mark.parametrize("card", CARDS)
def test_where_blocks_begin(card):
    types = {"indices": INT, "starts": INT}
    constants = {"BLOCK": settling.BLOCK, "TILE": settling.TILE}
    assert compiled(settling.begins, {**types, "ends": INT}, constants, card)["cubin"]
    types |= {"bounds": INT, "table": LONG, "layer_of": INT}
    assert compiled(settling_all.begins_all, types, constants, card)["cubin"]


@pytest.mark.parametrize("card", CARDS)
@pytest.mark.parametrize("kind", [FLOAT, "*fp16", "*bf16"])
def test_kernels_of_one_layer(kind, card):
    types = {"residual": FLOAT, "gradient": kind, "where": INT, "what": INT, "work": INT}
    assert compiled(finding.find, types, BLOCKS, card, **COOPERATIVE)["cubin"]
    types = {"residual": FLOAT, "gradient": kind, "total": FLOAT, "out": kind, "scale": "fp32"}
    types |= {"indices": INT, "values": FLOAT, "starts": INT}
    constants = {"BLOCK": settling.BLOCK, "LANES": settling.LANES}
    for own in (True, False):
        constants["HAS_RESIDUAL"] = own
        assert compiled(settling.settle, types, constants, card)["cubin"]


@pytest.mark.parametrize("card", CARDS)
def test_marking_leaves_little_to_do_beside_waiting_for_memory(card):
    scan, words = passes(card)[BY_SCAN], passes(card)[BY_WORDS]
    assert words.loads == scan.loads == 2 * selector.BLOCK // (32 * selector.WARPS) // 4
    assert words.instructions < scan.instructions / 3
    assert words.barriers < scan.barriers / 5
