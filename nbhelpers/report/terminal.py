"""What a run says on the terminal at its end."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nbhelpers import store
from nbhelpers.comparison import compare
from nbhelpers.errors import some
from nbhelpers.records import RunInfo
from nbhelpers.scoring.texts import printable
from nbhelpers.tracking import result as tracking


def outcome(run_dir: Path, info: RunInfo) -> str:
    """The comparison with its verdicts, what failed, and where the report is. LabError for broken files."""
    from jinja2 import Environment, FileSystemLoader

    path = run_dir / "comparison.json"
    values = {
        "run_dir": run_dir,
        "info": info,
        "results": {r.model: r for r in compare.read_results(run_dir)[0]},
    }
    values["found"] = store.read_json(path, compare.ComparisonReport) if path.exists() else None
    values["kinds"] = tracking.count_failures(info, tracking.read_all_rows(run_dir)[0].values())
    files = FileSystemLoader(Path(__file__).parent / "templates")
    words = Environment(loader=files, trim_blocks=True, lstrip_blocks=True)
    words.filters |= {"some": some, "verdict_sentence": compare.verdict_sentence}
    return printable(words.get_template("outcome.txt").render(values))
