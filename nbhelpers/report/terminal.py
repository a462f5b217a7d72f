"""What a run says on the terminal at its end."""

from __future__ import annotations

import math
from pathlib import Path

from nbhelpers import store
from nbhelpers.comparison import compare
from nbhelpers.comparison.compare import ComparisonReport
from nbhelpers.errors import some
from nbhelpers.records import RunInfo
from nbhelpers.scoring.texts import printable
from nbhelpers.tracking import result as tracking


def outcome(run_dir: Path, info: RunInfo) -> str:
    """The comparison with its verdicts, what failed, and where the report is. LabError for broken files."""
    path, lines = run_dir / "comparison.json", list[str]()
    if path.exists():
        found = store.read_json(path, ComparisonReport)
        items = found.pairs[0].items if found.pairs else "prompts"
        lines.append(f"{found.primary} over {some(len(found.prompts), items)}")
        lines.append(f"{'model':24} quality  95% interval  tokens/s  finished  timing")
        by_model = {result.model: result for result in compare.read_results(run_dir)[0]}
        for model, e in found.ranking.items():
            r, interval = by_model[model], e.reason if e.low is None else f"[{e.low:.2f}, {e.high:.2f}]"
            speed, done = r.metrics.get("latency/tokens_per_s/mean", math.nan), f"{r.finished}/{r.attempted}"
            lines.append(f"{model:24} {e.mean:7.2f}  {interval:>12}  {speed:8,.0f}  {done:>8}  {r.noise}")
        lines.append(f"verdicts {found.basis}:")
        lines += [f"  {compare.verdict_sentence(pair)}" for pair in found.verdicts]
        lines += ["", found.pick_reason, found.size_hypothesis]
        lines += [f"not compared: {model}: {reason}" for model, reason in found.excluded.items()]
        lines += found.notes
    failed = [status for status in info.notebooks if status.status == "failed"]
    lines += [f"failed: {s.model or 'comparison'}, {s.notebook}: {s.error}" for s in failed]
    kinds = tracking.count_failures(run_dir, info)
    lines += [f"failures: {count} {kind}" for kind, count in kinds.items()]
    lines += ["", f"report  {run_dir / 'index.html'}", f"runs    {run_dir.parent / 'index.html'}"]
    return printable("\n".join(lines))
