"""The planner: what it counts, against figures by hand; with the TPU compiler where it is installed."""

import csv
import importlib.util

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from gim_jax.cli import main
from gim_jax.cli.plan import cells, write
from gim_jax.data import records
from gim_jax.data.pipeline import Batches
from gim_jax.train import compiled, plan, sharding
from tests import stand_in
from tests.pairs import data_config, make_record


def flops(function, *shapes):
    return compiled.count_flops(jax.make_jaxpr(function)(*(jnp.zeros(shape) for shape in shapes)).jaxpr)


def test_flops_of_products_convolutions_and_loops_by_hand():
    assert flops(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (4, 3, 5), (4, 5, 7)) == 4 * 2 * 3 * 5 * 7

    def conv(x, k, groups=1):
        return jax.lax.conv_general_dilated(
            x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups
        )

    assert flops(conv, (1, 8, 6, 4), (3, 3, 4, 10)) == 2 * 8 * 6 * 10 * 9 * 4
    assert flops(lambda x, k: conv(x, k, 4), (1, 8, 6, 4), (3, 3, 1, 4)) == 2 * 8 * 6 * 4 * 9
    loop = lambda a: jax.lax.scan(lambda x, _: (x @ a, None), a, None, length=11)[0]  # noqa: E731
    assert flops(jax.jit(loop), (5, 5)) == 11 * 2 * 5**3
    backward = jax.grad(lambda a: jax.checkpoint(lambda x: jnp.sin(x @ x).sum())(a))
    assert flops(backward, (5, 5)) == 3 * 2 * 5**3 + 2 * 5**3  # forward, again, and two backward


PROGRAM = """HloModule step, entry_computation_layout={(f32[4])->f32[4]}

%add (a: f32[], b: f32[]) -> f32[] {
  ROOT %sum = f32[] add(%a, %b)
}

%inner (x: (s32[], f32[2])) -> (s32[], f32[2]) {
  %all-gather-start.2 = (f32[2]{0}, f32[6]{0}) all-gather-start(f32[2]{0} %y), backend_config={"estimated_cycles":"7"}
  %done = f32[6]{0} all-gather-done(%all-gather-start.2)
}

%until3 (x: (s32[], f32[2])) -> pred[] {
  %c = s32[]{:T(128)} constant(3)
}

%outer (x: (s32[], f32[2])) -> (s32[], f32[2]) {
  %w = (s32[], f32[2]) while(%x), condition=%until3, body=%inner
  %f = f32[2]{0} fusion(%w), backend_config={"estimated_cycles":"100"}
}

%until5 (x: (s32[], f32[2])) -> pred[] {
  %c = s32[] constant(5)
}

ENTRY %main (a: f32[4]) -> f32[4] {
  %all-reduce.1 = f32[10,3]{1,0:T(8,128)} all-reduce(f32[10,3]{1,0} %x), replica_groups={}
  %ar = (f32[4]{0}, bf16[8]{0}) all-reduce(%a, %b), to_apply=%add
  %w = (s32[], f32[2]) while(%x), condition=%until5, body=%outer
  %g = f32[2]{0} fusion(%w), backend_config={"estimated_cycles":"1000"}
  %h = f32[2]{0} custom-call(%g), backend_config={"estimated_cycles":"9223372036854775807"}
}
"""


def test_collectives_and_cycles_count_as_often_as_they_run():
    """A loop of 5 turns with one of 3 in it."""
    counts, moved = compiled.collectives(PROGRAM)
    assert counts == {"all-reduce": 2, "all-gather": 5 * 3}
    assert moved == 120 + 16 + 16 + 5 * 3 * (8 + 24) // 2
    assert compiled.estimated_cycles(PROGRAM) == 1000 + 5 * (100 + 3 * 7)


def test_bytes_of_loops_count_every_turn():
    """7 turns of a product and of 3 more, of 64x64: each reads two matrices, writes one and copies it for the next."""
    product, num_bytes = lambda x, w: jax.lax.optimization_barrier(x @ w), 64 * 64 * 4

    def step(x, w):
        inner = lambda x, _: (product(x, w), None)  # noqa: E731
        return jax.lax.scan(lambda x, _: (jax.lax.scan(inner, product(x, w), length=3)[0], None), x, length=7)[0]

    matrix = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    program = jax.jit(step).lower(matrix, matrix).compile()
    moved = compiled.loop_factor(program.as_text()) * program.cost_analysis()["bytes accessed"]
    assert moved == pytest.approx(7 * (1 + 3) * (3 + 2) * num_bytes, rel=0.05)


@pytest.mark.parametrize(
    "text, found",
    [
        ("Ran out of memory in memory space hbm. Used 17.81G of 15.75G hbm. Exceeded", ("17.81", "G")),
        ("the total memory required for HLO temporaries (16.45G) exceeds available HBM (15.75G).", ("16.45", "G")),
    ],
)
def test_what_a_program_that_does_not_fit_would_have_needed(text, found):
    assert compiled.OUT_OF_MEMORY.search(text).groups() == found


@pytest.mark.parametrize("depth", [False, True])
def test_described_batch_is_what_the_pipeline_makes(tmp_path, depth):
    records.write_dataset(tmp_path, "pairs", "train", 1, [records.encode(make_record(i)) for i in range(3)])
    data = data_config(tmp_path, depth=depth)
    real = sharding.put_batch(sharding.make_mesh(), next(Batches(data, 0, 8)))
    described = plan.abstract_batch(data, 8, sharding.make_mesh())
    form = lambda batch: {k: (v.shape, np.dtype(v.dtype), v.sharding) for k, v in batch.items()}  # noqa: E731
    assert form(described) == form(real)


def test_schedule_is_that_of_the_configuration_whatever_the_planned_batch(monkeypatch):
    # 1000 steps of 8 pairs are 125 of 64, fewer than the warm-up has.
    monkeypatch.setattr(plan, "build", lambda config: (stand_in.StandIn(), stand_in.objective, stand_in.META))
    config = stand_in.make_config("x", 1000, optim__warmup_steps=500, data__depth=False)
    traced = plan.trace_step(config, sharding.make_mesh(), 64)
    assert any(aval.shape == (64, 24, 32, 1) for aval in traced.jaxpr.in_avals)


def test_step_of_a_network_with_batch_statistics_lowers_for_gpus(monkeypatch):
    monkeypatch.setattr(plan, "build", lambda config: (stand_in.StandIn(), stand_in.objective, stand_in.META))
    found = plan.lower_for_gpu(stand_in.make_config("x", data__depth=False), 8)
    images, masks, points = 2 * 24 * 32, 2 * 3 * 4, 32 * (2 * 2 * 4 + 4 + 1)
    assert found["batch_gib"] == 8 * (images + masks + points) / 2**30
    assert found["saved_gib"] > 0 and found["tflop"] > 0


@pytest.mark.parametrize(
    "option, message",
    [("--topology=v9:2x2", "--topology: found 'v9:2x2'"), ("--pairs-per-chip=x", "--pairs-per-chip: found 'x'")],
)
def test_wrong_option_is_named(capsys, option, message):
    assert main(["plan", "--config=configs/loftr.py:tiny", option]) == 2
    assert capsys.readouterr().err.startswith(f"gim-jax plan: {message}")


def test_table_and_plot_of_a_step_that_fits_nowhere(tmp_path):
    row = {"topology": "v5e:4x4", "chips": 16, "pairs_per_chip": 4, "batch_size": 64, "hbm_gib": 20.1}
    row |= {"hbm_there_gib": 16, "fits": False, "tflop": 30.4, "compute_ms": 154.5}
    assert cells(row)[:7] == ("v5e:4x4", "16", "4", "64", "20.10", "16", "NO")
    write(tmp_path, "a title", [row])
    assert (tmp_path / "plan.csv").read_text().splitlines()[1].split(",")[:3] == ["64", "16", "154.5"]
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="the TPU compiler is not installed (tpu-compile)"
)
def test_tiny_step_is_planned_for_a_slice(tmp_path, capsys):
    argv = ["plan", "--config=configs/loftr.py:tiny", "--topology=v5e:2x2", "--pairs-per-chip=2", f"--out={tmp_path}"]
    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert "v5e:2x2" in printed and "yes" in printed
    (values,) = csv.DictReader((tmp_path / "plan.csv").read_text().splitlines())
    assert values["chips"] == "4" and 0 < float(values["hbm_gib"]) < 16 and float(values["tflop"]) > 0
    assert (tmp_path / "plan.png").read_bytes()[:4] == b"\x89PNG"
