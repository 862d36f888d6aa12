"""Cells of the frontier: how hard questions are, and what the base makes of them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from experiments.small_stages import chains, sft

OPERATIONS = (2, 4)  # of a chain
ROW, MAX_NEW_TOKENS = 192, 88
KIND = "experiments.kinds:form_and_errors"
KIND_OF_PUZZLE = "experiments.kinds:kind_of_puzzle"
PUZZLE = {"numbers": 3, "max_number": 12, "max_target": 50, "signs": "+-*"}


class Cell(NamedTuple):
    """A difficulty, and a base that does or does not take careful steps.

    Attributes:
      chains: d, how many run side by side: the digits of an answer.
      share: c, the share of careful steps among the explanations that the base learns its
        habit from. Without them it skips steps, or restates what it guesses.
    """

    chains: int
    share: float

    @property
    def name(self) -> str:
        """Such as "d3c20", with the share in ten-thousandths."""
        return f"d{self.chains}c{round(10_000 * self.share)}"

    @property
    def label(self) -> str:
        """In tables."""
        return f"{self.digits}, c = {self.share:g}"

    @property
    def digits(self) -> str:
        """Such as "3 digits"."""
        return f"{self.chains} digit{'s' * (self.chains > 1)}"

    def data(self, split: str, size: int, stream: int, **more: Any) -> dict:
        """Questions of this difficulty, in sign notation."""
        return chains(
            split, size, stream, chains=self.chains, operations=OPERATIONS, **more
        )

    def of_task(
        self, task: str, split: str, size: int, stream: int, **more: Any
    ) -> dict:
        """Questions of "puzzles" or of a notation; with `kinds`, explanations of them."""
        if task == "puzzles":
            made = "traces" if "kinds" in more else "problems"
            more.pop("known_answer", None)
            where = {"task": f"experiments.countdown:{made}", "split": split}
            return where | {"size": size, "stream": stream} | PUZZLE | more
        return self.data(split, size, stream, notation=task, **more)

    @property
    def kinds(self) -> dict[str, float]:
        """Kind of explanation -> its share in the base's habit."""
        shares = {
            "careful": self.share,
            "skipping": 0.52 * (1 - self.share),
            "restating": 0.48 * (1 - self.share),
        }
        return {kind: share for kind, share in shares.items() if share}


def habit(cell: Cell, base: str) -> dict:
    """Gives a shipped base the habits of a cell in all tasks, told the solution or not."""
    sources = {}
    for task, size, share in (
        ("signs", 8000, 0.6),
        ("letters", 2000, 0.2),
        ("puzzles", 2000, 0.2),
    ):
        for told in (False, True):
            data = cell.of_task(
                task,
                "train",
                size // 2 if told else size,
                stream=11 + told,
                kinds=cell.kinds,
                known_answer=told,
                hinted=told,
            )
            part = share * (0.35 if told else 0.65)
            sources[f"{task}{'_told' * told}"] = data | {"share": part}
    return sft(base, "student", {"task": "mix", "sources": sources}, 600, 24, 2e-3)


def worked(cell: Cell, careful: float) -> dict:
    """Worked explanations of true solutions, with that share of careful ones."""
    rest = (1 - careful) / 0.8
    kinds = {
        "careful": careful,
        "skipping": 0.4 * rest,
        "restating": 0.37 * rest,
        "wrong": 0.03 * rest,
    }
    return cell.data("train", 4000, 1, kinds=kinds, known_answer=True)


def with_lengths(stages: Mapping[str, dict]) -> dict[str, dict]:
    """The stages with rows and completions long enough for three chains."""
    for stage in stages.values():
        for name, values in (
            ("rows", {"row_length": ROW}),
            ("sft", {"row_length": ROW}),
            ("sampling", {"max_new_tokens": MAX_NEW_TOKENS}),
        ):
            if name in stage:
                stage[name].update(values)
    return dict(stages)
