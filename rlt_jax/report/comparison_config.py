"""What a comparison compares: the config of the stage `compare`, checked."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from rlt_jax.errors import UserError
from rlt_jax.settings import build


@dataclasses.dataclass(frozen=True)
class RouteConfig:
    """One way to a model. Every folder is a stage's, in it `{seed}` stands for the seed.

    Seeds may share a stage of `stages`, so that alone need not have it.

    Attributes:
      name: what claims and the JSON call it.
      evaluation: folder of the `evaluate` stage of its model.
      label: what a reader sees; the name where empty.
      section: heading that it is shown under.
      stages: folders of all stages whose cost it bears; shared ones count in every route.
      traces: folder of a `score` stage over the traces that its model learned from.
      seeds: those that it was run with; all of the comparison where empty.
    """

    name: str
    evaluation: str
    label: str = ""
    section: str = ""
    stages: Sequence[str] = ()
    traces: str = ""
    seeds: Sequence[int] = ()


@dataclasses.dataclass(frozen=True)
class ClaimConfig:
    """A published finding: one route is better than another.

    Attributes:
      title: the heading of the claim.
      published: what was found, in one sentence.
      better: name of the route that was better.
      worse: name of the other.
      margin: the share of right answers that the difference has to exceed.
      section: heading that it is shown under.
    """

    title: str
    published: str
    better: str
    worse: str
    margin: float = 0.0
    section: str = ""


@dataclasses.dataclass(frozen=True)
class MeasureConfig:
    """A number that stages left in a JSON file.

    Attributes:
      label: what a reader sees.
      folder: of the stage, with `{seed}`.
      key: where it is in the file, such as "summary.held_out_reward_last".
      file: name of the file.
      section: heading of its table.
      seeds: those that have it; all of the comparison where empty.
      absent: the number where the file lacks the last part of the key beside others, as
        a summary counts only what there is; None refuses that.
    """

    label: str
    folder: str
    key: str
    file: str = "done.json"
    section: str = ""
    seeds: Sequence[int] = ()
    absent: float | None = None


@dataclasses.dataclass(frozen=True)
class CompareConfig:
    """Settings of the stage. Sequences, as a config would sort the keys of mappings.

    Attributes:
      seeds: names of the runs, which folders are formatted with.
      routes: the keys of `RouteConfig` for each route, in the order of the page.
      claims: the keys of `ClaimConfig` for each claim.
      measures: the keys of `MeasureConfig` for each other number to show.
      correlation: names of three or more routes with `traces`; the ranks of their
        traces' rewards are held against the accuracy of their models.
      correlation_without: those of them that a second count leaves out, to tell what
        the first owes to them; () for no second one.
      correlation_published: what was found of that, in one sentence.
    """

    seeds: Sequence[int]
    routes: Sequence[Mapping[str, Any]]
    claims: Sequence[Mapping[str, Any]] = ()
    measures: Sequence[Mapping[str, Any]] = ()
    correlation: Sequence[str] = ()
    correlation_without: Sequence[str] = ()
    correlation_published: str = ""

    def __post_init__(self) -> None:
        parts_of(self)


class Parts(NamedTuple):
    """The checked parts of a config, seeds and labels filled in."""

    routes: dict[str, RouteConfig]
    claims: list[ClaimConfig]
    measures: list[MeasureConfig]


def parts_of(config: CompareConfig) -> Parts:
    """The parts of a config.

    Raises:
      UserError: unknown or missing keys, unknown routes or seeds, two of one name, or
        several seeds in one folder.
    """
    if not config.seeds or len(set(config.seeds)) < len(config.seeds):
        raise UserError(f"compare.seeds={config.seeds}: one or more, each once.")
    routes: dict[str, RouteConfig] = {}
    for n, values in enumerate(config.routes):
        where = f"compare.routes[{n}]"
        route = _with_seeds(build(RouteConfig, values, where), config, where)
        if route.name in routes:
            raise UserError(f"{where}: the name {route.name!r} is taken.")
        _check_folders(route, ("evaluation", "traces"), where)
        routes[route.name] = dataclasses.replace(route, label=route.label or route.name)
    claims = []
    for n, values in enumerate(config.claims):
        where = f"compare.claims[{n}]"
        claim = build(ClaimConfig, values, where)
        better, worse = (_route(routes, x, where) for x in (claim.better, claim.worse))
        if not set(better.seeds) & set(worse.seeds):
            raise UserError(f"{where}: its two routes share no seed.")
        claims.append(claim)
    ranked = [_route(routes, x, "compare.correlation") for x in config.correlation]
    if without := [route.name for route in ranked if not route.traces]:
        raise UserError(f"compare.correlation: the route {without[0]!r} has no traces.")
    if ranked and len({route.name for route in ranked}) < 3:
        raise UserError("compare.correlation: needs three or more routes.")
    left_out = set(config.correlation_without)
    if unknown := left_out - set(config.correlation):
        raise UserError(
            f"compare.correlation_without: {min(unknown)!r} is not in "
            "compare.correlation."
        )
    if left_out and len(set(config.correlation) - left_out) < 3:
        raise UserError("compare.correlation_without: three or more have to be left.")
    measures = []
    for n, values in enumerate(config.measures):
        where = f"compare.measures[{n}]"
        measure = build(MeasureConfig, values, where)
        measures.append(_with_seeds(measure, config, where))
        _check_folders(measures[-1], ("folder",), where)
    return Parts(routes, claims, measures)


def _with_seeds(part: Any, config: CompareConfig, where: str) -> Any:
    if unknown := set(part.seeds) - set(config.seeds):
        raise UserError(f"{where}.seeds: {min(unknown)} is not in compare.seeds.")
    return dataclasses.replace(part, seeds=part.seeds or config.seeds)


def _check_folders(part: Any, keys: Sequence[str], where: str) -> None:
    for key in keys:
        folder = getattr(part, key)
        if folder and "{seed}" not in folder and len(part.seeds) > 1:
            raise UserError(
                f"{where}.{key}={folder!r}: seeds {', '.join(map(str, part.seeds))} "
                "would all be read from this folder; write {seed} where its name has "
                "the seed, or give `seeds` with the one that it is of."
            )


def _route(routes: Mapping[str, RouteConfig], name: str, where: str) -> RouteConfig:
    if name not in routes:
        raise UserError(f"{where}: no route {name!r}; there are {', '.join(routes)}.")
    return routes[name]
