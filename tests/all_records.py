"""Every record of the package, wherever it is defined."""

import importlib
from pathlib import Path

from nbhelpers import store
from nbhelpers.records import Lenient, Record


def all_records() -> list[type]:
    """The classes that are read from files, by name."""
    package = Path(store.__file__).parent
    for path in package.rglob("[!_]*.py"):
        importlib.import_module(".".join(("nbhelpers", *path.relative_to(package).with_suffix("").parts)))
    found = {*Record.__subclasses__(), *Lenient.__subclasses__()} - {Lenient}
    kinds = [kind for kind in found if kind.__module__.startswith("nbhelpers.")]
    return sorted(kinds, key=lambda kind: kind.__qualname__)
