"""The same gradients through horovod.torch and horovod.tensorflow: the same bytes, ratios, sums.

One job for each framework, since both halves of Horovod cannot live in one process.
"""

import json

import pytest

from tests.jobs import horovodrun, needs

pytestmark = needs("torch", "tensorflow")

COMMON = """
import json, sys, zlib
import numpy as np
from hvd_dls.core.session.session import Session

OPTIONS = dict(
    density=0.05, cost_rule=False, dense_below=0, prior="uniform", bucket_bytes=10_000,
)
SHAPES = dict(conv=(16, 9, 7), hidden=(60, 50), small=(20, 31), bias=(60,))
STEPS = 8
sent = []  # CRC of each bucket's payload

def gradients(step, rank, dtype):
    generator = np.random.default_rng([step, rank])
    scales = dict(conv=0.01, hidden=1.0, small=7.0, bias=1.0)
    return {
        n: (scales[n] * generator.standard_t(4, size=shape)).astype(dtype)
        for n, shape in SHAPES.items()
    }

payload_of = Session.payload

def listening(self, bucket):
    payload = payload_of(self, bucket)
    sent.append((bucket, zlib.crc32(payload.tobytes())))
    return payload

Session.payload = listening

def report(trainer):
    framework, folder, *cases = sys.argv[1:]
    for case in cases:
        dtype, strategy = case.split("-")
        step_of, out = trainer(dtype, strategy), []
        for step in range(STEPS):
            reduced, record = step_of(gradients(step, hvd.rank(), dtype))
            out.append(dict(
                payloads=sorted(sent),
                k=record.k.tolist(),
                reduced={n: zlib.crc32(r.tobytes()) for n, r in reduced.items()},
            ))
            sent.clear()
        with open(f"{folder}/{framework}.{case}.{hvd.rank()}.json", "w") as file:
            json.dump(out, file)
"""

TORCH = """
import horovod.torch as hvd, torch
from hvd_dls.torch import DLSCompressor

hvd.init()

def trainer(dtype, strategy):
    dtype = getattr(torch, dtype)
    parameters = {n: torch.nn.Parameter(torch.zeros(s, dtype=dtype)) for n, s in SHAPES.items()}
    compression = DLSCompressor(parameters.items(), strategy=strategy, **OPTIONS)
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(parameters.values(), lr=1), named_parameters=parameters.items(),
        compression=compression,
    )

    def step_of(given):
        optimizer.zero_grad()
        sum((p * torch.from_numpy(given[n])).sum() for n, p in parameters.items()).backward()
        optimizer.synchronize()
        with optimizer.skip_synchronize():
            optimizer.step()
        return {n: p.grad.numpy() for n, p in parameters.items()}, compression.last_step()

    return step_of

report(trainer)
"""

TENSORFLOW = """
import horovod.tensorflow as hvd, tensorflow as tf
from hvd_dls.tensorflow import DLSCompressor

hvd.init()

def trainer(dtype, strategy):
    variables = {n: tf.Variable(tf.zeros(s, dtype), name=n) for n, s in SHAPES.items()}
    compression = DLSCompressor(variables.values(), strategy=strategy, **OPTIONS)

    @tf.function
    def step(given):
        with tf.GradientTape() as tape:
            loss = tf.add_n([tf.reduce_sum(v * given[n]) for n, v in variables.items()])
        tape = hvd.DistributedGradientTape(tape, compression=compression)
        return dict(zip(variables, tape.gradient(loss, list(variables.values()))))

    def step_of(given):
        reduced = step({n: tf.constant(g) for n, g in given.items()})
        return {n: g.numpy() for n, g in reduced.items()}, compression.last_step()

    return step_of

report(trainer)
"""

CASES = ["float32-dls", "float64-layerwise"]  # type of the gradients and strategy


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """With what each rank of both jobs has reported of each case."""
    folder = tmp_path_factory.mktemp("agree")
    for framework, program in (("torch", TORCH), ("tensorflow", TENSORFLOW)):
        file = folder / f"with_{framework}.py"
        file.write_text(COMMON + program)
        horovodrun(2, [str(file), framework, str(folder), *CASES])
    return folder


@pytest.mark.parametrize("case", CASES)
def test_payloads_ratios_and_averages_are_the_same_in_both(folder, case):
    for rank in range(2):
        of_torch, of_tensorflow = (
            json.loads((folder / f"{framework}.{case}.{rank}.json").read_text())
            for framework in ("torch", "tensorflow")
        )
        assert len(of_torch) == 8
        for step, (one, other) in enumerate(zip(of_torch, of_tensorflow, strict=True)):
            assert len(one["payloads"]) == 3
            assert one == other, f"rank {rank}, step {step}"
        moved = of_torch[0]["k"] != of_torch[-1]["k"]
        assert moved == case.endswith("-dls")
