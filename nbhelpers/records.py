"""The nouns of the laboratory: frozen, JSON-safe dataclasses that every other module speaks.

Units are in the names: ``_s`` seconds, ``_bytes`` bytes, ``_j`` joules, ``_usd`` US dollars.
``None`` means "not measured" or "does not apply"; it never means zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ClassVar, Literal

from nbhelpers.errors import Failure, LabError

SCHEMA_VERSION = 1
CONTENT_TYPES = ("short_post", "linkedin_post", "technical_article", "business_note")
DEVICES = ("cuda", "mps", "xpu", "cpu")  # in order of preference
DTYPES = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes of one number
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
_TYPES: dict[str, Any] = {"int": (Integral, int), "float": (Real, float), "str": (str | Path, str)}
FinishReason = Literal["eos", "stop", "length", "time", "error"]  # stop: one of the task's stop strings
Engine = Literal["loop", "generate", "server"]  # generation.decode; transformers where that fails; HTTP
Verdict = Literal["better", "worse", "tied", "cannot tell"]


class Record:
    """Base of what is written to files: read back strictly, without unknown fields or NaN (``store``)."""

    __pydantic_config__: ClassVar = {"strict": True, "extra": "forbid", "allow_inf_nan": False}


class Lenient(Record):  # older files hold fields that are gone: they are passed over
    __pydantic_config__ = Record.__pydantic_config__ | {"extra": "ignore"}


@dataclass(frozen=True)
class ModelSpec(Record):
    """Where a model comes from, and what is known about it before it is loaded."""

    alias: str
    source: str  # Hub repository "org/name", a local folder, "shape:<alias>", or "<server's address>#<model>"
    kind: Literal["embedded", "hub", "local", "shape", "server"]
    family: str = "unknown"
    parameters: int | None = None  # count, tied weights once
    context: int | None = None  # tokens
    prompt_format: Literal["plain", "chat"] = "plain"
    licence: str = "unknown"
    gated: bool = False
    revision: str | None = None  # pinned Hub commit
    sha256: dict[str, str] = field(default_factory=dict)  # file name -> digest, embedded models
    layers: int | None = None
    kv_heads: int | None = None
    head_dim: int | None = None
    base: str | None = None  # of a LoRA adapter: the model that it changes

    @property
    def slug(self) -> str:
        """The alias as one safe folder name; of a long one mostly the end, where aliases differ."""
        name = "".join(c if c.isalnum() or c in "-_." else "--" for c in self.alias).strip(".")
        return (name if len(name) <= 80 else name[:30] + name[-50:]) or "model"


@dataclass(frozen=True)
class Prompt(Record):
    id: str
    text: str
    content_type: str = ""  # one of CONTENT_TYPES for the posts; another task needs none
    target: tuple[str, ...] = ()  # right answers
    choices: tuple[str, ...] = ()
    cluster: str = ""  # what items share that are one piece of evidence, as a passage
    tags: tuple[str, ...] = ()  # slices of the report
    before: tuple[tuple[str, str], ...] = ()  # (role, text) of the turns before it: system prompt, examples


def setting(default: Any, text: str, option: str = "", least: float | None = None) -> Any:
    """A field that the command line sets: its help, the option's name if it is another, its least value."""
    return field(default=default, metadata={"help": text, "option": option, "least": least})


def _check(record: Any) -> None:
    """Raise LabError for a value of another type or too small; numpy's numbers become Python's."""
    for option in (option for option in fields(record) if option.metadata or option.type == "str"):
        value, name = getattr(record, option.name), option.metadata.get("option") or option.name
        type_name, *optional = str(option.type).split(" | ")
        accepted, convert = _TYPES.get(type_name, (bool, bool))
        if optional and value is None:
            continue
        if not isinstance(value, accepted) or isinstance(value, bool) != (type_name == "bool"):
            raise LabError(f"{name} is {value!r}: it must be of the type {type_name}.")
        object.__setattr__(record, option.name, convert(value))  # 0 is 0.0: rows are found by its text
        if (least := option.metadata.get("least")) is not None and not least <= value < float("inf"):
            raise LabError(f"{name} is {value}: it must be at least {least}.")


@dataclass(frozen=True)
class Settings(Record):
    """All that decides what a run computes: the command line's options, the notebooks' ``parameters``."""

    model: str = "lab-llama"
    run_dir: str = ""  # "" is outputs/standalone
    task: str = setting("", "A task's TOML file, or a shipped task's name; default: posts.")
    prompts: str = setting("", "JSONL or CSV file of prompts; default: the task's.")
    limit: int | None = setting(None, "Only the first N prompts.", least=1)
    repeats: int = setting(4, "Generations per prompt.", least=1)
    max_new_tokens: int = setting(256, "Longest answer, in tokens.", least=1)
    temperature: float = setting(0.8, "0 always takes the likeliest token.", least=0)
    top_k: int = setting(0, "Draw from the k likeliest tokens; 0: from all.", least=0)
    top_p: float = setting(1.0, "Draw from the likeliest tokens that reach this probability; 1: from all.")
    seed: int = setting(0, "Seed of all sampling.")
    maker_settings: bool = setting(False, "Use what a model's generation_config.json asks for besides.")
    device: str = setting("auto", "auto, cpu, cuda, mps or xpu.")
    dtype: str = setting("auto", "auto, float32, float16 or bfloat16.")

    def __post_init__(self) -> None:
        _check(self)
        if not 0 < self.top_p <= 1:
            raise LabError(f"top_p is {self.top_p}: give more than 0 and at most 1 (off).")
        for name, choices in (("device", DEVICES), ("dtype", (*DTYPES, *SHORT_DTYPES))):
            if (value := getattr(self, name)) not in ("auto", *choices):
                raise LabError(f"{name} is {value!r}: choose one of auto, {', '.join(choices)}.")


@dataclass(frozen=True)
class FailOnError(Record):
    """How many failed samples of a model stop the run; both None: none do. (inspect_ai's fail_on_error)"""

    count: int | None = None
    share: float | None = None  # of the model's samples, between 0 and 1

    def reached(self, failed: int, attempted: int) -> bool:
        limit = self.count if self.share is None else self.share * attempted
        return limit is not None and 0 < failed >= limit


@dataclass(frozen=True)
class Limits(Lenient):
    """How long things may take and how much may fail: how far a run comes, never what a text says."""

    cell_s: float = setting(1800.0, "Seconds a notebook or its cell may take.", "timeout", least=1)
    generation_s: float = setting(300.0, "Seconds a generation may take.", "batch_timeout", least=0)
    fail_on_error: FailOnError = FailOnError()
    at_once: int = setting(4, "Requests to a server at a time.", least=1)

    def __post_init__(self) -> None:
        _check(self)


@dataclass(frozen=True)
class ModelRun:
    """One model's part of a run: what notebooks and steps work on."""

    settings: Settings
    spec: ModelSpec
    folder: Path  # <run>/<slug>, where its files are
    limits: Limits = Limits()


@dataclass(frozen=True)
class Sample(Record):
    """One generation: what was asked, what came back, and what it took."""

    key: str  # hash of everything that decides the text (store.row_key)
    model: str
    revision: str  # Hub commit, or a hash of the folder's weights and tokenizer
    prompt_id: str
    content_type: str
    repeat: int
    seed: int
    prompt: str
    text: str  # the answer, without its reasoning
    prompt_tokens: int
    new_tokens: int  # generated tokens without padding, those of the reasoning and the end token included
    bytes: int  # UTF-8 bytes of text
    finish_reason: FinishReason
    error: str | None
    batch_size: int  # most rows at a time
    latency_s: float | None = None  # from the start of this row's prefill to this row's last token
    ttft_s: float | None = None  # time to first token
    tpot_s: float | None = None  # (latency - ttft) / (new_tokens - 1); None below two tokens
    peak_memory_bytes: int | None = None
    energy_j: float | None = None  # measured, this row's share; None: no counter
    prompt_truncated: bool = False
    share_s: float | None = None  # this row's share of the machine's time: rows alive together pay equally
    engine: Engine = "loop"
    schema_version: int = SCHEMA_VERSION
    failure: Failure | None = None  # the kind of ``error``; left out of the file where there is none
    reasoning: str | None = None  # what the model wrote between its marks; left out where there is none
    ids_digest: str | None = None  # of the prompt's token ids, whole; None: not recorded
    estimated: bool | None = None  # True: a server did not tell the tokens; left out where they were counted
    logprobs: dict[str, tuple[float, ...]] | None = None  # of "choices" and "text", where a scorer wants them


@dataclass(frozen=True)
class Score(Record):
    """All scores of one sample; a failed one scores 0 on quality, never disappears."""

    key: str
    prompt_id: str
    repeat: int
    content_type: str
    failed: bool
    words: int
    values: dict[str, float]  # name -> score on its own scale
    schema_version: int = SCHEMA_VERSION
    reason: str | None = None  # why there are no values: a rubric that reads English does not apply
    target: tuple[str, ...] | None = None  # of an item that has a right answer
    tags: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Estimate(Record):
    """A mean with its uncertainty."""

    name: str
    n: int  # units of analysis (prompts, unless said otherwise)
    mean: float | None = None
    sd: float | None = None
    low: float | None = None
    high: float | None = None
    level: float = 0.95
    method: str = "t"
    reason: str | None = None  # why low and high are missing


@dataclass(frozen=True)
class Scale(Record):
    """What a score can be, and which difference of it is too small to matter."""

    low: float = 1.0
    high: float = 10.0
    margin: float = 0.5
    higher_is_better: bool = True
    unit: str = "points"  # of a difference: of a task's own score its name


LAB_SCALE = Scale()  # of the laboratory's own score


@dataclass(frozen=True)
class Result(Record):
    """result.json: one model's summary, the file other tools read."""

    model: str
    slug: str
    revision: str
    family: str
    parameters: int | None  # None: a server does not tell
    device: str  # "server": not this machine
    dtype: str
    attempted: int
    finished: int
    failed: int
    primary: str  # name of the score the verdicts rest on
    quality_applies: bool
    quality: dict[str, Estimate]
    metrics: dict[str, float]  # flat: "quality/...", "latency/...", "memory/...", "cost/..."
    per_prompt: dict[str, float]  # prompt id -> mean primary score
    settings: Settings
    noise: str = "not recorded"  # beside every timing: "quiet", or "noisy: " and why
    generation_config: str = ""  # what the maker's asks for, and whether it was used; "": nothing
    notes: tuple[str, ...] = ()  # of loading.json
    scale: Scale = LAB_SCALE  # of the primary score
    clusters: dict[str, str] = field(default_factory=dict)  # prompt id -> first one of its cluster
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class NotebookStatus(Record):
    notebook: str
    model: str  # "" for the comparison
    status: Literal["passed", "failed", "skipped"]
    seconds: float
    error: str | None = None
    failure: Failure | None = None  # the kind of ``error``


@dataclass(frozen=True)
class RunInfo(Record):
    """run.json: what was asked of a run and how it went."""

    run: str
    models: tuple[str, ...]
    settings: Settings
    started: str  # ISO 8601, UTC
    seconds: float | None
    versions: dict[str, str]
    machine: str
    git_commit: str | None
    notebooks: tuple[NotebookStatus, ...] = ()
    jobs: int | None = None  # models at a time
    threads: str | None = None  # of each one's numerical libraries (OMP_NUM_THREADS)
    kernels: str | None = None  # "forked", or "plain: " and why
    specs: tuple[ModelSpec, ...] = ()  # what each name of ``models`` meant, in the same order
    limits: Limits = Limits()  # of the latest start or resume
    prompts: dict[str, str] = field(default_factory=dict)  # id -> digest of all that is asked
    task: str = ""  # digest of the task's file
    nodes: dict[str, str] = field(default_factory=dict)  # of a cluster: model -> where it ran and was timed
    looks: tuple[int, ...] = ()  # --until-decided: after so many prompts the models are compared
    schema_version: int = SCHEMA_VERSION
