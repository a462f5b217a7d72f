"""Make data/schemas/result.schema.json: what result.json holds, as a JSON Schema, from the record itself.

From the repository: python tools/make_schema.py
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import TypeAdapter

from nbhelpers.records import Result

FILE = Path(__file__).resolve().parents[1] / "data" / "schemas" / "result.schema.json"


def schema() -> str:
    """The file's text."""
    found = {"$schema": "https://json-schema.org/draft/2020-12/schema"} | TypeAdapter(Result).json_schema()
    return json.dumps(found, indent=2) + "\n"


if __name__ == "__main__":
    FILE.write_text(schema(), encoding="utf-8")
