"""Several models under one memory limit: loaded on demand, the least recently used given up first."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from nbhelpers import registry
from nbhelpers.devices import device as devices
from nbhelpers.loading import load as loading
from nbhelpers.loading.folder import count_parameters
from nbhelpers.loading.load import Loaded
from nbhelpers.records import DTYPES, LabError, ModelSpec

MIB = 2**20


def weight_bytes(spec: ModelSpec, device: str = "auto", dtype: str = "auto") -> int:
    """Bytes of a model's weights on its device, from the headers of its files, before any is read.

    Fetches a model of the Hub. A shape: model has no files; its registered count serves. Raises LabError.
    """
    folder = loading.fetch(spec)
    count = (spec.parameters or 0) if spec.kind == "shape" else count_parameters(folder, spec.alias)
    return count * DTYPES[devices.detect(device, dtype).dtype]


@dataclass
class _Place:
    """A model's share of the limit, held from before its loading until after its unloading."""

    alias: str
    bytes: int
    loaded: Loaded | None = None  # None while a thread loads it
    users: list[int] = field(default_factory=list)  # idents of threads, the loading one included


class ModelPool:
    """Models on demand, their weights together never above max_bytes; safe to share between threads.

    The limit is on weights: leave room beside it for the caches of generations and for the framework.
    Models load one at a time, because the libraries change global settings while they load.
    load, unload and need are those of the laboratory unless given.
    """

    def __init__(
        self,
        max_bytes: int,
        device: str = "auto",
        dtype: str = "auto",
        wait_s: float = 600.0,
        *,
        load: Callable[[ModelSpec, str, str], Loaded] = loading.load,
        unload: Callable[[Loaded], None] = loading.unload,
        need: Callable[[ModelSpec, str, str], int] = weight_bytes,
    ) -> None:
        """wait_s: how long to wait for others' models to be released. LabError for a limit below 1 byte."""
        if max_bytes < 1:
            raise LabError(f"The limit of a model pool is {max_bytes} bytes: give it at least one.")
        self.max_bytes, self.device, self.dtype, self.wait_s = max_bytes, device, dtype, wait_s
        self.loads = self.evictions = self.peak_bytes = 0
        self._load, self._unload, self._need = load, unload, need
        self._places: OrderedDict[str, _Place] = OrderedDict()  # by source, least recently used first
        self._needs: dict[str, int] = {}
        self._changed = threading.Condition()
        self._one_load = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Bytes of the models that are loaded or being loaded."""
        with self._changed:
            return sum(place.bytes for place in self._places.values())

    @property
    def resident(self) -> tuple[str, ...]:
        """Aliases of the models in the pool, least recently used first."""
        with self._changed:
            return tuple(place.alias for place in self._places.values())

    @contextmanager
    def use(self, name: str) -> Iterator[Loaded]:
        """The model of this name, loaded if need be, and not evicted before the block ends.

        Raises LabError for a model that cannot be loaded, that is larger than the limit alone or beside
        the models this thread holds, or whose room others did not release in time. The pool then holds
        what it held, less what was evicted to make room.
        """
        spec, thread = registry.resolve(name), threading.get_ident()
        if spec.source not in self._needs:
            self._needs[spec.source] = self._need(spec, self.device, self.dtype)
        place = self._enter(spec, thread)
        try:
            if place.loaded is None:
                place.loaded = self._fill(spec, place)
                self._tell(lambda: None)
            yield place.loaded
        finally:
            self._tell(lambda: self._leave(spec.source, place, thread))

    def clear(self) -> None:
        """Unload every model that nobody uses."""
        self._tell(lambda: self._evict(self.max_bytes))

    def _tell(self, change: Callable[[], None]) -> None:
        with self._changed:
            change()
            self._changed.notify_all()

    def _enter(self, spec: ModelSpec, thread: int) -> _Place:
        with self._changed:
            place = self._changed.wait_for(lambda: self._claim(spec, thread), self.wait_s)
            if place is None:
                busy = ", ".join(place.alias for place in self._places.values() if place.users)
                raise LabError(
                    f"{spec.alias} got no room in the model pool within {self.wait_s:g} s, because {busy} "
                    "is in use: end those uses first, or give the pool more memory."
                )
            return place

    def _claim(self, spec: ModelSpec, thread: int) -> _Place | None:
        """A place with this thread among its users; None while the use of others stands in the way."""
        place = self._places.get(spec.source)
        if place is None:
            need = self._needs[spec.source]
            self._refuse_hopeless(spec, need, thread)
            if self._bytes(lambda other: bool(other.users)) + need > self.max_bytes:
                return None
            self._evict(need)
            place = self._places[spec.source] = _Place(spec.alias, need)
            self.peak_bytes = max(self.peak_bytes, self._bytes(lambda other: True))
        elif place.loaded is None:  # another thread is at it
            return None
        place.users.append(thread)
        self._places.move_to_end(spec.source)
        return place

    def _refuse_hopeless(self, spec: ModelSpec, need: int, thread: int) -> None:
        held = self._bytes(lambda place: thread in place.users)
        if held + need > self.max_bytes:
            beside = f" beside the {held / MIB:,.1f} MiB that its caller holds in use" if held else ""
            raise LabError(
                f"{spec.alias} takes {need / MIB:,.1f} MiB{beside}, more than the model pool's limit of "
                f"{self.max_bytes / MIB:,.1f} MiB: raise it, or choose a half dtype or a smaller model."
            )

    def _bytes(self, which: Callable[[_Place], bool]) -> int:
        return sum(place.bytes for place in self._places.values() if which(place))

    def _evict(self, need: int) -> None:
        """Unload idle models, least recently used first, until need bytes fit or none is idle."""
        for source, place in list(self._places.items()):
            if self._bytes(lambda other: True) + need <= self.max_bytes:
                return
            if not place.users and place.loaded is not None:
                self._unload(place.loaded)
                del self._places[source]
                self.evictions += 1

    def _fill(self, spec: ModelSpec, place: _Place) -> Loaded:
        with self._one_load:
            loaded = self._load(spec, self.device, self.dtype)
            if loaded.report.parameter_bytes > place.bytes:
                self._unload(loaded)
                raise LabError(
                    f"{spec.alias} takes {loaded.report.parameter_bytes / MIB:,.1f} MiB, more than the "
                    f"{place.bytes / MIB:,.1f} MiB that its files name: the model pool does not keep it."
                )
            self.loads += 1
            return loaded

    def _leave(self, source: str, place: _Place, thread: int) -> None:
        place.users.remove(thread)
        if place.loaded is None:  # its loading failed
            del self._places[source]
        else:
            self._places.move_to_end(source)
