"""Many layers in a few launches: beside the core's passes, and sessions, to the bit."""

import gc
from contextlib import ExitStack
from unittest import mock

import numpy as np
import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("horovod.torch")
pytest.importorskip("triton")

from hvd_dls.core.received import Received  # noqa: E402
from hvd_dls.core.selection import passes  # noqa: E402
from hvd_dls.torch import on_device  # noqa: E402
from hvd_dls.torch.kernels import finding, settling, settling_all, together  # noqa: E402
from hvd_dls.torch.kernels.together import Together, runs  # noqa: E402
from hvd_dls.torch.on_device import Device  # noqa: E402
from tests.core.backends import RANKS, check_sessions, make_sessions  # noqa: E402
from tests.core.selection.test_passes import DTYPES, store  # noqa: E402
from tests.torch.devices import array_of, tensor  # noqa: E402
from tests.torch.kernels.test_kernels import (  # noqa: E402
    DEVICE,
    INTERPRETED,
    ROUNDED,
    assert_same,
    bits,
    pytestmark,  # noqa: F401
)
from tests.torch.test_sessions_on_device import SIZES, TORCH  # noqa: E402

KERNELS = [
    finding.find,
    finding.find_all,
    settling.begins,
    settling.settle,
    settling_all.begins_all,
    settling_all.settle_all,
]
LAYERS = (5003, 4096, 70_001, 20_000, 12_289)
WORK_DTYPES = [dtype for work, dtype in DTYPES if work == np.float32]


def device(shared):
    return Device(torch.device(DEVICE), kernels=True, together=shared)


class Launches:
    """Counts launches, by kernel, while it is entered."""

    def __init__(self):
        self.counts = {}
        self._stack = ExitStack()

    def __enter__(self):
        for kernel in KERNELS:
            self._stack.enter_context(mock.patch.object(kernel, "run", self._counted(kernel)))
        return self

    def __exit__(self, *error):
        self._stack.close()

    def _counted(self, kernel):
        run = kernel.run

        def counted(*arguments, **options):
            name = kernel.fn.__name__
            self.counts[name] = self.counts.get(name, 0) + 1
            return run(*arguments, **options)

        return counted


def drawn(sizes, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    return [
        (rng.standard_normal(n).astype(np.float32), store(rng.standard_normal(n), dtype))
        for n in sizes
    ]


# Find -------------------------------------------------------------------------------------------


def put_off(shared, layers, factor=1.0):
    """Futures of all layers, and what the core finds."""
    futures, expected = [], []
    for residual, gradient in layers:
        k = len(residual) // 50
        expected.append(passes.find(residual, gradient, k))
        last = factor * expected[-1].threshold if expected[-1] else 3.0
        there = tensor(residual, DEVICE), tensor(gradient, DEVICE)
        futures.append(device(shared).find(*there, k, last))
    return futures, expected


@pytest.mark.parametrize("dtype", WORK_DTYPES)
@pytest.mark.parametrize("sizes", [LAYERS, LAYERS[1:2], (4096, 8192)])
def test_layers_that_are_searched_together_have_the_core_s_bits(sizes, dtype):
    with Launches() as launches:
        futures, expected = put_off(Together(), drawn(sizes, dtype))
        assert launches.counts == {}
        found = [future.result() for future in reversed(futures)][::-1]
        assert launches.counts == {"find_all": 1}
    assert all(future.ready() for future in futures)
    assert not any(future.searched_again for future in futures)
    for one, two in zip(found, expected, strict=True):
        assert_same(one, two)


def test_those_that_come_in_later_are_searched_later():
    shared = Together()
    with Launches() as launches:
        first, expected = put_off(shared, drawn(LAYERS))
        assert first[0].result() is not None
        second, _ = put_off(shared, drawn(LAYERS[:2], seed=1))
        third, _ = put_off(shared, drawn(LAYERS[:2], np.float16, seed=2))
        for future in (*first, *second, *third):
            assert future.result() is not None
    assert launches.counts == {"find_all": 3}  # gradients of each type have one of their own
    for future, one in zip(first, expected, strict=True):
        assert_same(future.result(), one)


def test_one_layer_s_bad_bound_or_gradient_is_nothing_to_the_others():
    layers = drawn(LAYERS)
    layers[1][1][77] = np.nan
    for factor in (3.0, 1e-6):
        shared = Together()
        bad, _ = put_off(shared, layers[:1], factor)
        good, expected = put_off(shared, layers[1:])
        assert good[0].result() is None
        for one, two in zip(good, expected, strict=True):
            assert_same(one.result(), two)
        found = bad[0].result()
        assert [future.searched_again for future in (*bad, *good)] == [True, *[False] * 4]
        core = passes.find(*layers[0], len(layers[0][0]) // 50)
        assert (found.threshold, bits(found.values)) == (core.threshold, bits(core.values))


def test_searches_that_nobody_waits_for_are_forgotten():
    shared = Together()
    futures, _ = put_off(shared, drawn(LAYERS))
    del futures
    gc.collect()
    with Launches() as launches:
        shared.searches.launch()
        (future,), (expected,) = put_off(shared, drawn(LAYERS[:1]))
        assert_same(future.result(), expected)
    assert launches.counts == {"find_all": 1}


# Settle -----------------------------------------------------------------------------------------


def sent_of(sizes, ranks, seed=0):
    """What ranks sent of a bucket's layers, some of them nothing: (indices, values) of each."""
    rng = np.random.default_rng(seed)
    sent = []
    for _ in range(ranks):
        of_rank = []
        for n in sizes:
            share = rng.choice([0.0, 0.01, 0.2])
            indices = np.flatnonzero(rng.random(n) < share).astype(np.uint32)
            of_rank.append((indices, rng.standard_normal(len(indices)).astype(np.float32)))
        sent.append(of_rank)
    return sent


def received(sent, position, ranks):
    """As ``Payloads.received`` has it, of a bucket whose entries are ``ranks``."""
    counts = np.array([[len(indices) for indices, _ in of_rank] for of_rank in sent], np.int64)
    ends = counts.cumsum(axis=1)
    bounds = np.stack([ends - counts, ends], axis=2)[:, position]
    return Received(ranks, bounds, np.empty((len(sent), 3), np.int64))


@pytest.mark.parametrize("kind", [np.float32, *ROUNDED])
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("sizes", [LAYERS, (1, 2, 65), (4096, 20_000)])
def test_layers_that_are_settled_together_have_the_core_s_bits(sizes, ranks, kind):
    rng, shared = np.random.default_rng(1), Together()
    buckets = []
    for number in range(2):
        sent = sent_of(sizes, ranks, seed=number)
        joined = [tuple(map(np.concatenate, zip(*of_rank, strict=True))) for of_rank in sent]
        buckets.append((sent, joined, sent_of(sizes, 1, seed=9)[0], drawn(sizes, kind, number)))
    checks = []
    with Launches() as launches:
        for sent, joined, own, layers in buckets:
            for position, (residual, gradient) in enumerate(layers):
                if position == 1 and number:
                    continue  # of a layer that is left out, its own backend has to make the sum
                indices, kept = own[position]
                kept = kept if position % 2 else None
                scale = float(rng.choice([1.0, 1 / 3, -2.0, 0.0, -0.0]))
                there = tensor(residual, DEVICE), tensor(gradient, DEVICE)
                came = received(sent, position, joined)
                device(shared).settle(*there, indices, kept, came, scale, there[1])
                assert bits(there[0]) == bits(residual)  # not yet
                out = np.empty_like(gradient)
                theirs = [of_rank[position] for of_rank in sent]
                passes.settle(residual, gradient, indices, kept, theirs, scale, out)
                checks.append((there, residual, out))
        device(shared).finish()
        device(shared).finish()  # there is nothing left
    assert launches.counts == {"begins_all": 2, "settle_all": 2}
    for (own_residual, own_out), residual, out in checks:
        assert bits(own_residual) == bits(residual)
        assert bits(own_out) == bits(out)


def test_float32_gradients_of_16_bit_layers():
    """As momentum makes them."""
    shared, checks = Together(), []
    sent = sent_of(LAYERS, 3)
    joined = [tuple(map(np.concatenate, zip(*of_rank, strict=True))) for of_rank in sent]
    for position, (residual, gradient) in enumerate(drawn(LAYERS)):
        indices, kept = sent[0][position]
        out = np.empty(len(gradient), np.float16)
        there = [tensor(array, DEVICE) for array in (residual, gradient, out)]
        came = received(sent, position, joined)
        device(shared).settle(*there[:2], indices, kept, came, 0.5, there[2])
        theirs = [of_rank[position] for of_rank in sent]
        passes.settle(residual, gradient, indices, kept, theirs, 0.5, out)
        checks.append((there, residual, gradient, out))
    device(shared).finish()
    for there, *arrays in checks:
        assert [bits(x) for x in there] == [bits(x) for x in arrays]


# Sessions ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "dtype", "names"),
    [
        ({"nonfinite": "skip"}, np.float32, list(SIZES)),
        ({"values": "float16", "momentum": 0.9}, np.float16, ["bias", "hidden"]),
        ({"prior": "measured", "measure_every": 2}, np.float32, list(SIZES)),
        ({"dense_steps": 2}, np.float64, list(SIZES)),
    ],
    ids=str,
)
def test_a_session_is_one_on_the_host_to_the_bit(options, dtype, names, monkeypatch):
    if INTERPRETED:  # as fast as that can be
        monkeypatch.setattr(settling_all, "LANES", 1024)
    check_sessions(TORCH, DEVICE, device(Together()), names, dtype, options)


def drawn_for(session, seed):
    rng = np.random.default_rng(seed)
    return {n: tensor(rng.standard_normal(s).astype(np.float32), DEVICE) for n, s in SIZES.items()}


def step_of(sessions, seed):
    """A step of all ranks; returns payloads and sums."""
    gradients = [drawn_for(session, seed + 10 * session.rank) for session in sessions]
    payloads = []
    for session, of_rank in zip(sessions, gradients, strict=True):
        for name, gradient in of_rank.items():
            if session.is_sparse(name):
                session.compress(name, gradient)
            else:
                session.note(name, True)
        payloads.append({bucket: session.payload(bucket) for bucket in session.unfinished()})
    for session, of_rank in zip(sessions, gradients, strict=True):
        for bucket in payloads[0]:
            session.receive(bucket, np.concatenate([sent[bucket] for sent in payloads]))
        for name, gradient in of_rank.items():
            if session.is_sparse(name):
                session.decompress(name, gradient, 0.5)
            else:
                session.accept(name)
    sums = [array_of(gradient) for of_rank in gradients for gradient in of_rank.values()]
    return [of_rank[b].tobytes() for of_rank in payloads for b in of_rank], [
        x.tobytes() for x in sums
    ]


def test_a_step_takes_three_launches_a_bucket_at_most_and_the_same_bits():
    names = list(SIZES)
    alone = make_sessions(TORCH, {name: device(None) for name in names})
    shared = [Together() for _ in range(RANKS)]
    others = [
        make_sessions(TORCH, {name: device(of_rank) for name in names})[rank]
        for rank, of_rank in enumerate(shared)
    ]
    buckets = len(alone[0].routing.buckets)
    for step in range(4):
        with Launches() as one_by_one:
            expected = step_of(alone, step)
        with Launches() as launches:
            assert step_of(others, step) == expected
        assert launches.counts.get("find_all", 0) <= buckets * RANKS
        assert launches.counts["settle_all"] == launches.counts["begins_all"] == buckets * RANKS
        assert not {"find", "begins", "settle"} & launches.counts.keys()
    assert sum(launches.counts.values()) <= sum(one_by_one.counts.values())
    for one, two in zip(alone, others, strict=True):
        for name, residual in one.residuals.items():
            assert bits(residual) == bits(two.residuals[name])


def test_a_step_that_is_given_up_leaves_nothing_put_off():
    shared = Together()
    backends = {name: device(shared) for name in SIZES}
    sessions = [make_sessions(TORCH, backends)[rank] for rank in range(RANKS)]
    step_of(sessions, 0)
    before = [bits(x) for session in sessions for x in session.residuals.values()]
    for session in sessions:
        for name, gradient in drawn_for(session, 1).items():
            if session.is_sparse(name):
                session.compress(name, gradient)
        session.abandon()
    gc.collect()
    with Launches() as launches:
        shared.searches.launch()
    assert launches.counts == {}
    assert [bits(x) for session in sessions for x in session.residuals.values()] == before


# Where they do not run ---------------------------------------------------------------------------


def test_kernels_that_do_not_run_or_are_wrong_are_not_taken(monkeypatch, caplog):
    where = torch.device(DEVICE)
    assert runs(where, torch.float32, torch.float32)

    def broken(*arguments):
        raise RuntimeError("Failed to find C compiler")

    try:
        for replacement, told in ((broken, "C compiler"), (lambda *_: None, "are wrong")):
            monkeypatch.setattr(settling_all, "_launch", replacement)
            runs.cache_clear()
            assert not runs(where, torch.float32, torch.float32)
            assert "each layer has its own" in caplog.text
            assert told in caplog.text
    finally:
        runs.cache_clear()


def test_what_is_tried_has_many_programs_and_a_layer_of_no_multiple_of_16():
    assert together._LARGE // 2048 > finding.PROGRAMS // 2
    assert together._ODD % 16


@pytest.mark.parametrize("wanted", [None, "0", "1"])
def test_launches_are_shared_on_a_gpu_only_where_that_is_asked_for(wanted, monkeypatch):
    monkeypatch.delenv(on_device.SHARED_LAUNCHES, raising=False)
    if wanted is not None:
        monkeypatch.setenv(on_device.SHARED_LAUNCHES, wanted)
    monkeypatch.setattr(on_device, "kernels_run", lambda device: True)
    monkeypatch.setattr(together, "runs", lambda *types: True)
    shared = on_device.together_on(torch.device("cuda"), [torch.float32])
    assert (shared is not None) == (wanted == "1")
    assert on_device.together_on(torch.device("cpu"), [torch.float32]) is None
