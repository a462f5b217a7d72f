"""Prompts in, one ``Sample`` per prompt and repeat out, written down as they end and never made twice."""

from __future__ import annotations
