"""Explanations are classified by their steps."""

import numpy as np
import pytest

from experiments.kinds import kind_of
from rlt_jax.data.tasks import arithmetic
from rlt_jax.data.tasks.arithmetic import Chain

CHAIN = Chain(4, (("+", 3), ("*", 7), ("-", 2), ("+", 9), ("*", 3), ("-", 8)))


def test_generated_explanations_have_their_kind() -> None:
    rng = np.random.default_rng(0)
    for n in range(200):
        chain, kind = arithmetic.sample_chain(rng), arithmetic.KINDS[n % 4]
        text, _ = arithmetic.explain(chain, kind, rng, known_answer=bool(n % 3))
        assert kind_of(chain.question(), text) == kind
        assert kind_of(chain.question("letters"), text) == kind


@pytest.mark.parametrize(
    ("explanation", "kind"),
    [
        ("4+3=7 7*7=9", "other"),
        ("4+3=7 7-2=5", "wrong"),  # a step was left out
        ("4+3=7 8*7=6", "wrong"),  # does not go on from 7
        ("4+3=8", "wrong"),
        ("5+3=8", "wrong"),
        ("4+3=7 7*7=4 4-2=2 2+9=1 1*3=4 4-8=0", "wrong"),  # * taken for +
        ("", "restating"),
        ("I know: it is 0", "restating"),
    ],
)
def test_kinds_by_hand(explanation: str, kind: str) -> None:
    assert kind_of(CHAIN.question(), explanation) == kind
