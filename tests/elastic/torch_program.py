"""A small training with hvd.elastic; what a test orders ends it.

Arguments: options of DLSCompressor in JSON, or "dense"; "given" if the state is given the
compressor; "loads" if each worker loads what one of its rank, among as many, had saved.
"""

import json
import sys
import time
import zlib

import horovod.torch as hvd
import torch

from tests.elastic.worker import die_if, order, say

OPTIONS = json.loads(sys.argv[1])
GIVEN = "given" in sys.argv[2:]
COMMIT = 3  # steps from one commit to the next
RATE = 0.02
PAUSE = 0.02  # seconds after each step: what all steps print is looked through
own = {}  # sum of this rank's gradient of the first layer

if OPTIONS == "dense":
    COMPRESSION = hvd.Compression.none
else:
    from hvd_dls.torch import DLSCompressor

    COMPRESSION = DLSCompressor(**OPTIONS) if OPTIONS else DLSCompressor


def main() -> None:
    hvd.init()
    torch.manual_seed(hvd.rank())
    model = torch.nn.Sequential(
        torch.nn.Linear(20, 50), torch.nn.Tanh(), torch.nn.Linear(50, 30), torch.nn.Linear(30, 1)
    )
    model[0].weight.register_hook(lambda g: die_if("die in backward"))
    model[3].weight.register_hook(lambda g: die_if("die when backward begins"))
    model[0].weight.register_hook(lambda g: die_if(f"die in step {state.step + 1}"))
    model[0].weight.register_hook(lambda g: own.update(gradient=g.double().sum().item()))
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=RATE),
        named_parameters=model.named_parameters(),
        compression=COMPRESSION,
    )
    if "loads" in sys.argv[2:]:
        say("loaded", **load(model))
    more = {"compression": COMPRESSION} if GIVEN else {}
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, step=0, **more)
    say("start", rank=hvd.rank(), size=hvd.size())
    state.register_reset_callbacks([lambda: say("reset", rank=hvd.rank(), size=hvd.size())])
    train(state)
    say("end", rank=hvd.rank())


def load(model) -> dict[str, object]:
    """Loads a state with something in its residuals; exchanges nothing, as nobody may be there."""
    from hvd_dls.config import DLSConfig
    from hvd_dls.core.balancing.layers import layer_spec
    from hvd_dls.core.session.groups import Groups
    from hvd_dls.core.session.session import Session

    layers = [layer_spec(name, tuple(p.shape)) for name, p in model.named_parameters()]
    rank, size = hvd.rank(), hvd.size()
    groups = Groups.of_one(size, rank)
    saved = Session(layers, DLSConfig(**OPTIONS), size, rank, None, {}, groups, 2).state_dict()
    generator = torch.Generator().manual_seed(rank)
    for name, residual in saved["residuals"].items():
        saved["residuals"][name] = torch.randn(len(residual), generator=generator).numpy()
    COMPRESSION.load_state_dict({"version": 1, "models": [saved]})
    return {
        **{"step": 0, "rank": rank, "size": size, "rate": RATE},
        "sum_of_weights": model[0].weight.double().sum().item(),
        "sum_of_residual": float(saved["residuals"]["0.weight"].sum(dtype="float64")),
    }


@hvd.elastic.run
def train(state) -> None:
    world = hvd.broadcast_object(f"{time.monotonic()}", name="world")
    target = torch.linspace(-1, 1, 20)
    finish = False
    while not finish:
        generator = torch.Generator().manual_seed(1000 * state.step + hvd.rank())
        x = torch.randn(16, 20, generator=generator)
        state.optimizer.zero_grad()
        loss = ((state.model(x)[:, 0] - x @ target) ** 2).mean()
        loss.backward()
        state.optimizer.step()
        state.step += 1
        say("step", world=world, **report(state, loss.item()))
        time.sleep(PAUSE)
        wish = torch.tensor(1.0 if order() == "finish" else 0.0)
        finish = bool(hvd.allreduce(wish, name="finish") > 0)
        if state.step % COMMIT == 0:
            state.commit()


def report(state, loss: float) -> dict[str, object]:
    """What this rank has of a step that ended; sums are of the first layer."""
    weights = b"".join(p.detach().numpy().tobytes() for p in state.model.parameters())
    report = {
        "step": state.step,
        "rank": hvd.rank(),
        "size": hvd.size(),
        "rate": RATE,
        "loss": loss,
        "weights": zlib.crc32(weights),
        "sum_of_weights": state.model[0].weight.double().sum().item(),
        "sum_of_gradient": own["gradient"],
    }
    if OPTIONS == "dense":
        return report
    [model], record = COMPRESSION.state_dict()["models"], COMPRESSION.last_step()
    residual = model["residuals"].get("0.weight", torch.zeros(1))  # alone, a rank sends nothing
    if OPTIONS.get("adam"):  # those who come begin with the moments of those who are there
        report["age_of_moments"] = repr(model["moment_weights"]["0.weight"].tolist())
    elif not OPTIONS.get("momentum"):  # else gradients reach residuals by way of velocities
        report["sum_of_residual"] = residual.double().sum().item()
    return report | {
        "ratios": zlib.crc32(repr(model["ratios"]).encode()),
        "step_of_compressor": model["step"],
        "sent": int(record.k.sum()),
        "entries": int(record.sizes.sum()),
    }


main()
