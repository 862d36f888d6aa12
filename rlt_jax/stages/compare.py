"""Stage `compare`: routes over seeds, and which published claims they show.

Writes `comparison.json`, `comparison.md` and the page `comparison/index.html` into the
workdir.
"""

from pathlib import Path
from typing import Any

import ml_collections

from rlt_jax.report.comparison_config import CompareConfig
from rlt_jax.report.comparison_pages import write_comparison
from rlt_jax.settings import build
from rlt_jax.training import hosts

SECTIONS = CompareConfig


def run(config: ml_collections.ConfigDict, workdir: Path, seed: int) -> dict[str, Any]:
    """Compares stages that lie beside it; the runs' seeds are in the config.

    Returns:
      Number of routes, and how many claims have each verdict.
    """
    c = build(CompareConfig, config, "compare")
    return hosts.from_first(lambda: write_comparison(workdir.parent, c))
