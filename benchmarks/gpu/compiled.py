"""What the pass over a layer is compiled to, for cards that need not be there.

    PYTHONPATH=$PWD:build/triton python -m benchmarks.gpu.compiled --cards 80 90

Instructions and barriers of one turn of its loop, which looks at a block of entries: how much there
is to do beside waiting for memory.  How long it takes only a card can tell.  Triton brings the
disassembler along.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.command_line import make_parser
from benchmarks.common.reporting import markdown

BY_SCAN, BY_WORDS = "find: counted block by block", "find_all: marked with a bit each"
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)(.*?);")
_LABEL, _BRANCH = re.compile(r"^\s*\.(L_\w+):"), re.compile(r"\.(L_\w+)")


class Pass(NamedTuple):
    """A turn of the loop.

    Attributes:
        instructions: of a warp.
        barriers: at which all threads of a program wait for each other.
        shared: accesses to memory that they share.
        loads: from the device's memory.
        registers: of a thread, in the whole kernel.
    """

    instructions: int
    barriers: int
    shared: int
    loads: int
    registers: int


def passes(card: int) -> dict[str, Pass]:
    """Compiles both ways for a card.

    Args:
        card: its compute capability, times 10.
    """
    import triton.language as tl

    from hvd_dls.torch.kernels import finding, selector

    blocks = {"BLOCK": selector.BLOCK, "TILE": selector.TILE}
    integers = dict.fromkeys(("where", "what", "words", "work"), "*i32")
    one = {"residual": "*fp32", "gradient": "*fp32", "n": "i32", **integers}
    many = {"table": "*i64", "layer_of": "*i64", **integers}
    all_layers = {"KIND": tl.float32, "ALIGNED": True, **blocks}
    return {
        BY_SCAN: _first_loop(finding.find, one, blocks, card),
        BY_WORDS: _first_loop(finding.find_all, many, all_layers, card),
    }


def _first_loop(kernel: Any, types: dict[str, str], constants: dict[str, Any], card: int) -> Pass:
    """The first loop of a kernel, whose arrays begin at 16 bytes, as does their number of entries.

    Args:
        kernel: of ``hvd_dls.torch.kernels.finding``.
        types: of arguments, as Triton names them; of the others int32.
        constants: arguments that are known when it is compiled.
        card: compute capability, times 10.
    """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from hvd_dls.torch.kernels import selector

    names = kernel.arg_names
    source = ASTSource(
        fn=kernel,
        signature={n: "constexpr" if n in constants else types.get(n, "i32") for n in names},
        constexprs={(names.index(n),): value for n, value in constants.items()},
        attrs={(names.index(n),): [["tt.divisibility", 16]] for n in types if n in names},
    )
    options = {
        "num_warps": selector.WARPS,
        "maxnreg": selector.REGISTERS,
        "launch_cooperative_grid": True,
    }
    program = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(program.asm["cubin"])
        file.flush()
        code = _said(tools / "nvdisasm", "-c", file.name)
        used = _said(tools / "cuobjdump", "-res-usage", file.name)
    registers = re.search(r"REG:(\d+)", used)
    assert registers, "cuobjdump says nothing of registers"
    count = Counter(name.split(".")[0] for name in first_loop(code))
    loads = sum(count[name] for name in ("LDG", "LDGSTS"))
    shared = sum(count[name] for name in ("LDS", "STS", "ATOMS", "LDSM", "STSM"))
    return Pass(count.total(), count["BAR"], shared, loads, int(registers[1]))


def first_loop(code: str) -> list[str]:
    """Names of the instructions of the loop that begins first; of several the shortest.

    Args:
        code: what ``nvdisasm -c`` prints.
    """
    names: list[str] = []
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for line in code.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(names)
        elif instruction := _INSTRUCTION.search(line):
            names.append(instruction[1])
            target = _BRANCH.search(instruction[2])
            if instruction[1].startswith("BRA") and target and target[1] in labels:
                loops.append((labels[target[1]], len(names)))
    begin, end = min(loops)
    return names[begin:end]


def _said(*command: Any) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def main() -> None:
    """Prints a table."""
    parser = make_parser("gpu.compiled", __doc__)
    parser.add_argument(
        "--cards", type=int, nargs="+", default=[80, 90], help="compute capabilities, times 10"
    )
    rows = [
        [way, f"{card / 10}", *found]
        for card in parser.parse_args().cards
        for way, found in passes(card).items()
    ]
    head = ["pass", "card", "instructions", "barriers", "shared memory", "loads", "registers"]
    print(markdown(head, [[str(cell) for cell in row] for row in rows]))


if __name__ == "__main__":
    main()
