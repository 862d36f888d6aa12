"""Stage `report`: pictures, a page and `summary.json` from what the stages left."""

from pathlib import Path

import jinja2
from ml_collections import ConfigDict

from rlt_jax.errors import as_user_error
from rlt_jax.records import Record
from rlt_jax.report.pages import ReportConfig, write_report
from rlt_jax.settings import build
from rlt_jax.training import hosts

SECTIONS = ReportConfig


def run(config: ConfigDict, workdir: Path, seed: int) -> Record:
    """Writes the report next to the stages that it reads; returns its summary."""
    c = build(ReportConfig, config, "report")
    kinds = AttributeError, LookupError, TypeError, ValueError, jinja2.TemplateError
    what = f"cannot write the report of {workdir.parent}"
    write = as_user_error(what, *kinds, end="")(write_report)
    return hosts.from_first(lambda: write(workdir.parent, c, seed=seed))
