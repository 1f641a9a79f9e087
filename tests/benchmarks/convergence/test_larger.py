"""Larger models: interrupted trainings, what is sent, and the table; with small models here."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from tests.jobs import needs

pytestmark = [needs("torch"), needs("sklearn")]

METHODS = ["dense", "dls", "layerwise", "powersgd"]
ALL = [("transformer", "dls-adam"), *itertools.product(("transformer", "resnet"), METHODS)]


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """Both models train a small one, on digits."""
    from benchmarks.convergence import larger, larger_ways
    from benchmarks.convergence.tasks import TASKS

    digits = TASKS["digits"]
    for name, whole in larger_ways.MODELS.items():
        # The Transformer's stays judged by its loss.
        about = {"steps": 4, "accuracy": whole.task.accuracy}
        task = dataclasses.replace(whole.task, model=digits.model, data=digits.data, **about)
        monkeypatch.setitem(larger_ways.MODELS, name, whole._replace(task=task))
    monkeypatch.setattr(larger, "_data", {})


@pytest.mark.parametrize(("model", "method"), ALL)
def test_a_training_that_is_interrupted_goes_on_as_if_it_had_not_been(model, method, tmp_path):
    from benchmarks.convergence.larger import make
    from benchmarks.convergence.larger_ways import description
    from benchmarks.convergence.sweep import result_of

    about = description(model, method, 0)
    whole, pieces = tmp_path / "whole.json", tmp_path / "pieces.json"
    assert make(about, whole, save_every=0.0)
    for _ in range(about["steps"]):
        assert not make(about, pieces, until=0.0)
        one_step(about, pieces)
    assert make(about, pieces)
    one, other = result_of(about, whole), result_of(about, pieces)
    for same in ("loss", "training_loss", "curve", "sparse_bytes", "dense_bytes"):
        assert one[same] == other[same]
    assert {file.name for file in tmp_path.iterdir()} == {"whole.json", "pieces.json"}


def one_step(about, file):
    """Goes on with a training for one step, as ``make`` does, and keeps it again."""
    from benchmarks.convergence import larger

    kept = file.with_suffix(".interrupted")
    training = larger._interrupted(about, kept)
    training.step()
    larger._save(training, kept)


def test_what_there_is_of_another_training_is_not_gone_on_with(tmp_path):
    from benchmarks.convergence.larger import _interrupted, make
    from benchmarks.convergence.larger_ways import description

    file, about = tmp_path / "a.json", description("resnet", "dls", 0)
    assert not make(about, file, until=0.0)
    kept = file.with_suffix(".interrupted")
    assert _interrupted(about, kept) is not None
    assert _interrupted(about | {"rate": 0.1}, kept) is None


def test_the_command_stops_goes_on_and_makes_a_table(tmp_path, capsys):
    from benchmarks.convergence import larger

    arguments = ["--model", "transformer", "resnet", "--methods", *METHODS, "dls-adam"]
    arguments += ["--folder", str(tmp_path)]
    assert larger.main([*arguments, "--minutes", "0"]) == 0
    assert "goes on" in capsys.readouterr().err
    assert larger.main(arguments) == 0
    made = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json")}
    assert len(made) == len(ALL)
    assert larger.main(["--model", "transformer", "--report", "--folder", str(tmp_path)]) == 0
    assert made == {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*.json")}
    lines = capsys.readouterr().out.splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    assert len(rows) == (2 + 5) + (2 + 4) + (2 + 5)
    sent = {row[0]: float(row[1].replace(",", "")) for row in rows[-5:]}
    assert 0 < sent["DLS, 1 %"] < sent["dense"]
    assert 0 < sent["PowerSGD, rank 4"] < sent["dense"]


def test_fine_tuning_begins_with_the_weights_of_a_dense_training(tmp_path, capsys):
    from benchmarks.convergence import larger
    from benchmarks.convergence.larger_ways import description
    from benchmarks.convergence.sweep import result_of

    arguments = ["--model", "finetuned", "--methods", "dense", "dls-adam-0.1"]
    assert larger.main([*arguments, "--folder", str(tmp_path)]) == 0
    base = result_of(
        description("transformer", "dense", 0), tmp_path / "transformer/dense-4-0.json"
    )
    for name in ("dense", "dls-adam-0.1"):
        file = tmp_path / "finetuned" / f"{name}-4-0.json"
        tuned = result_of(description("finetuned", name, 0), file)
        assert tuned["before"] == base["loss"]  # both are of digits here
        assert tuned["loss"] != base["loss"]
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("| before")]
    assert len(rows) == 1


def test_momentum_clipping_and_weight_decay_are_where_each_way_wants_them():
    from benchmarks.convergence.larger_ways import METHODS, description

    for name, method in METHODS.items():
        about = description("transformer", name, 0)
        if method.density is None:
            assert about["options"] is None
            assert (about["betas"], about["clip"]) == ([method.first, 0.999], 1.0)
            continue
        assert about["options"]["clip_global_norm"] == 2.0
        assert about["clip"] is None
        assert about["rate"] * about["decay"] == pytest.approx(0.001 * 0.1)
        if method.adam_in_front:
            assert about["betas"] is None
            assert about["options"]["adam"] == [0.5, 0.999]
            continue
        assert about["betas"] == [0.0, 0.999]
        assert about["options"]["momentum"] == 0.5
        assert not about["options"]["momentum_masking"]
        about = description("resnet", name, 0)
        assert (about["betas"], about["momentum"]) == (None, 0.0)


def test_models_are_of_the_size_that_is_said():
    from benchmarks.convergence.larger_ways import _residual_net, _transformer

    sizes = [sum(p.numel() for p in make().parameters()) for make in (_transformer, _residual_net)]
    assert 5e6 < sizes[0] < 6e6
    assert 1e6 < sizes[1] < 2e6
    model = _transformer()
    assert not any("out" in name.split(".") for name, _ in model.named_parameters())  # tied
