"""Plans for TPU slices, made by libtpu on a machine without one."""

import functools
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlt_jax.costs import compiled as costs
from rlt_jax.costs import hlo
from rlt_jax.errors import UserError
from rlt_jax.inference import head
from rlt_jax.stages.plan import (
    PlanConfig,
    compile_program,
    plan,
    read_lengths,
    read_recipe,
    slice_mesh,
    steps_of,
)
from rlt_jax.stages.plan_programs import PROGRAMS
from rlt_jax.stages.plan_shapes import Lengths, dispatches
from rlt_jax.training.sharding import device_bytes

ROOT = Path(__file__).parents[2]
if not importlib.util.find_spec("libtpu"):
    pytest.skip("libtpu is not installed", allow_module_level=True)

SIZES = {
    "vocab_size": 32768,
    "embed_dim": 2048,
    "num_layers": 8,
    "num_heads": 16,
    "num_kv_heads": 4,
    "head_dim": 128,
    "mlp_dim": 8192,
    "max_length": 4096,
}
ROWS = 1024
RECIPE = f"""
import ml_collections

SIZES = {SIZES}


def get_config(topology):
    model = {{"architecture": SIZES, "tokenizer": "unread", "dtype": "bfloat16"}}
    trained = model | {{"remat": "full"}}
    frozen = model | {{"param_dtype": "bfloat16"}}
    mesh = {{"data": 1, "fsdp": -1, "tensor": 2}}
    config = ml_collections.ConfigDict()
    config.seed = 0
    config.pipeline = ("warmup", "rl", "collect", "evaluate", "report")
    config.warmup = {{
        "stage": "sft",
        "model": trained,
        "sft": {{"role": "teacher", "steps": 3, "epochs": 0.0, "batch_size": 2, "row_length": {ROWS}}},
        "lora": {{}},
        "optimizer": {{"learning_rate": 1e-3}},
        "mesh": mesh,
    }}
    config.rl = {{
        "stage": "rl",
        "policy": trained | {{"architecture": None, "path": "{{workdir}}/warmup",
                              "tokenizer": ""}},
        "students": (frozen,),
        "ensemble": {{}},
        "rows": {{"micro_batch_size": 2, "row_length": {ROWS}}},
        "sampling": {{"max_new_tokens": 512}},
        "engine": {{"slots": 64, "steps": 4, "prefill_chunk": 128, "weights": "bfloat16"}},
        "rlt_reward": {{}},
        "objective": {{}},
        "loop": {{"steps": 2, "batch_size": 2, "group_size": 4}},
        "lora": {{}},
        "optimizer": {{"learning_rate": 1e-3}},
        "mesh": mesh,
    }}
    config.collect = {{
        **{{key: config.rl[key].to_dict() for key in (
            "ensemble", "rows", "sampling", "engine", "rlt_reward", "mesh")}},
        "students": (frozen,),
        "stage": "collect",
        "teacher": frozen | {{"architecture": None, "path": "{{workdir}}/rl",
                             "tokenizer": ""}},
        "collect": {{"batch_size": 16}},
    }}
    config.evaluate = {{
        **{{key: config.rl[key].to_dict() for key in ("sampling", "engine", "mesh")}},
        "stage": "evaluate",
        "model": frozen,
        "evaluate": {{"batch_size": 16}},
        "predictions": "",
    }}
    config.report = {{"stage": "report"}}
    return config
"""


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("recipe") / "tiny.py"
    file.write_text(RECIPE)
    return file


@pytest.fixture(scope="module")
def compiled(recipe: Path) -> Iterator[Callable[[str], Any]]:
    """Compiles a program of warm-up or RL, by name, for four chips."""
    yield from compiler(PlanConfig(str(recipe), "v5e:2x2", stages=("warmup", "rl")))


@pytest.fixture(scope="module")
def in_slices(recipe: Path) -> Iterator[Callable[[str], Any]]:
    """Compiles a program of RL, by name, for two slices of four chips."""
    changes = ("rl.mesh.data=2", "rl.rows.micro_batch_size=4")
    yield from compiler(PlanConfig(str(recipe), "2x v5e:2x2", ("rl",), changes))


def compiler(c: PlanConfig) -> Iterator[Callable[[str], Any]]:
    sections, programs = read_recipe(c, c.topology), {}
    # So few logits at a time that rows have several chunks.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(head, "LOGITS_PER_CHUNK", 2**21)
        for name in sections["pipeline"]:
            section = sections[name]
            mesh = slice_mesh(c.topology, section["mesh"])
            stage = PROGRAMS[section["stage"]]
            for program in stage(section, sections, mesh, Lengths(64, 64)):
                programs[f"{name}/{program.name}"] = program

        @functools.cache
        def compile_one(name: str) -> Any:
            return compile_program(programs[name])

        compile_one.programs = programs
        yield compile_one


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "rlt_jax.main", "--config=configs/plan.py", *arguments],
        cwd=ROOT,
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "programs"),
    [
        ("warmup", ["update"]),
        (
            "rl",
            [
                "mix",
                "update",
                "reward",
                "student_log_probs",
                "log_probs",
                "decode",
                "prefill",
                "weights",
            ],
        ),
    ],
)
def test_a_plan_that_fits(
    stage: str, programs: list[str], recipe: Path, tmp_path: Path
) -> None:
    done = run(
        f"--workdir={tmp_path}",
        f"--config.plan.recipe={recipe}",
        "--config.plan.topology=v5e:2x2",
        f"--config.plan.stages=('{stage}',)",
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] is True
    assert found["topology"] == "v5e:2x2"
    names = [program["name"] for program in found["programs"]]
    assert names == [f"{stage}/{name}" for name in programs]
    for program in found["programs"]:
        room = program["bytes"]
        assert room["total"] == room["peak"] + room["resident"]
        assert room["headroom"] == pytest.approx(1 - room["total"] / room["limit"])
        assert program["roofline"]["seconds"] > 0
    (update,) = (p for p in found["programs"] if p["name"].endswith("/update"))
    assert update["collectives"]["all-gather"]["bytes"] > 0
    whole = found["recipe"]
    assert whole["chip_hours"] == pytest.approx(4 * whole["hours"])
    assert whole["stages"][stage]["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    table = (tmp_path / "plan.txt").read_text()
    assert all(name in table for name in names)
    assert table in done.stdout


def test_a_plan_that_does_not_fit(recipe: Path, tmp_path: Path) -> None:
    """Twenty billion parameters with two moments on four chips of 16 GB."""
    large = recipe.read_text().replace("'num_layers': 8", "'num_layers': 40")
    large = large.replace("'embed_dim': 2048", "'embed_dim': 8192")
    large = large.replace("'mlp_dim': 8192", "'mlp_dim': 16384")
    file = tmp_path / "large.py"
    file.write_text(large)
    done = run(
        f"--workdir={tmp_path}",
        f"--config.plan.recipe={file}",
        "--config.plan.topology=v5e:2x2",
        '--config.plan.stages=("warmup",)',
    )
    assert done.returncode == 1
    assert "does not fit on v5e:2x2" in done.stderr
    assert "larger slice" in done.stderr
    found = json.loads((tmp_path / "plan.json").read_text())
    assert found["fits"] is False
    assert found["programs"][0]["bytes"]["headroom"] < 0


@pytest.mark.slow
def test_the_smallest_slice_is_found(recipe: Path) -> None:
    """Heads over two chips need two chips, so four."""
    found = plan(PlanConfig(str(recipe), "v6e", stages=("warmup",)))
    assert found["topology"] == "v6e:2x2"
    assert [one["topology"] for one in found["searched"]] == ["v6e:1x1", "v6e:2x2"]
    assert [one["fits"] for one in found["searched"]] == [False, True]


def test_collection_and_evaluation_are_lowered(recipe: Path) -> None:
    c = PlanConfig(str(recipe), "v5e:2x2")
    sections, names = read_recipe(c, c.topology), {}
    for name in ("collect", "evaluate"):
        mesh = slice_mesh(c.topology, sections[name]["mesh"])
        made = PROGRAMS[name](sections[name], sections, mesh, Lengths(64, 64))
        names[name] = [program.name for program in made]
        made[-1].jitted.lower(*made[-1].args)
    rollout = ["weights", "prefill", "decode"]
    assert names["collect"] == [*rollout, "log_probs", "student_log_probs", "reward"]
    assert names["evaluate"] == rollout


def test_a_recipe_is_given_what_stands_behind_its_file() -> None:
    c = PlanConfig(f"{ROOT}/configs/distil.py:32b", "v5e:8x16")
    section = read_recipe(c, c.topology)["distil"]
    assert section["model"]["path"] == "Qwen/Qwen2.5-32B-Instruct"
    assert section["mesh"]["tensor"] == 8


def test_values_that_follow_from_the_slice_and_from_changes() -> None:
    changes = ('model="Qwen/Qwen2.5-3B-Instruct"', "row_length=1024")
    file = f"{ROOT}/configs/rlt.py:gsm8k"
    recipe = read_recipe(PlanConfig(file, "v5e:2x4", changes=changes), "v5e:2x4")
    assert recipe["pipeline"][:2] == ("eval_base", "warmup")
    assert recipe["warmup"]["model"]["path"] == "Qwen/Qwen2.5-3B-Instruct"
    assert recipe["rl"]["policy"]["path"] == "{workdir}/warmup"
    # The preset of v5e has 2,048 tokens in a micro-batch and 32 slots on each device.
    assert recipe["rl"]["rows"] == {"micro_batch_size": 16, "row_length": 1024}
    assert recipe["rl"]["engine"]["slots"] == 256
    assert recipe["rl"]["loop"]["offload"]
    changed = PlanConfig(file, "v5e", changes=("rl.engine.slots=7",))
    assert read_recipe(changed, "v6e:1x1")["rl"]["engine"]["slots"] == 7


def test_steps_of_epochs_are_estimated(recipe: Path) -> None:
    """Three passes over 100 sequences of 256 tokens, in steps of two rows of 1024."""
    changes = ("warmup.sft.steps=0", "warmup.sft.epochs=3.0")
    lengths = {"traces": 100, "prompt_tokens": 56, "completion_tokens": 200}
    c = PlanConfig(str(recipe), "v5e:2x2", changes=changes, **lengths)
    loop = read_recipe(c, c.topology)["warmup"]["sft"]
    assert steps_of(c, loop, read_lengths(c)) == 38
    assert steps_of(c, loop | {"steps": 7, "epochs": 0.0}, read_lengths(c)) == 7
    assert steps_of(c, {}, read_lengths(c)) == 1


def test_lengths_have_their_mean_and_their_tail() -> None:
    lengths = Lengths(0, 1000, 2500).completions(20_000, 10**6)
    assert lengths.mean() == pytest.approx(1000, rel=0.01)
    assert np.quantile(lengths, 0.95) == pytest.approx(2500, rel=0.01)
    assert Lengths(0, 1000, 2500).completions(100, 1500).max() == 1500
    assert {*Lengths(0, 7).completions(3, 10)} == {7}
    with pytest.raises(
        UserError, match="between completion_tokens=1000 and 3868, or 0"
    ):
        Lengths(0, 1000, 4000).completions(3, 10)
    with pytest.raises(UserError, match="between completion_tokens=1000"):
        Lengths(0, 1000, 900).completions(3, 10)


def test_slots_are_filled_again() -> None:
    """Two slots, eight steps at once: 3 + 1, 1 + 1 and 2 + 1 dispatches."""
    assert dispatches(np.array([20, 8, 9]), 2, 8) == 5
    assert dispatches(np.array([20, 8, 9]), 1, 8) == 9
    assert dispatches(np.array([20, 8, 9]), 3, 8) == 4


def test_lengths_of_a_run(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    c = PlanConfig("unread", "v5e", prompt_tokens=7, lengths=str(file))
    with pytest.raises(UserError, match="plan.lengths=.*metrics.jsonl"):
        read_lengths(c)
    file.write_text('{"step": 1}\n')
    with pytest.raises(UserError, match="rollout/length_mean"):
        read_lengths(c)
    rows = [
        {"rollout/length_mean": mean, "rollout/length_p95": 3.0 * mean}
        for mean in [1000.0] + [10.0, 20.0] * 10
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert read_lengths(c) == (7, 15, 45)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"topology": "v9:2x2"}, "chip 'v9' is not one of"),
        ({"topology": "v5e:3x3"}, "cannot be compiled for"),
        ({"topology": "h100:8"}, "GPUs can only be planned by their shapes"),
        ({"recipe": "nowhere.py"}, "no config file with get_config"),
        ({"recipe": "configs"}, "no config file with get_config"),
        ({"recipe": "README.md"}, "no config file with get_config"),
        ({"stages": ("nothing",)}, "'nothing'.*: the recipe has warmup, rl"),
        ({"stages": ("report",)}, "'report'.*: the recipe has warmup, rl"),
        ({"changes": ("rl.loop.rounds=3",)}, "unknown key 'rounds'"),
        ({"changes": ("=1",)}, "plan.changes: '=1': 'the recipe has no such key'"),
        ({"changes": ("rl.nope=1",)}, "the recipe's 'rl': unknown key 'nope'"),
        ({"changes": ("rl=5",)}, "plan.changes: 'rl=5'"),
        ({"changes": ('rl.loop.steps="a"',)}, "plan.changes: 'rl.loop.steps=\"a\"'"),
        ({"changes": ("rl.rows.micro_batch_size=3",)}, "3 rows of 1024 tokens"),
        ({"changes": ("warmup.mesh.tensor=8",)}, "does not cover 4 devices"),
        ({"changes": ("rl.lora.rank=4",)}, "cannot be planned yet"),
        ({"changes": ('rl.teaching={"kind": "reverse"}',)}, "`teaching` cannot be"),
    ],
)
def test_plans_that_cannot_be_are_refused(
    recipe: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        plan(PlanConfig(**{"recipe": str(recipe), "topology": "v5e:2x2"} | change))


NOT_MADE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")


def arrays(compiled: Any) -> list[hlo.Array]:
    """What instructions outside of fusions make anew."""
    program = hlo.read(compiled)
    names, found = [program.entry], []
    for name in names:
        for line in program.computations[name].instructions.values():
            if line.opcode in ("while", "call", "conditional"):
                names += line.called
            elif line.opcode not in NOT_MADE and not line.opcode.endswith("-start"):
                found += line.arrays
    return found


def elements(array: hlo.Array) -> int:
    size = 1
    for n in array.shape:
        size *= n
    return size


def gathered(compiled: Any) -> list[hlo.Array]:
    """What all-gathers make, fused ones too."""
    return [
        array
        for body in hlo.read(compiled).computations.values()
        for line in body.instructions.values()
        if line.opcode.startswith("all-gather")
        for array in line.arrays
    ]


UPDATES = [
    pytest.param(name, marks=pytest.mark.slow)
    for name in ("warmup/update", "rl/update")
]
LOG_PROBS = (
    pytest.param("rl/log_probs", marks=pytest.mark.slow),
    "rl/student_log_probs",
)
FORWARD = (*LOG_PROBS, "rl/reward", "rl/decode", "rl/prefill")


@pytest.mark.parametrize("name", [*UPDATES, *LOG_PROBS])
def test_no_parameter_is_gathered_whole(
    name: str, compiled: Callable[[str], Any]
) -> None:
    """No all-gather makes more than one layer's kernel, or the embedding's part."""
    D, F, V = SIZES["embed_dim"], SIZES["mlp_dim"], SIZES["vocab_size"]
    tensor = 2
    one_layer = D * F // tensor
    embedding = D * V // tensor
    activations = ROWS * D  # a row of a micro-batch, from all parts of its length
    stacked = SIZES["num_layers"] * one_layer
    made = gathered(compiled(name))
    assert made
    largest = max(map(elements, made))
    assert largest <= max(one_layer, embedding, activations) < stacked


@pytest.mark.parametrize("name", FORWARD)
def test_forward_programs_have_no_float32_weights(
    name: str, compiled: Callable[[str], Any]
) -> None:
    """Nothing copies weights to float32, or float32 weights, of all layers."""
    D, F, L = SIZES["embed_dim"], SIZES["mlp_dim"], SIZES["num_layers"]
    for array in arrays(compiled(name)):
        stacked = L in array.shape and elements(array) >= L * D * F // 4
        assert not (stacked and array.dtype == "f32"), array


@pytest.mark.parametrize("name", UPDATES)
def test_updates_hold_no_float32_tree_but_a_device_s_own(
    name: str, compiled: Callable[[str], Any]
) -> None:
    """Stacked float32 kernels, as gradients are, are as large as a device's part."""
    L, part = SIZES["num_layers"], SIZES["embed_dim"] * SIZES["mlp_dim"] // 4
    found = arrays(compiled(name))
    stacked = [a for a in found if a.dtype == "f32" and a.shape[:1] == (L,)]
    assert stacked
    assert max(map(elements, stacked)) <= L * part


@pytest.mark.parametrize(
    ("name", "received"),
    [
        ("rl/prefill", 0),
        # Every host gets what was sampled: of 4 steps in the 32 slots of the other slice
        # a token, its log-prob, and whether it counts.
        ("rl/decode", 4 * 32 * (4 + 4 + 1)),
    ],
)
def test_rollouts_move_tokens_alone_between_slices(
    name: str, received: int, in_slices: Callable[[str], Any]
) -> None:
    traffic = costs.collectives(hlo.read(in_slices(name)), ())
    assert "all-reduce" in traffic  # over `tensor`, inside a slice
    between = traffic.get(costs.BETWEEN_SLICES, costs.Traffic(0, 0))
    assert between.bytes == received


@pytest.mark.slow
def test_only_gradients_cross_between_slices(in_slices: Callable[[str], Any]) -> None:
    """A device sums its part of the gradients with one device of the other slice."""
    program, name = hlo.read(in_slices("rl/update")), costs.BETWEEN_SLICES
    state = in_slices.programs["rl/update"].args[0]
    part = device_bytes(state.params)
    assert part / 2 <= costs.collectives(program, ())[name].bytes <= 1.1 * part


def test_slices_are_the_outer_part_of_data(recipe: Path) -> None:
    mesh = slice_mesh("2x v5e:2x2", {"data": 4, "fsdp": -1, "tensor": 1})
    found = [[x.slice_index for x in part.flat] for part in mesh.devices]
    assert found == [[0, 0], [0, 0], [1, 1], [1, 1]]
    with pytest.raises(UserError, match=r"mesh.data=1 on 2 slices.*set mesh.data=2"):
        slice_mesh("2x v5e:2x2", {"data": 1, "fsdp": -1, "tensor": 1})
    config = f"{ROOT}/configs/rlt_7b.py"
    c = PlanConfig(config, "2x v5e:8x8")
    assert read_recipe(c, c.topology)["rl"]["mesh"]["data"] == 2


@pytest.mark.parametrize("name", ["rl/prefill", "rl/decode"])
def test_decoding_copies_no_cache(name: str, compiled: Callable[[str], Any]) -> None:
    """Keys and values are written in place, with two heads on a device."""
    memory = costs.memory(compiled(name))
    cache = memory["aliased"]  # donated
    assert cache > 2**28
    assert memory["temporaries"] < cache / 4


@pytest.mark.parametrize("name", [*UPDATES, *FORWARD])
def test_no_program_holds_all_logits(name: str, compiled: Callable[[str], Any]) -> None:
    """Rows of T tokens never meet the V / tensor logits of a device."""
    V, D = SIZES["vocab_size"], SIZES["embed_dim"]
    for array in arrays(compiled(name)):
        vocabulary = {V, V // 2} & set(array.shape)
        if vocabulary and array.dtype in ("f32", "bf16"):
            others = elements(array) // max(vocabulary)
            # Of D numbers each are the embedding and the head, and parts of them.
            assert others < ROWS // 2 or others in (D, D // 2), array
