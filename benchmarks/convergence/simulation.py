"""Simulates the workers of a training job in one process, without Horovod.

Every worker has the session it would have as a rank of a real job, and all share one model: they
compute their gradients in turn, with the same weights, and the model's ``.grad`` gets what a real
job would leave in every rank's.  With two workers that is the same to the bit; with more, sums of
what goes dense are added up in rank order here, and in another order by Horovod.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import nn

from benchmarks.common.internals import Groups, Session, layer_spec
from hvd_dls.config import DLSConfig

Gradients = dict[str, np.ndarray]  # (n,) of each parameter, by name


class SimulatedJob:
    """A number of workers that train one model.

    Running statistics of batch norm are those of worker 0, as its checkpoint would have them.

    Args:
        model: all of its parameters take part in each step.
        workers: how many there are, P.
        config: the compressor's options; None: dense.
        measure_all: all workers measure the quality of their selection in every so many steps; in
            the others, worker 0 does as ``config`` says.
        hosts: number of workers on each, with the option ``hierarchical``; None: each is alone.

    Attributes:
        workers: how many there are.
        sessions: of each worker; empty if dense.
        gradient_seconds: of each worker's last loss and gradient.
    """

    def __init__(
        self,
        model: nn.Module,
        workers: int,
        config: DLSConfig | None = None,
        measure_all: int = 0,
        hosts: Sequence[int] | None = None,
    ) -> None:
        self._model = model
        self._parameters = dict(model.named_parameters())
        self.workers = workers
        self.sessions: list[Session] = []
        self.gradient_seconds = [0.0] * workers
        if config is not None:
            layers = [
                layer_spec(name, tuple(p.shape), "torch", p.element_size())
                for name, p in self._parameters.items()
            ]
            norms = {n: p.detach().double().norm().item() for n, p in self._parameters.items()}
            configs = [config] + [replace(config, measure_every=measure_all)] * (workers - 1)
            sizes = hosts or [1] * workers
            self.sessions = [
                Session(layers, own, workers, rank, norms, groups=Groups(sizes, rank))
                for rank, own in enumerate(configs)
            ]

    def backward(self, loss_of: Callable[[int], torch.Tensor]) -> float:
        """Computes all workers' gradients, exchanges them, and sets each parameter's ``.grad``.

        Args:
            loss_of: computes the loss of a worker's mini-batch, given the worker's number.

        Returns:
            Mean of the losses.

        Raises:
            NonFiniteGradientError: see ``Session.decompress``.
        """
        gradients, mean_loss = self.gradients(loss_of)
        reduced = self.reduced(gradients)
        for name, parameter in self._parameters.items():
            parameter.grad = torch.from_numpy(reduced[name]).view_as(parameter)
        return mean_loss

    def gradients(self, loss_of: Callable[[int], torch.Tensor]) -> tuple[list[Gradients], float]:
        """Computes all workers' gradients, and the mean of their losses: see ``backward``."""
        gradients, losses, buffers = [], [], []
        for worker in range(self.workers):
            start = time.perf_counter()
            self._model.zero_grad(set_to_none=True)
            loss = loss_of(worker)
            loss.backward()
            losses.append(loss.item())
            gradients.append({name: _flat(p.grad) for name, p in self._parameters.items()})
            self.gradient_seconds[worker] = time.perf_counter() - start
            if worker == 0:
                buffers = [buffer.clone() for buffer in self._model.buffers()]
        for buffer, first in zip(self._model.buffers(), buffers, strict=True):
            buffer.copy_(first)
        return gradients, float(np.mean(losses))

    def reduced(self, gradients: list[Gradients]) -> Gradients:
        """Exchanges all workers' gradients, which are overwritten; returns what each gets."""
        return exchange(self.sessions, gradients) if self.sessions else averages(gradients)


def averages(gradients: list[Gradients]) -> Gradients:
    """Computes what Horovod's allreduce returns: sums, added up in rank order, divided by P.

    (With P a power of two it is the same whether a sum is divided or multiplied.)
    """
    reduced = {}
    for name, first in gradients[0].items():
        total = first.copy()
        for others in gradients[1:]:
            total += others[name]
        reduced[name] = total * total.dtype.type(1 / len(gradients))
    return reduced


def exchange(sessions: list[Session], gradients: list[Gradients]) -> Gradients:
    """Exchanges the gradients of a step.

    Args:
        sessions: of each worker.
        gradients: of each worker; they are overwritten.

    Returns:
        What every worker gets.
    """
    return exchange_all(sessions, gradients)[0]


def exchange_all(sessions: list[Session], gradients: list[Gradients]) -> list[Gradients]:
    """Exchanges as ``exchange``; returns what each worker computes, which is the same."""
    names = list(reversed(gradients[0]))  # as backward reaches them
    sparse = [name for name in names if sessions[0].is_sparse(name)]
    sent = [_send(session, own, names) for session, own in zip(sessions, gradients, strict=True)]
    reduced = averages([{n: own[n] for n in names if n not in sparse} for own in gradients])
    if sessions[0].staged:
        _exchange_in_stages(sessions)
    results = []
    for session, own in zip(sessions, gradients, strict=True):
        for bucket in sent[0]:
            session.receive(bucket, np.concatenate([payloads[bucket] for payloads in sent]))
        result = {}
        dense_step = session.dense_step
        skipped = np.inf if session.marks_skipped else 0.0
        for name in names:
            if name in sparse:
                session.decompress(name, own[name], 1 / session.groups.count)
                result[name] = own[name]
            else:
                counts = session.accept(name, reduced[name] if dense_step else None)
                result[name] = reduced[name] if counts else np.full_like(reduced[name], skipped)
        results.append(result)
    return results


def _send(session: Session, gradients: Gradients, names: list[str]) -> dict[int, np.ndarray]:
    """Compresses a worker's gradients.

    Args:
        session: of the worker.
        gradients: those that go dense are replaced if the session corrects them.
        names: of all layers, in the order in which backward reaches them.

    Returns:
        The payload of each bucket; none where hosts average first, or owners add up.
    """
    sent = {}
    for name in names:
        gradient = gradients[name]
        if session.is_sparse(name):
            complete = session.compress(name, gradient)
        else:
            finite = session.dense_step or bool(np.isfinite(gradient).all())
            complete = session.note(name, finite)
            if session.corrects:
                gradients[name] = session.correct(name, gradient)
        if complete is not None and not session.staged:
            sent[complete] = session.payload(complete)
    if session.staged:
        return {}
    return sent | {bucket: session.payload(bucket) for bucket in session.unfinished()}


def _exchange_in_stages(sessions: list[Session]) -> None:
    """Takes all buckets through their stages: averages of hosts, owners, payloads, hand-on."""
    for bucket in sessions[0].unfinished():
        senders = sessions[0].routing.senders[bucket]
        if sessions[0].grouped:
            _average_in_hosts(sessions, bucket)
        if sessions[0].owners is not None:
            parts = [sessions[rank].parts(bucket) for rank in senders]
            for number, rank in enumerate(senders):
                sessions[rank].collected(bucket, np.concatenate([own[number] for own in parts]))
        gathered = np.concatenate([sessions[rank].payload(bucket) for rank in senders])
        if not sessions[0].grouped:
            for session in sessions:
                session.receive(bucket, gathered)
            continue
        handed_on = [
            session.hand_on(bucket, gathered) if session.sends(bucket) else session.header(bucket)
            for session in sessions
        ]
        for session in sessions:
            mates = session.groups.mates
            session.receive(bucket, np.concatenate([handed_on[mate] for mate in mates]))


def _average_in_hosts(sessions: list[Session], bucket: int) -> None:
    contributions = [session.contribution(bucket) for session in sessions]
    for session in sessions:
        mates = session.groups.mates
        total = contributions[mates[0]].copy()
        for mate in mates[1:]:
            total += contributions[mate]
        session.added_up(bucket, total)


def _flat(gradient: torch.Tensor | None) -> np.ndarray:
    """Returns a gradient as (n,) array that shares its memory."""
    assert gradient is not None, "a parameter took no part"
    flat: np.ndarray = gradient.detach().reshape(-1).numpy()
    return flat
