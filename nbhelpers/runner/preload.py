"""What a run's processes find loaded: the fork server imports this file, and nothing else does.

An import leaves next to no garbage, and Python looks for it all the time: a fifth of the seconds.
"""

import gc
import logging
from importlib import import_module

for name in ("torchao", "torch.utils._pytree"):  # which transformers imports: it tells what it cannot load
    logging.getLogger(name).setLevel(logging.ERROR)
gc.disable()
for name in (
    *("ipykernel.kernelapp", "matplotlib.pyplot", "scipy.stats", "pandas", "torch"),
    *(f"transformers.models.{name}.modeling_{name}" for name in ("gpt2", "bloom", "opt", "llama")),
    *("nbhelpers.pipeline", "nbhelpers.report.html", "mlflow.store.tracking.sqlalchemy_store"),
):
    import_module(name)
gc.freeze()  # the collectors of forked processes would otherwise touch, and so copy, every shared page
gc.enable()
