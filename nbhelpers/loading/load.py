"""Fetch, load and unload models: time and memory of it, and what exactly was loaded."""

from __future__ import annotations

import ctypes
import functools
import gc
import hashlib
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nbhelpers import registry, store
from nbhelpers.devices import device as devices
from nbhelpers.devices import fit
from nbhelpers.devices.device import DeviceReport
from nbhelpers.loading import downloads
from nbhelpers.loading.folder import (
    DEFAULT_CONTEXT,
    TOKENIZER_FILES,
    check_folder,
    count_parameters,
    describe,
    weight_files,
)
from nbhelpers.loading.random_weights import random_weights, shape_revision
from nbhelpers.records import SCHEMA_VERSION, LabError, ModelSpec, Record, Settings
from nbhelpers.runner import limits

MEMORY_LOOK_S = 1.0
SHAPE_TOKENIZER = "lab-gpt2"  # any text becomes ids below 4,096, which every registered architecture has
CONFIG_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja")
VOCABULARY_FILES = (*TOKENIZER_FILES, "merges.txt", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class LoadingReport(Record):
    model: str
    slug: str
    revision: str
    source: str
    family: str
    parameters: int
    context: int
    vocabulary: int
    device: str
    dtype: str
    fetch_s: float
    load_s: float
    parameter_bytes: int  # sum of numel x itemsize, tied weights once
    rss_before_bytes: int
    rss_after_load_bytes: int
    rss_after_forward_bytes: int
    device_peak_bytes: int | None
    quality_applies: bool = True  # False for random weights (shape:...)
    prompt_format: Literal["plain", "chat"] = "plain"
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Loaded:
    """A model ready to generate. After unload() it is an empty shell."""

    spec: ModelSpec
    model: Any  # transformers.PreTrainedModel, in eval mode, on its device
    tokenizer: Any  # transformers.PreTrainedTokenizerBase, padding on the left, with a pad token
    folder: Path | None  # None for shape: models
    revision: str
    report: LoadingReport
    device: str


def fetch(spec: ModelSpec, download_timeout: float | None = None) -> Path:
    """The folder of a model's files, downloaded if need be in download_timeout seconds (None: the run's
    limit), checked for safety.

    Embedded files are compared with their recorded sha256. A shape: model has the folder of its tokenizer.
    Raises LabError.
    """
    if spec.kind == "hub":
        return downloads.download(spec, download_timeout or limits.current().download_s)
    if spec.kind == "shape":
        return fetch(registry.resolve(SHAPE_TOKENIZER))
    folder = registry.folder_of(spec)
    assert folder is not None
    if spec.kind == "embedded" and not folder.is_dir():
        raise LabError(f"The embedded model {spec.alias} is missing: run `python tools/models/build.py`.")
    check_folder(folder, spec.alias)
    for name, digest in spec.sha256.items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            raise LabError(
                f"The file {name} of the embedded model {spec.alias} is not the recorded one "
                "(sha256 differs): restore it with git, or run `python tools/models/build.py`."
            )
    return folder


def file_digest(path: Path) -> str:
    """sha256 of a file, computed once per process for each (path, size, time of change)."""
    status = path.stat()
    return _digest(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _digest(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def revision_of(spec: ModelSpec) -> str:
    """What exactly this model is: the Hub commit, or 12 hex digits over all files that decide its text."""
    return _revision(spec, fetch(spec))


def _revision(spec: ModelSpec, folder: Path) -> str:
    if spec.kind == "hub":
        return folder.name  # the Hub's cache names snapshots by commit
    if spec.kind == "shape":
        return shape_revision(spec)
    small = [folder / name for name in (*CONFIG_FILES, *VOCABULARY_FILES) if (folder / name).is_file()]
    lines = [f"{path.name} {file_digest(path)}" for path in (*weight_files(folder, spec.alias), *small)]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:12]


def load(model: str | ModelSpec, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Fetch and load a causal language model and its tokenizer, with time and memory of it.

    The weights come from safetensors only and no code of the model's repository runs. A model whose end
    token is its beginning token loads as it is; the pad token falls back as in with_padding. Raises LabError
    for a model that does not fit, cannot be read, is no causal language model, or contradicts itself.
    """
    spec = registry.resolve(model) if isinstance(model, str) else model
    quiet_torchao()
    # Imports are no part of the timing.
    from transformers import GenerationMixin, PreTrainedModel, PreTrainedTokenizerFast  # noqa: F401

    place = devices.detect(device, dtype)
    started = time.perf_counter()
    folder = fetch(spec)
    fetch_s = time.perf_counter() - started
    spec = spec if spec.kind == "shape" else describe(spec, folder)
    release(place.device)
    _wait_for_room(spec, place)
    devices.reset_peak(place.device)
    rss_before = devices.resident_memory()
    started = time.perf_counter()
    with _quiet(), _one_sentence(f"tokenizer of {spec.alias}"):
        tokenizer = load_tokenizer(folder)
    with _quiet(), _one_sentence(f"model {spec.alias}"):
        net = (
            random_weights(spec, place.device, place.dtype)
            if spec.kind == "shape"
            else _read_weights(folder, place, spec.alias)
        )
    devices.synchronize(place.device)
    load_s = time.perf_counter() - started
    rss_after_load = devices.resident_memory()
    _check_vocabulary(spec, net, tokenizer)
    net.generation_config.pad_token_id = tokenizer.pad_token_id
    with _one_sentence(f"model {spec.alias}"):
        _forward_once(net, place.device)
    rss_after_forward = devices.resident_memory()
    report = LoadingReport(
        model=spec.alias,
        slug=spec.slug,
        revision=_revision(spec, folder),
        source=spec.alias if spec.kind == "local" else spec.source,  # no path of this machine
        family=spec.family,
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        context=spec.context or DEFAULT_CONTEXT,
        vocabulary=net.get_input_embeddings().weight.shape[0],
        device=place.device,
        dtype=place.dtype,
        fetch_s=fetch_s,
        load_s=load_s,
        parameter_bytes=parameter_bytes(net),
        rss_before_bytes=rss_before,
        rss_after_load_bytes=rss_after_load,
        rss_after_forward_bytes=rss_after_forward,
        device_peak_bytes=None if place.device == "cpu" else devices.peak_memory(place.device),
        quality_applies=spec.kind != "shape",
        prompt_format=spec.prompt_format,
    )
    home = None if spec.kind == "shape" else folder
    return Loaded(spec, net, tokenizer, home, report.revision, report, place.device)


def unload(loaded: Loaded) -> None:
    """Give the model's memory back. What is left of it has shapes but no numbers and cannot generate.

    Dropping the last name is not enough where another one exists (a notebook's output history, a traceback),
    so the parameters themselves are dropped.
    """
    loaded.model.to("meta")
    release(loaded.device)


def release(device: str) -> None:
    """Hand unused memory back to the system: garbage, the device's cache, pages the C library keeps."""
    gc.collect()
    devices.empty_cache(device)
    if sys.platform == "linux":
        try:
            ctypes.CDLL("libc.so.6").malloc_trim(0)  # glibc keeps freed pages for later
        except (OSError, AttributeError):  # another C library
            return


def report_for(settings: Settings) -> LoadingReport:
    """The run's loading.json for this model, made now if it is missing or of something else."""
    place = devices.device_for(settings)
    path = registry.model_dir(settings) / "loading.json"
    if path.exists():
        report = store.read_json(path, LoadingReport)
        revision = revision_of(registry.resolve(settings.model))
        if (report.device, report.dtype, report.revision) == (place.device, place.dtype, revision):
            return report
    loaded = load(settings.model, place.device, place.dtype)
    unload(loaded)
    store.write_json(path, loaded.report)
    return loaded.report


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a model folder, padding on the left, with a pad token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        folder, padding_side="left", local_files_only=True, trust_remote_code=False
    )
    return with_padding(tokenizer)


def with_padding(tokenizer: Any) -> Any:
    """Give a tokenizer without a pad token its end token, else its unknown token, else token 0.

    Padded positions are masked, so any token serves; a new one would need a row that the model lacks.
    """
    if tokenizer.pad_token_id is None:
        spare = (tokenizer.eos_token, tokenizer.unk_token, tokenizer.convert_ids_to_tokens(0))
        tokenizer.pad_token = next(token for token in spare if token is not None)
    return tokenizer


def parameter_bytes(model: Any) -> int:
    """Bytes of the parameters: the sum of elements x item size, tied weights once."""
    return sum(parameter.numel() * parameter.itemsize for parameter in model.parameters())


def _read_weights(folder: Path, place: DeviceReport, name: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    _check_numbers(folder, name)
    net, info = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, place.dtype),
        local_files_only=True,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    # transformers would fill what is missing with random numbers.
    if absent := sorted(info["missing_keys"]) or sorted(key for key, *_ in info["mismatched_keys"]):
        raise LabError(
            f"The weights of the model {name} do not have the tensors that its config.json describes "
            f"({len(absent)} are missing or of another size, such as {absent[0]}): download both again."
        )
    return net.eval().to(place.device)


def _check_numbers(folder: Path, name: str) -> None:
    """Count what the configuration describes, without memory for it, against what the files hold.

    transformers would allocate what the files lack. Packed weights hold up to 8 numbers in one.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    described = sum(tensor.numel() for tensor in (*net.parameters(), *net.buffers()))
    held = count_parameters(folder, name)
    if described > 8 * held + 2**24:
        raise LabError(
            f"The config.json of the model {name} describes {described:,} numbers and its weights hold "
            f"{held:,}: download both again, or choose another model."
        )


def _wait_for_room(spec: ModelSpec, place: DeviceReport) -> None:
    """Compare what a model needs with what is free, again while the run's limit allows. Raises LabError."""
    needed = fit.generation_need(spec, place.dtype, tokens=DEFAULT_CONTEXT)
    until, free = time.monotonic() + limits.current().memory_wait_s, place.memory_free_bytes
    while not fit.fits(needed, free):
        if time.monotonic() >= until:
            weights, cache, room = (n / 2**30 for n in (needed.weights, needed.cache, free))
            raise LabError(
                f"The model {spec.alias!r} does not fit: its weights take {weights:.1f} GiB in {place.dtype} "
                f"and the cache of one row {cache:.1f}, and {fit.HEADROOM:.0%} of {room:.1f} GiB free on "
                f"{place.device} may be used: choose a half dtype or a smaller model, or wait with "
                "--wait-for-memory."
            )
        time.sleep(MEMORY_LOOK_S)
        free = devices.free_memory(place.device)


def _check_vocabulary(spec: ModelSpec, net: Any, tokenizer: Any) -> None:
    rows = net.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise LabError(
            f"The tokenizer of {spec.alias} knows token {largest} and the model has only {rows} embeddings: "
            "the two do not belong together; save the model and its own tokenizer in one folder."
        )


def _forward_once(net: Any, device: str) -> None:
    """Run one token through: memory-mapped weights are read from disk only now."""
    import torch

    token = torch.zeros((1, 1), dtype=torch.long, device=device)
    with torch.inference_mode():
        net(input_ids=token, attention_mask=torch.ones_like(token))
    devices.synchronize(device)


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and advice from transformers while loading; what matters is checked by hand."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def quiet_torchao() -> None:
    """No advice from torchao, which transformers imports wherever it is installed, used or not."""
    import torch  # noqa: F401  # sets levels of its own

    for name in ("torchao", "torch.utils._pytree"):
        logging.getLogger(name).setLevel(logging.ERROR)


@contextmanager
def _one_sentence(what: str) -> Iterator[None]:
    """Whatever a broken or foreign model folder makes the libraries raise, as one sentence."""
    try:
        yield
    except LabError:
        raise
    except Exception as error:
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
        raise LabError(f"The {what} cannot be loaded ({type(error).__name__}: {reason}).") from error
