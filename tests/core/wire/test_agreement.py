"""Before the first exchange: what ranks tell each other of themselves, and what they make of it."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hvd_dls.config import DLSConfig
from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.wire.agreement import (
    OWN_OPTIONS,
    Claim,
    check_errors,
    check_facts,
    checksum,
    decode,
    encode,
    facts_of,
)
from hvd_dls.errors import DLSError, RanksDisagreeError

CONFIG = DLSConfig()
LAYERS = (layer_spec("a", (32, 64)), layer_spec("b", (64,)))


def facts(config=CONFIG, layers=LAYERS, version="1.2"):
    return facts_of(version, config, layers)


def sent(*ranks):
    """What comes back of each rank's facts."""
    return decode(np.concatenate([encode(each) for each in ranks]), len(ranks))


def disagreement(*ranks):
    """What all ranks raise, in words."""
    with pytest.raises(RanksDisagreeError) as raised:
        check_facts(sent(*ranks))
    assert len({checksum(each) for each in ranks}) > 1
    return str(raised.value)


# Facts ------------------------------------------------------------------------------------------


def test_equal_ranks_agree():
    check_facts(sent(*[facts(DLSConfig(), list(LAYERS))] * 5))
    check_facts(sent(facts()))
    assert checksum(facts()) == checksum(facts(DLSConfig(), list(LAYERS)))


OTHER = {
    "density": 0.011,
    "strategy": "layerwise",
    "momentum": 0.9,
    "adam": (0.5, 0.999),
    "adam_eps": 1e-6,
    "dense_steps": 1,
    "warmup_steps": 1,
    "nonfinite": "skip",
    "layer_density": (("a", 0.5),),
    "warmup_density": 0.5,
    "momentum_masking": False,
    "clip_norm": 1.0,
    "clip_value": 1.0,
    "clip_global_norm": 1.0,
    "prior": "uniform",
    "tail": "pareto",
    "pair_steps": 4,
    "adjust_every": 2,
    "min_k": 2,
    "dense_below": 0,
    "cost_rule": False,
    "values": "float16",
    "index_code": "plain",
    "bucket_bytes": 1,
    "exchange": "sparse_allreduce",
    "threads": 3,
    "measure_every": 1,
}


def test_options_of_a_rank_s_own_may_differ():
    for option in OWN_OPTIONS:
        other = facts(dataclasses.replace(CONFIG, **{option: OTHER[option]}))
        assert checksum(other) == checksum(facts())
        check_facts(sent(facts(), other))


@pytest.mark.parametrize("option", sorted(OTHER.keys() - set(OWN_OPTIONS)))
def test_other_options_are_told_with_the_rank_and_both_values(option):
    other = dataclasses.replace(CONFIG, **{option: OTHER[option]})
    told = disagreement(facts(), facts(), facts(other), facts())
    values = f"option {option}: {OTHER[option]!r}, rank 0: {getattr(CONFIG, option)!r}"
    assert told.startswith(f"rank 2 has {values}; all ranks must")


def test_no_option_is_forgotten():
    pairs = {"nesterov": {"momentum": 0.5}, "threshold": {"strategy": "hard"}, "hierarchical": {}}
    values = {"nesterov": True, "threshold": 1.0, "hierarchical": True}
    for field in dataclasses.fields(DLSConfig):
        if field.name in OTHER:
            continue
        other = DLSConfig(**{field.name: values[field.name]} | pairs[field.name])
        assert checksum(facts(other)) != checksum(facts())


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (LAYERS[:1], "number of layers: 1, rank 0: 2"),
        (LAYERS[::-1], "layer 0: 'b' of shape (64,), 32 bits, rank 0: 'a' of shape (32, 64), 32"),
        ((layer_spec("x", (32, 64)), LAYERS[1]), "layer 0: 'x' of shape (32, 64), 32 bits"),
        ((LAYERS[0], layer_spec("b", (65,))), "layer 1: 'b' of shape (65,), 32 bits, rank 0: 'b'"),
        ((layer_spec("a", (64, 32)), LAYERS[1]), "layer 0: 'a' of shape (64, 32)"),
        ((layer_spec("a", (32, 64), itemsize=8), LAYERS[1]), "layer 0: 'a' of shape (32, 64), 64"),
    ],
    ids=["fewer", "other order", "other name", "wider", "other shape", "other type"],
)
def test_other_layers_are_told_with_the_rank_and_the_first_difference(layers, message):
    assert f"rank 1 has {message}" in disagreement(facts(), facts(layers=layers))


def test_names_that_a_framework_numbers_by_itself_may_differ():
    first, other = (
        (layer_spec(f"dense_{number}/kernel", (32, 64), stable_name="dense/kernel"),)
        for number in (1, 7)
    )
    assert checksum(facts(layers=first)) == checksum(facts(layers=other))
    assert checksum(facts(layers=first)) != checksum(facts(layers=LAYERS[:1]))


def test_other_versions_are_told_before_all_else():
    other = facts(dataclasses.replace(CONFIG, density=0.5), LAYERS[:1], "1.3")
    told = disagreement(facts(), other)
    assert told.startswith("rank 1 has version of hvd_dls: 1.3, rank 0: 1.2")


def test_facts_of_another_kind_or_number_are_told():
    extra = [*facts(), ("saved state", "step 3")]
    told = disagreement(facts(), extra)
    assert told == f"rank 1 says {len(extra)} things of itself, rank 0 {len(extra) - 1}"
    other = [("moon phase", "full"), *facts()[1:]]
    told = disagreement(facts(), other)
    assert "rank 1 has version of hvd_dls / moon phase: full, rank 0: 1.2" in told


# Messages ---------------------------------------------------------------------------------------

contents = st.recursive(
    st.one_of(st.none(), st.text(max_size=20), st.integers(-(2**63), 2**63 - 1)),
    lambda parts: st.lists(parts, max_size=5),
)


@given(st.lists(contents, min_size=1, max_size=5))
def test_messages_of_any_length_come_back(ranks):
    messages = [encode(each) for each in ranks]
    assert all(message.dtype == np.uint8 and message.ndim == 1 for message in messages)
    assert decode(np.concatenate(messages), len(ranks)) == ranks


def test_claims_come_back_as_they_were():
    claims = [Claim("abc", "", "label", [1, 2, 2**62]), Claim("abd", "no: é")]
    back = [Claim(*each) for each in sent(*claims)]
    assert back == claims
    assert back[1].numbers is None


@pytest.mark.parametrize(
    "gathered",
    [
        np.zeros(0, np.uint8),
        np.zeros(100, np.uint8),
        np.full(3, 255, np.uint8),
        np.frombuffer(b"DLS\x03" + bytes(60), np.uint8),
    ],
    ids=["nothing", "zeros", "few", "a payload"],
)
def test_what_is_no_message_is_refused_by_its_rank(gathered):
    good = encode(facts())
    with pytest.raises(RanksDisagreeError, match="rank 1 sent no message of this version"):
        decode(np.concatenate([good, gathered]), 2)
    if len(gathered):
        with pytest.raises(RanksDisagreeError, match="rank 0 sent no message of this version"):
            decode(np.concatenate([gathered, good]), 2)


@given(st.integers(0, 200), st.integers(1, 255))
def test_a_damaged_message_is_refused_or_another_one(position, change):
    damaged = encode(facts())
    damaged[position % len(damaged)] ^= np.uint8(change)
    try:
        (back,) = decode(damaged, 1)
    except RanksDisagreeError:
        return
    assert json.dumps(back) != json.dumps(facts())


def test_a_message_that_is_too_short_or_too_long_is_refused():
    whole = encode(facts())
    for length in range(len(whole)):
        with pytest.raises(RanksDisagreeError, match="rank 0 sent no message"):
            decode(whole[:length], 1)
    with pytest.raises(RanksDisagreeError, match="rank 0 sent no message"):
        decode(np.append(whole, whole[:1]), 1)


# What a rank has met ----------------------------------------------------------------------------


def test_an_error_of_one_rank_is_raised_on_all():
    good, bad = Claim("x"), Claim("x", "DLSError: density too low")
    check_errors([good, good])
    with pytest.raises(RanksDisagreeError, match="rank 2 cannot go on: DLSError: density too low"):
        check_errors([good, good, bad])
    assert issubclass(RanksDisagreeError, DLSError)
