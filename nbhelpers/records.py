"""The nouns of the laboratory: frozen, JSON-safe dataclasses that every other module speaks.

Units are in the names: ``_s`` seconds, ``_bytes`` bytes, ``_j`` joules, ``_usd`` US dollars.
``None`` means "not measured" or "does not apply"; it never means zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

SCHEMA_VERSION = 1

CONTENT_TYPES = ("short_post", "linkedin_post", "technical_article", "business_note")
FinishReason = Literal["eos", "length", "time", "error"]
Engine = Literal[
    "loop", "generate"
]  # nbhelpers.generation.decode, or transformers.generate where that cannot serve
Verdict = Literal["better", "worse", "tied", "cannot tell"]


class LabError(Exception):
    """A mistake or a condition the user can act on: one sentence with what, where and what to do."""


@dataclass(frozen=True)
class ModelSpec:
    """Where a model comes from and what is known about it before it is loaded."""

    alias: str
    source: str  # Hub repository "org/name", a local folder, or "shape:<alias>"
    kind: Literal["embedded", "hub", "local", "shape"]
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

    @property
    def slug(self) -> str:
        """The alias as one safe folder name."""
        name = "".join(c if c.isalnum() or c in "-_." else "--" for c in self.alias).strip(".")
        return name[:80] or "model"


@dataclass(frozen=True)
class Prompt:
    id: str
    text: str
    content_type: str  # one of CONTENT_TYPES


@dataclass(frozen=True)
class Settings:
    """Everything a run can be told. The notebooks' ``parameters`` cells hold the same names."""

    model: str = "lab-llama"
    run_dir: str = ""  # "" is outputs/standalone
    prompts: str = ""  # "" is the 15 benchmark prompts; otherwise a .jsonl file
    limit: int | None = None  # first N prompts
    repeats: int = 4
    max_new_tokens: int = 256
    temperature: float = 0.8
    top_k: int = 0  # 0 switches the filter off
    top_p: float = 1.0  # 1.0 switches the filter off
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"


@dataclass(frozen=True)
class Sample:
    """One generation: what was asked, what came back, and what it took."""

    key: str  # hash of everything that decides the text (store.row_key)
    model: str
    revision: str  # Hub commit, or a hash of the folder's weights and tokenizer
    prompt_id: str
    content_type: str
    repeat: int
    seed: int
    prompt: str
    text: str
    prompt_tokens: int
    new_tokens: int  # generated tokens without padding, the end token included
    bytes: int  # UTF-8 bytes of text
    finish_reason: FinishReason
    error: str | None
    batch_size: int  # most rows at a time
    latency_s: float | None  # from the start of this row's prefill to this row's last token
    ttft_s: float | None  # time to first token
    tpot_s: float | None  # (latency - ttft) / (new_tokens - 1); None below two tokens
    peak_memory_bytes: int | None
    energy_j: float | None  # measured, this row's share; None: no counter
    prompt_truncated: bool = False
    share_s: float | None = None  # this row's share of the machine's time: rows alive together pay equally
    engine: Engine = "loop"
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Score:
    """All scores of one sample. A failed sample scores 0 on quality, never disappears."""

    key: str
    prompt_id: str
    repeat: int
    content_type: str
    failed: bool
    words: int
    values: dict[str, float]  # dimension or rubric name -> 0..10
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Estimate:
    """A mean with its uncertainty. ``reason`` says why low/high are missing."""

    name: str
    n: int  # units of analysis (prompts, unless said otherwise)
    mean: float | None
    sd: float | None
    low: float | None
    high: float | None
    level: float = 0.95
    method: str = "t"
    reason: str | None = None


@dataclass(frozen=True)
class Comparison:
    """Two models on the same prompts; difference is mean(a) - mean(b)."""

    a: str
    b: str
    n: int
    difference: float | None
    low: float | None
    high: float | None
    p: float | None  # sign-flip permutation
    p_holm: float | None  # over all pairs of the run
    effect_size: float | None  # Hedges g of the paired differences
    verdict: Verdict
    margin: float  # equivalence margin, points
    prompts_needed: int | None  # to settle it, with 80% power at the observed difference
    reason: str | None = None


@dataclass(frozen=True)
class RankInterval:
    """A model's rank by mean score (1 is best) and the ranks that other prompts could have given it."""

    model: str
    n: int  # prompts
    rank: int | None
    low: int | None
    high: int | None
    level: float = 0.95
    reason: str | None = None


@dataclass(frozen=True)
class DtypeTrial:
    """What one dtype does to one model on this machine."""

    dtype: str
    tokens_per_s: float  # of a batch
    perplexity: float | None  # None: not finite, or slower than float32 and so not asked for
    speed_ratio: float  # to float32
    perplexity_ratio: float | None  # to float32
    revision: str  # of the model


@dataclass(frozen=True)
class DeviceReport:
    device: str  # "cuda", "mps", "xpu" or "cpu"
    name: str
    cores: int
    memory_total_bytes: int
    memory_free_bytes: int
    dtypes: tuple[str, ...]
    dtype: str
    dtype_reason: str
    versions: dict[str, str]
    platform: str
    dtype_trials: tuple[DtypeTrial, ...] = ()  # float32 first; empty: not measured
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class LoadingReport:
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
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class StatsReport:
    """stats.json of one model: estimates over prompts, one for each score."""

    model: str
    attempted: int
    finished: int
    failed: int
    quality: dict[str, Estimate]
    latency: dict[str, Estimate]
    percentiles: dict[str, Estimate] = field(default_factory=dict)  # "ttft_s/p50": seconds, in ``mean``
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Result:
    """result.json: one model's summary, the file other tools read."""

    model: str
    slug: str
    revision: str
    family: str
    parameters: int
    device: str
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
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class TrackingReport:
    tracking_uri: str
    experiment: str
    run_id: str
    metrics_logged: int
    artifacts: tuple[str, ...]
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class ComparisonReport:
    """comparison.json: all models of a run side by side."""

    primary: str
    prompts: tuple[str, ...]
    ranking: dict[str, Estimate]  # model -> primary score, best first
    pairs: tuple[Comparison, ...]
    pick: str | None
    pick_reason: str
    size_slope: Estimate | None  # points per doubling of parameters, over prompts
    size_hypothesis: str  # the sentence on "larger models write better content"
    excluded: dict[str, str]  # model -> why it takes no part
    ranks: tuple[RankInterval, ...] = ()  # best first
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class Route:
    """Which model should write one content type, and why."""

    content_type: str
    model: str | None  # None: too few prompts to choose by
    basis: Literal["better", "tied", "cannot tell", "only model", "no data"]
    prompts: int
    quality: dict[str, Estimate]  # model -> primary score on these prompts, best first
    candidates: tuple[str, ...]  # the leader and the models not shown to be worse
    prompts_needed: int | None  # to settle every open comparison with the leader
    reason: str


@dataclass(frozen=True)
class RoutingReport:
    """routing.json: a model for each content type of a run."""

    primary: str
    routes: tuple[Route, ...]
    default: str | None  # the pick over all prompts, for what has no route
    default_reason: str
    excluded: dict[str, str]  # model -> why it takes no part
    schema_version: int = SCHEMA_VERSION


@dataclass(frozen=True)
class NotebookStatus:
    notebook: str
    model: str  # "" for the comparison
    status: Literal["passed", "failed", "skipped"]
    seconds: float
    error: str | None = None


@dataclass(frozen=True)
class RunInfo:
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
    schema_version: int = SCHEMA_VERSION
