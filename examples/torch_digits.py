"""Trains a small convolutional net on scikit-learn's handwritten digits.

    horovodrun -np 2 python examples/torch_digits.py --compression dls --density 0.01

An ordinary Horovod script: the one line that switches compression on is marked.
"""

import argparse
import json
import os

import horovod.torch as hvd
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

from hvd_dls.torch import DLSCompressor, load_checkpoint, save_checkpoint


def arguments():
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--compression", choices=["none", "fp16", "layerwise", "dls"], default="dls"
    )
    parser.add_argument("--density", type=float, default=0.01, help="share of entries sent a step")
    parser.add_argument("--batch-size", type=int, default=64, help="training batch size per rank")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--lr", type=float, default=0.02, help="learning rate")
    parser.add_argument("--momentum", type=float, default=0.9)
    parser.add_argument("--gradient-predivide-factor", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--no-cuda", action="store_true", help="train on the CPU")
    parser.add_argument("--log-interval", type=int, default=10, help="steps between log lines")
    parser.add_argument("--records", help="file for rank 0's record of each step (JSON lines)")
    parser.add_argument("--checkpoints", help="folder to save to after each epoch, and go on from")
    return parser.parse_args()


class Net(nn.Sequential):
    """3x3 and 1x1 convolutions, batch norm and two fully connected layers: 172,000 parameters."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(1, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
            nn.Conv2d(64, 32, 1), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Flatten(), nn.Linear(64 * 4 * 4, 128), nn.ReLU(), nn.Dropout(), nn.Linear(128, 10),
        )  # fmt: skip


def datasets():
    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    train, test = train_test_split(
        range(len(labels)), test_size=0.2, random_state=0, stratify=labels
    )
    labels = torch.tensor(labels)
    return TensorDataset(images[train], labels[train]), TensorDataset(images[test], labels[test])


def shifted(images):
    """Each image moved by up to one pixel, as augmentation."""
    moves = torch.randint(-1, 2, (len(images), 2)).tolist()
    return torch.stack([i.roll(move, dims=(1, 2)) for i, move in zip(images, moves, strict=True)])


def compressor(args):
    if args.compression == "none":
        return hvd.Compression.none
    if args.compression == "fp16":
        return hvd.Compression.fp16
    # measure_every compares each step with exact global top-k: for the records only.
    return DLSCompressor(
        density=args.density, strategy=args.compression, measure_every=int(bool(args.records))
    )


def record_of(compression, model):
    """One step as a dictionary: what was sent, and how good the choice was."""
    step = compression.last_step() if isinstance(compression, DLSCompressor) else None
    if step is None:  # dense
        width = 2 if compression is hvd.Compression.fp16 else 4
        return {"bytes": width * sum(p.numel() for p in model.parameters())}
    return {
        "bytes": step.sparse_bytes + step.dense_bytes,
        "k": dict(zip(step.names, step.k.tolist(), strict=True)),
        "thresholds": dict(zip(step.names, step.thresholds.tolist(), strict=True)),
        "spread": step.threshold_spread(),
        "energy": step.quality.energy,
        "misallocation": step.quality.misallocation,
    }


def accuracy(model, data, device):
    """Share of test images recognised; each rank looks at its part."""
    model.eval()
    mine = range(hvd.rank(), len(data), hvd.size())
    images, labels = data[mine]
    with torch.no_grad():
        right = (model(images.to(device)).argmax(1).cpu() == labels).sum()
    model.train()
    return hvd.allreduce(right, op=hvd.Sum, name="right").item() / len(data)


def main():
    args = arguments()
    hvd.init()
    torch.manual_seed(args.seed + hvd.rank())
    cuda = torch.cuda.is_available() and not args.no_cuda
    device = torch.device("cuda", hvd.local_rank()) if cuda else torch.device("cpu")

    train_data, test_data = datasets()
    sampler = DistributedSampler(train_data, num_replicas=hvd.size(), rank=hvd.rank())
    loader = DataLoader(train_data, args.batch_size, sampler=sampler, drop_last=True)

    model = Net().to(device)
    compression = compressor(args)
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=args.momentum)
    optimizer = hvd.DistributedOptimizer(
        optimizer,
        named_parameters=model.named_parameters(),
        compression=compression,  # <- the one line
        gradient_predivide_factor=args.gradient_predivide_factor,
    )
    hvd.broadcast_parameters(model.state_dict(), root_rank=0)
    hvd.broadcast_optimizer_state(optimizer, root_rank=0)

    first_epoch, first = 0, hvd.rank() == 0
    ours = compression if isinstance(compression, DLSCompressor) else None
    if args.checkpoints and (state := load_checkpoint(args.checkpoints, ours)):
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        first_epoch = state["epoch"] + 1
    step, steps = first_epoch * len(loader), args.epochs * len(loader)
    with open(args.records if first and args.records else os.devnull, "w") as records:
        for epoch in range(first_epoch, args.epochs):
            sampler.set_epoch(epoch)
            for images, labels in loader:
                optimizer.zero_grad()
                output = model(shifted(images).to(device))
                loss = F.cross_entropy(output, labels.to(device), label_smoothing=0.1)
                loss.backward()
                optimizer.step()
                step += 1
                if args.records:
                    record = {"step": step, "loss": loss.item(), **record_of(compression, model)}
                    print(json.dumps(record), file=records)
                if first and (step % args.log_interval == 0 or step == steps):
                    print(
                        f"step {step}/{steps} epoch {epoch + 1} loss {loss.item():.4f}", flush=True
                    )
            if args.checkpoints:
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                save_checkpoint(args.checkpoints, {**state, "epoch": epoch}, ours)
    score = accuracy(model, test_data, device)
    if first:
        print(f"test accuracy {score:.4f}", flush=True)


if __name__ == "__main__":
    main()
