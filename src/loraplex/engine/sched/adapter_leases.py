"""Bringing requests' adapters into slots, in the background where they must be read from disk."""

from loraplex.engine.faults import own_fault
from loraplex.engine.sched.capacity import fits_beside_pinned
from loraplex.engine.sched.request_adapters import RequestAdapters
from loraplex.engine.sched.sequence import RequestState, SequenceState
from loraplex.errors import AdapterChangedError, CapacityError, LoraplexError
from loraplex.models.multi_lora import MultiLoraModel

_PATIENCE = 4  # requests for each slot that may go before one that came earlier


class AdapterLeases:
    """The adapters that running and paused requests hold. A request keeps the versions it began with."""

    def __init__(self, model: MultiLoraModel) -> None:
        self._model = model
        self._holders: set[RequestState] = set()
        self._passed_over: RequestState | None = None  # waits for slots, while others that came later get some
        self._num_passing = 0
        self.failures: list[tuple[SequenceState, LoraplexError]] = []

    def bring(self, sequence: SequenceState) -> bool:
        """Whether its adapters are in slots now. If not, ask again later; or they can't be, which `failures` tells."""
        state = sequence.state
        if state.binding is not None:
            return self._have_arrived(state.binding)
        try:
            if state.loads is None:
                state.loads = list(self._model.store.prefetch(state.names))
            if not all(load.done() for load in state.loads) or self._must_let_pass(state):
                return False
            model, captured = self._model, state.request.capture is not None
            linked = model.registry.linked
            binding = RequestAdapters(
                model.store,
                model.mixtures,
                linked,
                state.link,
                captured=captured,
                residual_layers=state.request.residual_layers,
            )
            try:
                binding.check_vocabulary(state.vocabulary)
            except AdapterChangedError:
                binding.close()
                raise
            state.binding = binding
        except CapacityError as error:
            self._passed_over = self._passed_over or state
            if not self._holders or not fits_beside_pinned(self._model.store, state.names):
                self.failures.append((sequence, error))
            return False  # else slots will be free when others end
        except Exception as error:
            self.failures.append((sequence, own_fault(error, "bringing the request's adapters into slots")))
            return False
        self._holders.add(state)
        self._count_passing(state)
        return self._have_arrived(state.binding)

    def _must_let_pass(self, state: RequestState) -> bool:
        """Whether a request that needs many slots has waited long enough: who came later waits until it has them."""
        first = self._passed_over
        if first is None or not state.names or self._num_passing < _PATIENCE * self._model.store.config.num_slots:
            return False
        return state.arrival > first.arrival and state.request.priority <= first.request.priority

    def _count_passing(self, state: RequestState) -> None:
        if state is self._passed_over:
            self._passed_over, self._num_passing = None, 0
        elif self._passed_over is not None and state.names:
            self._num_passing += state.arrival > self._passed_over.arrival

    def _have_arrived(self, binding: RequestAdapters) -> bool:
        """Whether the weights are on the device: until then, others' steps go on without this request."""
        return all(self._model.store.slots.is_ready(slot) for slot in binding.slots)

    def release(self, state: RequestState) -> None:
        """Let a request's adapters go."""
        self._holders.discard(state)
        if state is self._passed_over:
            self._passed_over, self._num_passing = None, 0
        binding, state.binding = state.binding, None
        if binding is not None:
            binding.close()

    def release_all(self) -> None:
        """Let all go, after a fault."""
        for state in list(self._holders):
            self.release(state)
