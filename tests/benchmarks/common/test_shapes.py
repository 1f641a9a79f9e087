"""Shapes are those of the models whose names they have."""

from __future__ import annotations

import pytest

from benchmarks.common import shapes
from tests.jobs import needs


@pytest.mark.parametrize(
    ("model", "tensors", "entries"),
    [
        ("resnet50", 161, 25_557_032),  # torchvision's resnet50
        ("vgg16", 32, 138_357_544),  # torchvision's vgg16
        ("bert-base", 199, 109_482_240),  # Hugging Face's bert-base-uncased
        ("lstm", 11, 66_034_000),  # torch's word language model, 2 x 1500, 10,000 words
        ("mlp10m", 12, 10_664_458),
    ],
)
def test_shapes_have_as_many_parameters_as_the_model_they_are_of(model, tensors, entries):
    made = shapes.MODELS[model]()
    assert (len(made), shapes.entries(made)) == (tensors, entries)


@needs("torch")
def test_shapes_are_those_of_torchs_own_layers():
    import torch

    lstm = torch.nn.LSTM(1500, 1500, 2, device="meta")
    expected = {f"rnn.{name}": tuple(p.shape) for name, p in lstm.named_parameters()}
    made = shapes.lstm()
    assert {name: made[name] for name in made if name.startswith("rnn.")} == expected
