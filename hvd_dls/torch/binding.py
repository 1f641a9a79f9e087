"""One optimizer's parameters, the session that compresses their gradients, and their way out."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterable
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from horovod.common.exceptions import HorovodInternalError

from hvd_dls.adapter import BaseBinding, World, on_the_watch
from hvd_dls.config import DLSConfig
from hvd_dls.core.selection.backend import HOST, Array, Backend, Future
from hvd_dls.core.session.interrupts import Uninterrupted
from hvd_dls.core.session.session import Session
from hvd_dls.errors import DLSError, NonFiniteGradientError
from hvd_dls.torch import bookkeeping, joined, refusals, watching
from hvd_dls.torch.contexts import Dense, InFlight, as_sent, send_dense
from hvd_dls.torch.delivery import Delivery
from hvd_dls.torch.exchange import Exchange, gather
from hvd_dls.torch.handed_over import HandedOver
from hvd_dls.torch.looking import Looks
from hvd_dls.torch.on_device import Device, devices_of
from hvd_dls.torch.parameters import (
    NamedParameter,
    Parameters,
    as_numpy,
    copy_back,
    specs_of,
    stays_on_device,
    with_tensors,
)


class Binding(BaseBinding):
    """The parameters that Horovod reduces for an optimizer, and their compression.

    Args:
        named_parameters: (name, parameter) in model order; only weak references are kept.
        config: the options.

    Raises:
        DLSError: a gradient would not be floating point.
    """

    def __init__(self, named_parameters: Iterable[NamedParameter], config: DLSConfig) -> None:
        pairs = list(named_parameters)
        super().__init__(specs_of(pairs), config)
        self.parameters = Parameters(pairs)
        self._itemsize = {layer.name: layer.itemsize for layer in self._layers}
        self._process_set: hvd.ProcessSet = hvd.global_process_set
        self._delivery: Delivery | None = None
        self._lock = threading.RLock()
        self._on_device: dict[str, Device] = {}  # layers whose gradients do not come to the host
        self._looks = Looks()
        self._optimizer: Any = lambda: None  # weak reference to Horovod's, of the step in progress
        self._handles: Any = None  # its record of that step
        self.came_in = HandedOver()  # gradients of the step in progress
        self._leaving = False  # whether reductions of a step that is given up are being begun
        self._left: Callable[[], None] | None = None  # what is still to be done for such a step
        self._unfinished: list[int] = []  # handles of its reductions that others did not join

    @property
    def alive(self) -> bool:
        """Whether any of the parameters still exists."""
        return bool(self.parameters.named())

    @property
    def refused(self) -> bool:
        """Whether the step in progress, or the last one, is skipped for NaN or Inf."""
        return self.session is not None and self.session.refused

    # The way of a gradient ----------------------------------------------------------------------

    @on_the_watch
    def compress(
        self, optimizer: Any, name: str, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, InFlight | Dense]:
        """Sends a gradient's largest entries on their way, or hands it to Horovod as it is.

        Args:
            optimizer: Horovod's, which calls.
            name: of the parameter.
            gradient: of it.

        Returns:
            What Horovod allreduces, and what ``decompress`` needs: the gradient for a dense layer,
            else a placeholder 1.0.  Whatever factor Horovod's reduction applies to the placeholder
            (average or sum, pre- and postscale) applies to the gradient.
        """
        if self._leaving:
            return self._nothing(name, gradient)
        if self._left is not None and self.agreed:  # interrupted, the last time
            self._left()
        session = self._session_of_step(optimizer, name, gradient)
        parameter = self.parameters.get(name)
        if parameter is not None and not parameter.requires_grad:
            if not session.has(name):
                self._come_in(session, name, None)
            return self._nothing(name, gradient)
        array = self.array(name, gradient) if session.is_sparse(name) else None
        if not session.has(name):
            self._come_in(session, name, gradient, array)
        if array is not None:
            return self._placeholder(name, gradient, array)
        whole = gradient
        if session.corrects:
            corrected = torch.as_tensor(session.correct(name, self.array(name, gradient)))
            whole = corrected.view(gradient.shape).to(gradient.device)
        whole = as_sent(whole)
        return whole, Dense(gradient.dtype, whole, self, name)

    def _come_in(
        self, session: Session, name: str, gradient: torch.Tensor | None, array: Array | None = None
    ) -> None:
        """Hands a gradient, or that there is none, to the session; sends buckets that are complete.

        ``array`` is the same as the session takes it, if it is to be compressed.
        """
        assert self._delivery is not None
        with self._lock:
            if gradient is None:
                complete = session.leave_out(name)
            elif array is not None:
                complete = session.compress(name, array)
            else:
                finite = session.dense_step or self._finite(session, name, gradient)
                complete = session.note(name, finite)
            if gradient is not None:
                self.came_in.add(name, gradient)
            if complete is not None or self._on_device:  # which may have done what it had to
                self._delivery.send_ready()

    def _placeholder(
        self, name: str, gradient: torch.Tensor, array: Array
    ) -> tuple[torch.Tensor, InFlight]:
        placeholder = torch.ones(1, dtype=torch.float64)
        return placeholder, InFlight(self, name, gradient, array, placeholder)

    def _nothing(self, name: str, gradient: torch.Tensor) -> tuple[torch.Tensor, InFlight | Dense]:
        """What ``compress`` returns of a layer of which this rank sends nothing."""
        assert self.session is not None
        if not self.session.is_sparse(name):
            return send_dense(torch.zeros_like(gradient), self, name)
        return self._placeholder(name, gradient, self.array(name, gradient))

    @on_the_watch
    def decompress(self, reduced_one: torch.Tensor | None, sent: InFlight) -> torch.Tensor:
        """All ranks' entries in the gradient's own memory, scaled as Horovod scaled the 1.0."""
        assert self.session is not None
        self._receive_all(self.session)
        one = sent.placeholder if reduced_one is None else reduced_one
        scale = one.item() / self.session.groups.count
        gradient, array = sent.gradient, sent.array
        self._settled_by(self.session.decompress, sent.name, array, scale)
        if sent.name in self._on_device:
            if not gradient.is_contiguous():
                self._on_device[sent.name].finish()
                gradient.copy_(array.view_as(gradient))
        elif not (gradient.is_cpu and gradient.is_contiguous()):
            copy_back(array, gradient)
        return gradient

    @on_the_watch
    def decompress_dense(self, reduced: torch.Tensor | None, sent: Dense) -> torch.Tensor:
        """A gradient that Horovod has reduced whole; zero or Inf, if the step is skipped."""
        session, whole = self.session, sent.whole if reduced is None else reduced
        assert session is not None
        self._receive_all(session)
        array = self.array(sent.name, whole) if session.dense_step else None
        counts = self._settled_by(session.accept, sent.name, array)
        gradient = whole if whole.dtype == sent.dtype else whole.to(sent.dtype)
        return gradient if counts else gradient.fill_(torch.inf if session.marks_skipped else 0.0)

    @on_the_watch
    def wait(self) -> None:
        """Waits for what is on its way, if all is: sleeping, where Horovod's own wait would spin.

        If some layers have not come in, Horovod's wait, which first compresses gradients of unused
        parameters, must go first: other ranks may be waiting for these.
        """
        session = self.session
        if self.agreed and session is not None and session.in_step and session.complete:
            self._receive_all(session)

    def clear_untouched(self) -> None:
        """Takes the gradients of layers away that took no part on any rank.

        An optimizer does nothing for a parameter without a gradient, where zeros would let weight
        decay and momentum move it.
        """
        for name in self.session.untouched if self.session else ():
            parameter = self.parameters.get(name)
            if parameter is not None:
                parameter.grad = None

    # A step and its end -------------------------------------------------------------------------

    def _session_of_step(self, optimizer: Any, name: str, gradient: torch.Tensor) -> Session:
        """The session, in a step that this gradient belongs to."""
        if self._itemsize[name] != gradient.element_size():
            self._change_types()
        self.start(optimizer)
        session = self.session
        assert session is not None
        # Horovod's optimizer has another record of handles once it has forgotten a step.
        other = self._optimizer() is not optimizer or self._handles is not optimizer._handles
        if session.in_step and (other or self._is_new(name, gradient, optimizer)):
            self.abandon()
        if not session.in_step:
            if watching.current is not None:
                watching.current.step_begins(optimizer)
            self._optimizer, self._handles = weakref.ref(optimizer), optimizer._handles
            self.came_in = HandedOver()
            self._follow_loss_scale(session)
            session.begin(session.missed | self.parameters.frozen())
        return session

    def _is_new(self, name: str, gradient: torch.Tensor, optimizer: Any) -> bool:
        """Whether a gradient that comes in cannot be of the step in progress.

        One that Horovod hands over again is: an interrupt came before it had recorded the first.
        """
        assert self.session is not None
        if not self.session.has(name) or not self.came_in.has_other(name, gradient):
            return False
        if optimizer._handles:
            raise DLSError(
                f"layer {name!r}: two gradients in one step; call zero_grad(), backward() and "
                "step() in turns, or compression.abandon_step() after an exception"
            )
        return True

    def start(self, optimizer: Any) -> None:
        """Agrees with the other ranks, unless they have: when all have come this far."""
        if self.agreed:
            return
        self._process_set = optimizer.process_set
        world = World(
            rank=self._process_set.rank(),
            size=self._process_set.size(),
            local_size=hvd.local_size(),
            set_id=self._process_set.process_set_id,
            global_rank=hvd.rank(),
            local_rank=hvd.local_rank(),
            averages=optimizer.op == hvd.Average,
        )
        if self.session is not None:
            self.session.abandon()  # Horovod was shut down: nobody waits any more
        if self._delivery is not None:
            self._delivery.close()
            self._delivery = None
        self._left, self._unfinished = None, []  # nor for these
        session = self.agree(world)
        exchange = Exchange(self._label, self._process_set, self.host_sets)
        self._delivery = Delivery(session, exchange, self._lock)

    def _change_types(self) -> None:
        """Takes over that the model's parameters have other types now, as by ``model.double()``."""
        if self.session is not None:
            self.session.abandon()
        self._layers = specs_of(self.parameters.named())
        self._itemsize = {layer.name: layer.itemsize for layer in self._layers}
        self._epoch = None  # all ranks agree anew

    def abandon(self) -> None:
        """Gives the step in progress up; Horovod's optimizer forgets it, too.

        Other ranks may be waiting for what this one has not sent: they get it, with the word that
        the step was given up.
        """
        session = self.session
        if session is None or not session.in_step:
            return
        missed = session.missed
        with self._lock:
            farewell = session.abandon()
            reachable = self._delivery if self.agreed else None
            if reachable is not None:
                reachable.abandon(farewell)
        if reachable is not None:
            self._leave_horovod(missed)
        else:
            self._forget_in_horovod()

    def go_back(self, session: Session | None) -> None:
        """See ``BaseBinding``; Horovod's optimizer forgets the step in progress, too."""
        optimizer = self._optimizer()
        if optimizer is not None:
            bookkeeping.forget_step(optimizer)
        self._handles, self._left = None, None
        super().go_back(session)

    def _leave_horovod(self, missed: Collection[str] = ()) -> None:
        """Brings Horovod's part of a step to its end, and has Horovod's optimizer forget it."""
        record = self._handles
        self._forget_in_horovod()
        self._end_in_horovod(record, missed)

    def _end_in_horovod(self, record: Any, missed: Collection[str]) -> None:
        """Begins what is missing of a step's reductions, and waits for all of them."""
        of, sparse = self._optimizer, {id(self.parameters.get(name)) for name in missed}

        def leave() -> None:
            optimizer = of()
            if optimizer is not None and record is not None:
                self._leaving = True
                try:
                    bookkeeping.hand_over_rest(optimizer, record, sparse)
                finally:
                    self._leaving = False
                self._unfinished = bookkeeping.wait_for(bookkeeping.reductions_in(record))
            self._left = None

        self._left = leave
        leave()

    def _catch_up(self, session: Session, rounds: np.ndarray) -> None:
        assert self._delivery is not None
        if self._left is not None:  # interrupted, the last time
            self._left()
        steps = int(rounds[-1] - session.rounds[-1])
        with self._lock, Uninterrupted():  # what counts as sent is sent
            for farewell in session.sit_out(rounds):
                self._delivery.abandon(farewell)
        for _ in range(steps):
            self._end_in_horovod({}, session.missed)
        # Other ranks join by now what they had not when this one gave a step up.
        self._unfinished = bookkeeping.wait_for(self._unfinished)

    def _forget_in_horovod(self) -> None:
        optimizer = self._optimizer()
        if optimizer is not None and optimizer._handles is self._handles:
            bookkeeping.forget_step(optimizer)
        self._handles = None

    def _settled_by(self, settle: Any, *arguments: Any) -> Any:
        """Calls the session; after an error that ends the step, Horovod forgets it, too."""
        try:
            return settle(*arguments)
        except NonFiniteGradientError:
            self._leave_horovod()
            raise

    def _receive_all(self, session: Session) -> None:
        """Waits for all that is on its way: before a step changes anything, all of it is there."""
        assert self._delivery is not None
        try:
            if not session.dense_step:
                self._delivery.wait_for_all()
            refusals.refuse_early_unscale(self._optimizer(), self.loss_scale)
            self.came_in.check(self.parameters)
        except DLSError:
            self.abandon()
            raise
        except HorovodInternalError as error:
            optimizer = self._optimizer()
            one = 1.0 if optimizer is None or optimizer.op == hvd.Average else session.world_size
            raise joined.explained(error, self._handles, one) from error

    def _gather(self, name: str, array: np.ndarray) -> np.ndarray:
        return gather(name, array, self._process_set)

    def _norms(self) -> dict[str, float]:
        return {n: p.detach().double().norm().item() for n, p in self.parameters.named()}

    # Layers on a device --------------------------------------------------------------------------

    @property
    def _wants_device(self) -> bool:
        return any(stays_on_device(parameter) for _, parameter in self.parameters.named())

    def _backends(self, config: DLSConfig) -> dict[str, Backend]:
        self._on_device = devices_of(self.parameters, config)
        return dict(self._on_device)

    def array(self, name: str, gradient: torch.Tensor) -> Array:
        """(n,) where the passes are, as the session takes it: its own memory if it can be."""
        if name in self._on_device:
            return gradient.detach().reshape(-1)
        return as_numpy(gradient)

    def _finite(self, session: Session, name: str, gradient: torch.Tensor) -> bool | Future[bool]:
        if session.bucket_of(name) is None:
            return True  # nobody asks
        if name in self._on_device:
            return self._looks.look(gradient)
        return HOST.finite(self.array(name, gradient))

    # State ---------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The session's state in types that ``torch.load(weights_only=True)`` accepts."""
        state = super().state_dict()
        return state if self.session is None else with_tensors(state)
