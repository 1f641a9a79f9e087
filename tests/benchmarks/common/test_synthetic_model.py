"""The synthetic model hands out gradients as a real one does."""

from __future__ import annotations

from tests.benchmarks.running import run
from tests.jobs import needs

DELIVERY = """
import numpy as np, torch
from benchmarks.common.shapes import tiny
from benchmarks.common.synthetic_model import Gradients, SyntheticModel

shapes = tiny()
gradients = Gradients(shapes, seed=3, pool=1000)  # smaller than a layer: drawn in parts
drawn = []
def draw(position):
    drawn.append(position)
    return gradients.draw(position)
model = SyntheticModel(shapes, draw)
model().backward()
assert drawn == list(reversed(range(len(shapes)))), drawn
for (name, parameter), tensor in zip(model.named_parameters(), gradients.tensors):
    assert parameter.grad.data_ptr() == tensor.data_ptr(), f"{name} was copied"
    assert tuple(parameter.shape) == shapes[name] and parameter.grad.abs().min() > 0

before = [tensor.clone() for tensor in gradients.tensors]
gradients.draw_all()
assert not any(torch.equal(a, b) for a, b in zip(before, gradients.tensors))
scales = [tensor.std().item() for tensor in gradients.tensors]
others = Gradients(shapes, seed=4)
others.draw_all()
assert 5 < max(scales) / min(scales) < 200
for scale, other in zip(scales, others.tensors):  # other noise of the same scale
    assert 0.5 < scale / other.std().item() < 2

stand_in = SyntheticModel(shapes, gradients.last_drawn, stand_in=True)
stand_in().backward()
for (_, parameter), tensor in zip(stand_in.named_parameters(), gradients.tensors):
    assert parameter.untyped_storage().nbytes() == 4
    assert parameter.grad.data_ptr() == tensor.data_ptr()
"""


@needs("torch", "horovod")
def test_the_models_gradients_arrive_last_layer_first_and_uncopied():
    run("-c", DELIVERY)
