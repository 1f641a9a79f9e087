"""Relative gradient variances: Eq. 8 and 9 by hand, the weight-norm law, and both measured."""

import numpy as np
import pytest

from hvd_dls.core.balancing.layers import layer_spec
from hvd_dls.core.balancing.prior import PRIORS, paper, uniform, weight_norm
from hvd_dls.errors import DLSError

# Shapes are torch's, (d, c, k_h, k_w) or (d, c).  Beside each is its factor v_l / v_{l-1}:
#   conv   k_l k_l c_l / (k_{l-1} k_{l-1} d_l)               Eq. 8
#   fc     c_l / d_l                                         Eq. 9
#   first fc behind a conv   c_flat / (k_{l-1} k_{l-1} d_l)  a conv over the whole feature map
CHAINS = {
    "LeNet": [
        ((6, 1, 5, 5), 1),
        ((16, 6, 5, 5), (25 * 6) / (25 * 16)),
        ((120, 400), 400 / (25 * 120)),
        ((84, 120), 120 / 84),
        ((10, 84), 84 / 10),
    ],
    "VGG": [
        ((64, 3, 3, 3), 1),
        ((64, 64, 3, 3), (9 * 64) / (9 * 64)),
        ((128, 64, 3, 3), (9 * 64) / (9 * 128)),
        ((512, 128, 3, 3), (9 * 128) / (9 * 512)),
        ((4096, 25088), 25088 / (9 * 4096)),
        ((4096, 4096), 1),
        ((1000, 4096), 4096 / 1000),
    ],
    "ResNet": [
        ((64, 3, 7, 7), 1),
        ((64, 64, 1, 1), (1 * 64) / (49 * 64)),
        ((64, 64, 3, 3), (9 * 64) / (1 * 64)),
        ((256, 64, 1, 1), (1 * 64) / (9 * 256)),
        ((128, 256, 1, 1), (1 * 256) / (1 * 128)),
        ((128, 128, 3, 3), (9 * 128) / (1 * 128)),
        ((1000, 128), 128 / (9 * 1000)),
    ],
    "depth-wise": [
        ((32, 3, 3, 3), 1),
        ((32, 1, 3, 3), (9 * 32) / (9 * 32)),  # groups cancel: c is the layer's 32, not 1
        ((64, 32, 1, 1), (1 * 32) / (9 * 64)),
        ((128, 1, 5, 5), (25 * 64) / (1 * 128)),  # two outputs per channel
    ],
    "non-square": [
        ((16, 1, 1, 7), 1),
        ((32, 16, 7, 1), (7 * 16) / (7 * 32)),
        ((32, 32, 3, 5), (15 * 32) / (7 * 32)),
        ((8, 32, 3), (3 * 32) / (15 * 8)),
    ],
    "unknown": [
        ((16, 8, 3, 3), 1),
        ((2, 2, 2, 2, 2, 2), 1),  # no place in the chain: as the layer before
    ],
}


@pytest.mark.parametrize("layout", ["torch", "tensorflow"])
@pytest.mark.parametrize("chain", CHAINS)
def test_paper_prior_is_eq_8_and_9_by_hand(chain, layout):
    shapes, factors = zip(*CHAINS[chain], strict=True)
    if layout == "tensorflow":
        shapes = [(*shape[2:], shape[1], shape[0]) for shape in shapes]
    layers = [layer_spec(f"l{i}", shape, layout) for i, shape in enumerate(shapes)]
    assert paper(layers) == pytest.approx(np.cumprod(factors), rel=1e-12)


def test_paper_prior_neither_overflows_nor_vanishes_in_a_thousand_layers():
    layers = [layer_spec(f"l{i}", (64, 64, 3, 3)) for i in range(1000)]
    assert paper(layers) == pytest.approx(np.ones(1000))


def test_weight_norm_prior_is_inverse_to_the_squared_norms():
    layers = [layer_spec(f"l{i}", (2, 2)) for i in range(3)]
    assert weight_norm(layers, np.array([2.0, 4.0, 1.0])).tolist() == [1, 1 / 4, 4]


def test_uniform_prior_is_one_everywhere():
    assert uniform([layer_spec(f"l{i}", (2, 2)) for i in range(3)]).tolist() == [1, 1, 1]


@pytest.mark.parametrize("name", PRIORS)
def test_every_prior_takes_no_layers(name):
    assert PRIORS[name]([], np.ones(0)).tolist() == []


@pytest.mark.parametrize("bad", [0.0, -1.0, np.nan, np.inf])
def test_a_bad_norm_is_refused_by_its_layer_s_name(bad):
    layers = [layer_spec("head", (2, 2)), layer_spec("tail", (2, 2))]
    with pytest.raises(DLSError, match=f"'weight_norm': layer 'tail' has weight norm {bad}"):
        weight_norm(layers, np.array([1.0, bad]))


@pytest.mark.parametrize("norms", [None, np.ones(1)])
def test_missing_norms_are_refused(norms):
    with pytest.raises(DLSError, match="one weight norm per layer"):
        weight_norm([layer_spec("a", (2, 2)), layer_spec("b", (2, 2))], norms)


# Measured ---------------------------------------------------------------------------------------

# Output channels and kernel of each convolution ("pool" halves the image), then widths of the
# fully connected layers; 8x8 digits in, 10 classes out.
NETS = {
    "1x1, 3x3 and fc": ([(16, 3), (32, 1), (32, 3), "pool", (64, 1), (64, 3), (16, 1)], [64, 64]),
    "3x3 and fc": ([(16, 3), (16, 3), (32, 3), (32, 3), (32, 3)], [64]),
    "fc": ([], [256, 64, 128]),
}


@pytest.fixture(scope="module")
def digits():
    images, labels = pytest.importorskip("sklearn.datasets").load_digits(return_X_y=True)
    return ((images - images.mean()) / images.std()).reshape(-1, 1, 8, 8), labels


def build(torch, convolutions, widths):
    nn, modules, channels, side = torch.nn, [], 1, 8
    for conv in convolutions:
        if conv == "pool":
            modules.append(nn.MaxPool2d(2))
            side //= 2
            continue
        out, kernel = conv
        modules += [nn.Conv2d(channels, out, kernel, padding=kernel // 2, bias=False), nn.ReLU()]
        channels = out
    modules.append(nn.Flatten())
    for inputs, outputs in zip([channels * side**2, *widths], [*widths, 10], strict=True):
        modules += [nn.Linear(inputs, outputs, bias=False), nn.ReLU()]
    net = nn.Sequential(*modules[:-1])
    for parameter in net.parameters():
        nn.init.kaiming_normal_(parameter, nonlinearity="relu")
    return net


def measured_variances(torch, digits, net_shape, n_inits=5, n_batches=4):
    """Layers, squared weight norms and gradient variances, averaged over initialisations."""
    images, labels = (torch.as_tensor(a) for a in digits)
    norms, variances = [], []
    for seed in range(n_inits):
        torch.manual_seed(seed)
        net = build(torch, *net_shape)
        weights = list(net.parameters())
        norms.append([w.detach().square().sum().item() for w in weights])
        for _ in range(n_batches):
            batch = torch.randint(len(images), (32,))
            net.zero_grad()
            logits = net(images[batch].float())
            torch.nn.functional.cross_entropy(logits, labels[batch]).backward()
            variances.append([w.grad.square().mean().item() for w in weights])
    layers = [layer_spec(f"l{i}", tuple(w.shape)) for i, w in enumerate(weights)]
    return layers, np.mean(norms, axis=0), np.mean(variances, axis=0)


@pytest.fixture(scope="module")
def errors(digits):
    """Root mean square of log2(predicted / measured), for each net and prior."""
    torch = pytest.importorskip("torch")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, small nets wait for their other threads
    found = {}
    print()
    for name, shape in NETS.items():
        layers, norms2, measured = measured_variances(torch, digits, shape)
        found[name] = {}
        for prior, law in PRIORS.items():
            off = np.log2(law(layers, np.sqrt(norms2)) / (measured / measured[0]))
            found[name][prior] = np.sqrt(np.mean(off**2))
            print(f"{name:16} {prior:12} rms log2 error {found[name][prior]:.2f}", end="  ")
            print("by layer", " ".join(f"{value:+.1f}" for value in off))
    torch.set_num_threads(threads)
    return found


def test_weight_norm_law_meets_measured_variances_within_an_octave(errors):
    assert all(of["weight_norm"] < 1 for of in errors.values())


def test_paper_prior_meets_measured_variances_of_fully_connected_nets(errors):
    assert errors["fc"]["paper"] < 0.5
    assert errors["fc"]["uniform"] > 1


@pytest.mark.parametrize("net", ["1x1, 3x3 and fc", "3x3 and fc"])
def test_weight_norm_law_is_nearer_than_the_paper_s_where_kernels_change(errors, net):
    assert errors[net]["weight_norm"] < errors[net]["paper"]
