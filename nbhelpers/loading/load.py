"""Fetch, load and unload models: time and memory of it, and what exactly was loaded."""

import ctypes
import functools
import gc
import hashlib
import time
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nbhelpers import registry, store
from nbhelpers.devices import fit, machine
from nbhelpers.loading import checkpoint, hub, tokenization, weights
from nbhelpers.records import SCHEMA_VERSION, Engine, Failure, Lenient, ModelRun, ModelSpec

SHAPE_TOKENIZER = "lab-gpt2"  # any text becomes ids below 4,096, which every registered architecture has


@dataclass(frozen=True)
class LoadingReport(Lenient):
    """loading.json: what was loaded, and what that took. Of a server's model most is not known: None."""

    model: str
    slug: str
    revision: str
    source: str
    family: str
    parameters: int | None = None
    context: int | None = None
    vocabulary: int | None = None
    device: str = "server"  # another machine's or process's
    dtype: str = "unknown"
    fetch_s: float | None = None
    load_s: float | None = None
    parameter_bytes: int | None = None  # sum of numel x itemsize, tied weights once
    rss_before_bytes: int | None = None
    rss_after_load_bytes: int | None = None
    rss_after_forward_bytes: int | None = None
    device_peak_bytes: int | None = None
    quality_applies: bool = True  # False for random weights (shape:...)
    prompt_format: Literal["plain", "chat"] = "plain"
    base: str | None = None  # of a LoRA adapter: the model that it was merged into
    notes: tuple[str, ...] = ()  # what was set aside of the folder's files; what a server does not take
    # Added by the step that generates (generate.report_of).
    engine: Engine | None = None
    generation_config: str = ""  # the maker's generation settings, and whether they are used; "": none
    ids_digests: dict[str, str] | None = None  # prompt id -> digest of its token ids; None: an older file
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


def fetch(spec: ModelSpec) -> Path:
    """The folder of a model's files, downloaded if need be, checked for safety.

    Embedded files are compared with their recorded sha256. A shape: model has the folder of its tokenizer.
    Raises LabError.
    """
    if spec.kind == "hub":
        return hub.download(spec)
    if spec.kind == "server":
        raise checkpoint.refusal(spec.alias, "is behind a server, its weights are not here: name its folder.")
    spec = registry.resolve(SHAPE_TOKENIZER) if spec.kind == "shape" else spec
    folder = registry.folder_of(spec) or Path()
    for name, digest in spec.sha256.items():
        if not (folder / name).is_file() or file_digest(folder / name) != digest:
            why = f"lacks {name} as it was recorded (sha256)"
            raise checkpoint.refusal(spec.alias, f"{why}: restore it with git, or run tools/models/build.py.")
    checkpoint.check_folder(folder, spec.alias)
    return folder


def file_digest(path: Path) -> str:
    """sha256 of a file, computed once per process for each (path, size, time of change)."""
    status = path.stat()
    return _sha256(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=256)
def _sha256(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def revision_of(spec: ModelSpec, folder: Path | None = None) -> str:
    """What exactly a model is: the Hub commit, or 12 hex digits over all files that decide its text."""
    if spec.kind == "hub" and len(spec.revision or "") == 40:  # a commit
        return str(spec.revision)
    folder = folder or fetch(spec)
    if spec.kind == "hub":
        return folder.name  # the Hub's cache names snapshots by commit
    if spec.kind == "shape":
        return weights.random_revision(spec)
    small = (folder / name for name in (*checkpoint.SMALL_FILES, "adapter_config.json"))
    files = [*filter(Path.is_file, small), *checkpoint.weight_files(folder, spec.alias)]
    lines = [f"{path.name} {file_digest(path)}" for path in files]
    if base := checkpoint.adapter_base(folder, spec.alias):
        lines.append(revision_of(base))
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()[:12]


def load(model: str | ModelSpec, device: str = "auto", dtype: str = "auto") -> Loaded:
    """Fetch and load a causal language model and its tokenizer, and measure the time and memory of it.

    The weights come from safetensors only and no code of the model's repository runs. Raises LabError for a
    model that does not fit, cannot be read, is no causal language model, or contradicts itself.
    """
    spec = model if isinstance(model, ModelSpec) else registry.resolve(str(model))
    with checkpoint.library_errors("library transformers"):  # importing is not timed
        from transformers import GenerationMixin, PreTrainedModel  # noqa: F401

    target = machine.detect(device, dtype)
    random, notes = spec.kind == "shape", list[str]()
    started = time.perf_counter()
    folder = fetch(spec)
    base = checkpoint.adapter_base(folder, spec.alias)
    base_folder = fetch(base) if base else folder
    fetch_s = time.perf_counter() - started
    spec = spec if random else checkpoint.describe(spec, folder, base_folder)
    release(target.device)
    _check_room(spec, target)
    machine.reset_peak(target.device)
    rss_before = machine.resident_memory()
    started = time.perf_counter()
    with checkpoint.library_errors(f"tokenizer of the model {spec.alias!r}"):
        has_vocabulary = any((folder / name).is_file() for name in checkpoint.VOCABULARIES)
        tokenizer = tokenization.load_tokenizer(folder if has_vocabulary else base_folder)
    with checkpoint.library_errors(f"model {spec.alias!r}"):
        if random:
            net = weights.random_model(spec, target.device, target.dtype)
        else:
            net, notes = weights.saved_model(base_folder, spec.alias, target.dtype)
            net = (weights.merge(net, folder, spec.alias) if base else net).eval().to(target.device)
        machine.synchronize(target.device)
        load_s = time.perf_counter() - started
        rss_after_load = machine.resident_memory()
        vocabulary = _match_tokenizer(net, tokenizer, spec.alias)
        weights.try_out(net, spec.alias, target.dtype)
        machine.synchronize(target.device)
    report = LoadingReport(
        model=spec.alias,
        revision=revision_of(spec, folder),
        source=spec.alias if spec.kind == "local" else spec.source,  # no path of this machine
        parameters=sum(parameter.numel() for parameter in net.parameters()),
        context=spec.context or checkpoint.DEFAULT_CONTEXT,
        vocabulary=vocabulary,
        device=target.device,
        dtype=target.dtype,
        fetch_s=fetch_s,
        load_s=load_s,
        parameter_bytes=sum(parameter.nbytes for parameter in net.parameters()),
        rss_before_bytes=rss_before,
        rss_after_load_bytes=rss_after_load,
        rss_after_forward_bytes=machine.resident_memory(),
        device_peak_bytes=None if target.device == "cpu" else machine.peak_memory(target.device),
        quality_applies=not random,
        notes=tuple(notes),
        **{name: getattr(spec, name) for name in ("slug", "family", "prompt_format", "base")},
    )
    for note in notes:
        print(f"note: {spec.alias}: {note}")
    return Loaded(spec, net, tokenizer, None if random else folder, report.revision, report, target.device)


def _check_room(spec: ModelSpec, target: machine.DeviceReport) -> None:
    """Refuse a model whose weights and cache of one row do not fit. Raises LabError."""
    need = fit.generation_need(spec, target.dtype, tokens=checkpoint.DEFAULT_CONTEXT)
    if not fit.fits(need, target.memory_free_bytes):
        sizes = need.weights, need.cache, target.memory_free_bytes
        taken, cache, free = (f"{size / 2**30:.1f} GiB" for size in sizes)
        why = f"does not fit: its weights take {taken} in {target.dtype}, the cache of one row {cache}, and "
        why += f"{free} are free on {target.device}: choose a half dtype or a smaller model."
        raise checkpoint.refusal(spec.alias, why, Failure.OUT_OF_MEMORY)


def _match_tokenizer(net: Any, tokenizer: Any, name: str) -> int:
    """Give both one pad token; returns how many tokens the model has embeddings of. Raises LabError."""
    vocabulary: int = net.get_input_embeddings().weight.shape[0]
    tokens = tokenizer.get_vocab().items() - tokenizer.get_added_vocab().items()  # few use added ones
    if (largest := max(number for _, number in tokens)) >= vocabulary:
        why = f"has a tokenizer that knows token {largest} and only {vocabulary} embeddings"
        raise checkpoint.refusal(name, f"{why}: save it and its own tokenizer in one folder.")
    if tokenizer.pad_token_id >= vocabulary:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(0)
    net.generation_config.pad_token_id = tokenizer.pad_token_id
    return vocabulary


def unload(loaded: Loaded) -> None:
    """Give the memory of the parameters back, whatever other names the model has (a notebook's history)."""
    loaded.model.to("meta")
    release(loaded.device)


def release(device: str) -> None:
    """Hand unused memory back to the system: garbage, the device's cache, pages the C library keeps."""
    gc.collect()
    machine.empty_cache(device)
    with suppress(OSError, AttributeError):  # another C library than glibc, which keeps freed pages
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def read_report(run: ModelRun) -> LoadingReport:
    return store.read_json(run.folder / "loading.json", LoadingReport)
