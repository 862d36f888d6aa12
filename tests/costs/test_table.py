"""Plans as text."""

from typing import Any

from rlt_jax.costs.table import WIDTH, render


def program(name: str, **changes: Any) -> dict[str, Any]:
    return {
        "name": name,
        "fits": True,
        "bytes": {
            "arguments": 1_234_000_000,
            "temporaries": 5_000_000_000,
            "outputs": 16,
            "resident": 2_500_000_000,
            "total": 8_734_000_000,
            "limit": 16_911_433_728,
            "headroom": 0.4835,
        },
        "collectives": {"all-gather": {"count": 112, "bytes": 3.2e9}},
        "model_flops": 1.234e13,
        "executed_flops": 2.468e13,
        "roofline": {
            "compute_seconds": 0.05,
            "memory_seconds": 0.0625,
            "interconnect_seconds": 2,
            "network_seconds": 0,
        },
        "runs_per_step": 8,
    } | changes


RECIPE = {
    "name": "rlt_7b",
    "hours": 31.25,
    "chip_hours": 2000.0,
    "efficiency": 0.4,
    "stages": {"rl": {"steps": 125, "step_seconds": 90.0}},
    "advice": ["Split the batch. " * 10, "Or take v5e:8x16."],
}


def test_numbers_stand_under_their_names() -> None:
    plan = {"fits": True, "topology": "v5e:8x8", "programs": [program("update")]}
    lines = render(plan | {"recipe": RECIPE}).splitlines()
    assert lines[0] == "v5e:8x8: fits"
    names, row = lines[3:5]
    assert names.split() == [
        *("program", "fits", "arguments", "temporaries", "outputs", "resident"),
        *("total", "limit", "free"),
    ]
    assert row.split() == [
        *("update", "yes", "1.23", "5.00", "0.00", "2.50", "8.73", "16.91", "48%"),
    ]
    assert len(names) == len(row)
    text = "\n".join(lines)
    (costs,) = (line for line in lines if "24.7" in line)
    assert costs.split() == [
        *("update", "8", "12.3", "TFLOP", "24.7", "TFLOP", "50%"),
        *("50", "ms", "62.5", "ms", "2", "s", "0", "ms"),
    ]
    assert "3.2 GB" in text
    assert "rlt_7b: 31.2 h, 2,000 chip-hours at 40% of the speed above" in lines
    assert "  rl: 125 steps of 90 s" in lines
    assert "- Or take v5e:8x16." in lines


def test_all_fits_in_a_terminal() -> None:
    wide = dict.fromkeys(program("x")["bytes"], 9.9e12) | {"headroom": -1.5}
    programs = [program(f"update of a long name {i}" * 5, bytes=wide) for i in range(3)]
    plan = {"fits": False, "topology": "v5e:16x16", "programs": programs}
    text = render(plan | {"recipe": RECIPE | {"name": "long" * 40}})
    assert text.startswith("v5e:16x16: does not fit")
    assert max(map(len, text.splitlines())) <= WIDTH


def test_a_program_that_was_not_compiled_has_dashes() -> None:
    room = {"resident": 1e9, "total": 9e9, "limit": 8e9, "headroom": -0.125}
    refused = program("rollout", fits=False, bytes=room)
    del refused["roofline"], refused["collectives"]
    plan = {"fits": False, "topology": "v5e:2x2", "programs": [refused]}
    plan["recipe"] = RECIPE
    rows = [line for line in render(plan).splitlines() if line.startswith("rollout")]
    assert [row.split() for row in rows] == [
        ["rollout", "NO", *"---", "1.00", "9.00", "8.00", "-12%"],
        ["rollout", "8", "12.3", "TFLOP", *"------"],
    ]
