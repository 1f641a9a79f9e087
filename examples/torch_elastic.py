"""Elastic training on scikit-learn's handwritten digits: workers may come, leave and die.

    horovodrun -np 2 --min-np 1 --host-discovery-script ./discover.sh --network-interface eth0 \
        python examples/torch_elastic.py

discover.sh prints the hosts of the moment with their slots, as "host1:2", one a line.  This is an
ordinary elastic script of Horovod: the two lines that switch compression on are marked.
"""

import argparse

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hvd_dls.torch import DLSCompressor  # the first line

COMMIT = 5  # batches from one commit to the next: what is lost at most when a worker dies


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--density", type=float, default=0.01, help="share of entries sent a step")
    args = parser.parse_args()

    hvd.init()
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    data = TensorDataset(images, torch.tensor(labels))
    model = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * 4 * 4, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip
    optimizer = hvd.DistributedOptimizer(
        torch.optim.SGD(model.parameters(), lr=0.05),
        named_parameters=model.named_parameters(),
        compression=DLSCompressor(density=args.density),  # the second
    )
    # The compressor's residuals are committed and restored with the optimizer's state.
    sampler = hvd.elastic.ElasticSampler(data)
    state = hvd.elastic.TorchState(model=model, optimizer=optimizer, sampler=sampler, epoch=0)
    state.register_reset_callbacks([lambda: say(f"{hvd.size()} workers from now on")])
    train(state, data, args.epochs)


@hvd.elastic.run
def train(state, data, epochs):
    loader = DataLoader(data, batch_size=32, sampler=state.sampler)
    while state.epoch < epochs:
        for batch, (images, labels) in enumerate(loader):
            state.optimizer.zero_grad()
            loss = F.cross_entropy(state.model(images), labels)
            loss.backward()
            state.optimizer.step()
            state.sampler.record_batch(batch, len(labels))
            if batch % COMMIT == COMMIT - 1:
                state.commit()
        say(f"epoch {state.epoch + 1}, {hvd.size()} workers, loss {loss.item():.3f}")
        state.epoch += 1
        state.sampler.set_epoch(state.epoch)
        state.commit()


def say(text):
    if hvd.rank() == 0:
        print(text, flush=True)


if __name__ == "__main__":
    main()
