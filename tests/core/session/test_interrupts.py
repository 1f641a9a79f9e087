"""Ctrl-C, or an error, at any line of a step."""

import copy
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

import hvd_dls.core.session
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.session.interrupts import Uninterrupted
from hvd_dls.errors import DLSError, NonFiniteGradientError
from tests.core.network import connect, outputs
from tests.core.ranks import draw_gradients, frozen, make_sessions, run, same

LAYERS = [
    layer_spec("conv.weight", (10, 40)),
    layer_spec("conv.bias", (10,)),
    layer_spec("fc.weight", (30, 20)),
    layer_spec("out.weight", (5, 60)),
]
NAMES = [layer.name for layer in LAYERS]
CORE = str(Path(hvd_dls.core.session.__file__).parents[1])
EVERY = 11  # so many lines are skipped between two tries, coprime with how many a layer takes

OPTIONS = [
    {"momentum": 0.5, "bucket_bytes": 1000},
    {"momentum": 0.5, "nesterov": True, "values": "float16"},
    {"strategy": "norm", "clip_norm": 1.0},
    {"momentum": 0.5, "clip_global_norm": 1.0},
    {"strategy": "global"},
    {"dense_steps": 9, "momentum": 0.5},
]
each_option = pytest.mark.parametrize("options", OPTIONS, ids=str)


@pytest.fixture(autouse=True)
def _python_s_own_handler():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.signal(signal.SIGINT, before) is signal.default_int_handler


def trained(**options):
    options = {"dense_below": 0, "density": 0.05} | options
    sessions = make_sessions(2, LAYERS, **options)
    run(sessions, np.random.default_rng(0), 3)
    return sessions


def interrupted_at(line, do):
    """Does something; Ctrl-C is pressed at the core's n-th line; whether it came so far."""
    seen = 0

    def trace(frame, event, _):
        nonlocal seen
        if not frame.f_code.co_filename.startswith(CORE):
            return None
        if event == "line":
            seen += 1
            if seen == line:
                sys.settrace(None)
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    try:
        sys.settrace(trace)
        do()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    assert seen < line
    return False


def make_step(ranks, gradients, outs):
    """What rank 0 does in a step; the other one has sent its part."""
    own = ranks[0]
    for name in NAMES:
        own.compress(name, gradients[name])
    own.receive()
    for name in NAMES:
        own.finish(name, outs[name], ranks)


@each_option
@pytest.mark.parametrize("bad", [False, True])
def test_wherever_ctrl_c_is_pressed_the_step_was_made_or_it_was_not(options, bad):
    sessions = trained(nonfinite="skip", **options)
    rng = np.random.default_rng(1)
    gradients = [draw_gradients(rng, session) for session in sessions]
    if bad:
        gradients[0]["fc.weight"][7] = np.nan

    def start():
        ranks = connect(copy.deepcopy(sessions))
        for name in NAMES:
            ranks[1].compress(name, gradients[1][name])
        own = {name: values.copy() for name, values in gradients[0].items()}
        return ranks, own, outputs(ranks[0].session, NAMES)

    ranks, own, outs = start()
    before = frozen(ranks[0].session)
    make_step(ranks, own, outs)
    after, done, line = frozen(ranks[0].session), 0, 1
    assert (before == after) == bad
    while True:
        ranks, own, outs = start()
        session = ranks[0].session
        if not interrupted_at(line, lambda r=ranks, o=own, t=outs: make_step(r, o, t)):
            break
        ranks[0].abandon()
        assert not session.in_step
        state = frozen(session)
        made = session.last_step.step == 4
        assert state == (after if made else before)
        assert made or not done or bad  # once made, made by all later tries
        done += made
        line += EVERY
    assert line > 300
    assert bad or done


@each_option
def test_after_ctrl_c_the_next_step_is_that_of_ranks_that_were_never_interrupted(options):
    sessions = trained(**options)
    rng = np.random.default_rng(1)
    for line in (5, 60, 150, 280):
        ranks = connect(copy.deepcopy(sessions))
        for rank in ranks:
            gradients = draw_gradients(rng, rank.session)
            assert (
                interrupted_at(
                    line, lambda r=rank, g=gradients: [r.compress(name, g[name]) for name in NAMES]
                )
                or not rank.session.unfinished()
            )
        for rank in ranks:
            rank.abandon()
        rngs = np.random.default_rng(2), np.random.default_rng(2)
        again = [rank.session for rank in ranks]
        others = copy.deepcopy(sessions)
        for _ in range(2):
            assert same(run(again, rngs[0], 1), run(others, rngs[1], 1))
        assert list(map(frozen, again)) == list(map(frozen, others))


@each_option
def test_a_layer_whose_coming_in_was_interrupted_can_come_in_once_more(options):
    """As Horovod's optimizer hands gradients over again, if its wait was interrupted."""
    sessions = trained(**options)
    rng = np.random.default_rng(1)
    gradients = [draw_gradients(rng, session) for session in sessions]
    expected, line, tries = None, 1 << 30, 0
    while True:
        ranks = connect(copy.deepcopy(sessions))
        for name in NAMES:
            ranks[1].compress(name, gradients[1][name])
        own, session = {n: g.copy() for n, g in gradients[0].items()}, ranks[0].session
        interrupted = interrupted_at(
            line, lambda r=ranks[0], o=own: [r.compress(name, o[name]) for name in NAMES]
        )
        for name in NAMES:
            if not session.has(name):
                ranks[0].compress(name, own[name])
            elif name not in ranks[0].whole and not session.is_sparse(name):
                corrected = session.correct(name, own[name]) if session.corrects else own[name]
                ranks[0].whole[name] = corrected.copy()
        outs = outputs(session, NAMES)
        ranks[0].receive()
        for name in NAMES:
            ranks[0].finish(name, outs[name], ranks)
        after = frozen(session), {n: out.tobytes() for n, out in outs.items()}
        assert expected is None or after == expected
        if expected is not None and not interrupted:
            break
        expected, line, tries = after, EVERY * tries + 1, tries + 1
    assert tries > 5


# Blocks that are not cut ------------------------------------------------------------------------


def test_ctrl_c_in_such_a_block_comes_when_it_is_over():
    done = []

    def work():
        with Uninterrupted():
            for number in range(3):
                signal.raise_signal(signal.SIGINT)
                done.append(number)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [0, 1, 2]
    with Uninterrupted():
        pass
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


def test_such_blocks_may_stand_in_each_other():
    done = []

    def work():
        with Uninterrupted():
            with Uninterrupted():
                signal.raise_signal(signal.SIGINT)
            done.append(1)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert done == [1]


def test_an_error_in_such_a_block_comes_first_and_is_not_lost():

    def work(pressed):
        with Uninterrupted():
            if pressed:
                signal.raise_signal(signal.SIGINT)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        work(pressed=False)
    with pytest.raises(KeyboardInterrupt) as raised:
        work(pressed=True)
    assert isinstance(raised.value.__context__, ZeroDivisionError)


def test_a_handler_of_the_user_s_own_is_left_alone():
    came = []
    before = signal.signal(signal.SIGINT, lambda *_: came.append(1))
    try:
        with Uninterrupted():
            signal.raise_signal(signal.SIGINT)
            assert came == [1]
    finally:
        signal.signal(signal.SIGINT, before)


def test_in_other_threads_nothing_is_changed():
    seen = []

    def work():
        with Uninterrupted():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [signal.default_int_handler]


# Errors where something is being written ---------------------------------------------------------


class Failing:
    """A layer's backend that fails in one of its functions, once."""

    def __init__(self, backend, function):
        self._backend, self._function = backend, function

    def __getattr__(self, name):
        if name != self._function:
            return getattr(self._backend, name)

        def fail(*_):
            self._function = ""
            raise MemoryError

        return fail


@pytest.mark.parametrize(
    ("function", "options", "message"),
    [
        ("settle", {}, "residuals of layer 'fc.weight' were being written"),
        ("clear", {"momentum": 0.5}, "velocities and ratios were being written"),
    ],
)
def test_what_an_error_has_left_half_written_is_not_gone_on_with(function, options, message):
    sessions = trained(**options)
    states = [copy.deepcopy(session.state_dict()) for session in sessions]
    backends = sessions[0].memory.backends
    failing = Failing(backends["fc.weight"], function)
    backends["fc.weight"] = sessions[0].memory.correction._backends["fc.weight"] = failing
    gradients = [draw_gradients(np.random.default_rng(1), session) for session in sessions]
    ranks = connect(sessions)
    for name in NAMES:
        ranks[1].compress(name, gradients[1][name])
    with pytest.raises(MemoryError):
        make_step(ranks, gradients[0], outputs(sessions[0], NAMES))
    ranks[0].abandon()
    ranks[1].abandon()
    assert not sessions[0].in_step
    assert not sessions[0].skipped
    another = make_sessions(2, LAYERS, dense_below=0, density=0.05, **options)[0]
    for attempt in (
        sessions[0].state_dict,
        sessions[0].begin,
        lambda: sessions[0].note("conv.bias", True),
        lambda: sessions[0].leave_out("fc.weight"),
        lambda: sessions[0].compress("fc.weight", gradients[0]["fc.weight"]),
        lambda: another.inherit(sessions[0]),
    ):
        with pytest.raises(DLSError, match=f"an error came while {message}, so what this rank rem"):
            attempt()
        assert not sessions[0].in_step
    for session, state in zip(sessions, states, strict=True):
        session.load_state_dict(state)
    run(sessions, np.random.default_rng(1), 2)


@pytest.mark.parametrize("function", ["find", "correct"])
def test_errors_while_nothing_is_written_do_no_harm(function):
    sessions = trained(momentum=0.5)
    before = list(map(frozen, sessions))
    backends = sessions[0].memory.backends
    failing = Failing(backends["fc.weight"], function)
    backends["fc.weight"] = sessions[0].memory.correction._backends["fc.weight"] = failing
    gradients = draw_gradients(np.random.default_rng(1), sessions[0])
    for name in NAMES[:2]:
        sessions[0].compress(name, gradients[name]) if sessions[0].is_sparse(name) else None
    with pytest.raises(MemoryError):
        sessions[0].compress("fc.weight", gradients["fc.weight"])
    for session in sessions:
        session.abandon()
    assert list(map(frozen, sessions)) == before
    sessions[1]._clock.abandon()  # as if it had been told
    run(sessions, np.random.default_rng(1), 2)


def test_an_error_about_nan_in_the_last_dense_layer_spoils_nothing():
    sessions = trained(dense_steps=9, momentum=0.5)
    gradients = [draw_gradients(np.random.default_rng(1), session) for session in sessions]
    gradients[1]["out.weight"][0] = np.inf
    ranks = connect(sessions)
    for rank, of_rank in zip(ranks, gradients, strict=True):
        for name in NAMES:
            rank.compress(name, of_rank[name])
    for rank in ranks:
        out = outputs(rank.session, NAMES)
        for name in NAMES[:-1]:
            rank.finish(name, out[name], ranks)
        with pytest.raises(NonFiniteGradientError):
            rank.finish(NAMES[-1], out[NAMES[-1]], ranks)
    run(sessions, np.random.default_rng(2), 1)
