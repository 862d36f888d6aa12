"""What a study compares: routes to a model, claims about them, and other measures.

In the name of a folder `{seed}` stands for the seed of a run.
"""

from collections.abc import Sequence
from typing import NamedTuple

from rlt_jax.errors import UserError


class Route(NamedTuple):
    """One way to train a model.

    Attributes:
      name: its name in claims and in comparison.json.
      label: its name in tables and pictures.
      section: the heading that it is shown under.
      evaluation: folder of the `evaluate` stage of the model.
      stages: folders of all stages whose cost counts; a stage that several routes share
        counts in each of them.
      traces: folder of a `score` stage over the traces that the model learned from.
    """

    name: str
    label: str
    section: str
    evaluation: str
    stages: Sequence[str] = ()
    traces: str = ""


class Claim(NamedTuple):
    """A published result: one route is better than another.

    Attributes:
      better: name of the route that is claimed to be better.
      worse: name of the other route.
      published: the published result in one sentence.
      section: the heading that it is shown under.
      margin: how far the accuracies have to differ, as a fraction.
    """

    better: str
    worse: str
    published: str
    section: str
    margin: float = 0.0


class Measure(NamedTuple):
    """A number in the summary that a stage writes into done.json.

    Attributes:
      label: its name in tables.
      section: the heading that it is shown under.
      folder: folder of the stage.
      key: path of the number in the summary, such as "kinds.wrong".
      default: the number where only the last part of the key is missing, because a
        summary counts only what occurs; None makes that an error.
    """

    label: str
    section: str
    folder: str
    key: str
    default: float | None = None


class Study(NamedTuple):
    """Everything that a comparison shows.

    Attributes:
      routes: in the order of the tables.
      claims: in the order of the tables.
      measures: in the order of the tables.
      ranked: names of three or more routes with `traces`, whose ranks by reward are
        correlated with accuracy; () for no correlation.
      ranked_without: those of them that a second correlation leaves out.
      ranked_published: the published result in one sentence.
    """

    routes: Sequence[Route]
    claims: Sequence[Claim] = ()
    measures: Sequence[Measure] = ()
    ranked: Sequence[str] = ()
    ranked_without: Sequence[str] = ()
    ranked_published: str = ""


def seed_list(text: str) -> list[int]:
    """The seeds in a text such as "0,1,2".

    Raises:
      UserError: there is something else, or a seed twice.
    """
    seeds = [int(part) for part in text.split(",") if part.isdecimal()]
    if len({*seeds}) != len(text.split(",")):
        raise UserError(f"seeds are different numbers such as 0,1,2, not {text!r}.")
    return seeds
