"""Stage `report`: pictures, a page and `summary.json` from what the stages left."""

from pathlib import Path
from typing import Any

import ml_collections

from rlt_jax.report.pages import ReportConfig, write_report
from rlt_jax.settings import build
from rlt_jax.training import hosts

SECTIONS = ReportConfig


def run(config: ml_collections.ConfigDict, workdir: Path, seed: int) -> dict[str, Any]:
    """Writes the report next to the stages that it reads; returns its summary."""
    c = build(ReportConfig, config, "report")
    return hosts.from_first(lambda: write_report(workdir.parent, c, seed=seed))
