"""Training: repeatable bit for bit, killed or not, on any mesh; what it writes; what it refuses.

A stand-in network of a few hundred parameters takes the place of a matcher (tests/stand_in.py).
"""

import hashlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import jax
import numpy as np
import optax
import pytest
from jax.experimental.compilation_cache import compilation_cache
from tensorboardX.proto import event_pb2

from gim_jax.api import load_matcher
from gim_jax.cli import main
from gim_jax.config import config_path
from gim_jax.data import records
from gim_jax.data.pipeline import TOO_FEW_MATCHES, Batches
from gim_jax.train import loop, sharding, state
from gim_jax.train.watch import SCORE
from gim_jax.train.writers import read_metrics
from gim_jax.weights import store
from tests import stand_in
from tests.pairs import make_record, texture

REPO = Path(__file__).parent.parent
NUM_STEPS = 12


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """Share compiled programs between the runs of this file: almost all their time is compilation."""
    path = tmp_path_factory.mktemp("compiled")
    values = {"jax_compilation_cache_dir": str(path), "jax_persistent_cache_min_compile_time_secs": 0.2}
    before = {name: getattr(jax.config, name) for name in values}
    for settings in (values, before):
        for name, value in settings.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if settings is values:
            yield path


@pytest.fixture(scope="module")
def folder(tmp_path_factory, compiled):
    path = tmp_path_factory.mktemp("train_data") / "pairs"
    records.write_dataset(path, "pairs", "train", 2, [records.encode(make_record(i)) for i in range(20)])
    return path


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    """A run from beginning to end: (workdir, result, training and evaluation traces)."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    stand_in.TRACES.clear()
    result = stand_in.train(stand_in.make_config(folder, NUM_STEPS, eval_every=6), workdir)
    return workdir, result, list(stand_in.TRACES)


def read_digest(folder):
    return (folder / "pairs-train.sha256").read_text().strip()


def losses(workdir):
    """Read step -> loss; every step must be there once."""
    lines = [line for line in read_metrics(workdir) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]


def run_program(workdir, folder, *arguments, devices=8):
    environment = os.environ | {
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
    }
    command = [sys.executable, "-m", "tests.stand_in", str(workdir), str(folder), str(NUM_STEPS), *map(str, arguments)]
    return subprocess.run(command, cwd=REPO, env=environment, capture_output=True, text=True)


# ---- the same losses, whatever happens ----


def test_same_seed_gives_the_same_losses_bit_for_bit(folder, undisturbed, tmp_path):
    # Neither evaluation nor another rhythm of checkpoints may change them.
    stand_in.train(stand_in.make_config(folder, NUM_STEPS, checkpoint_every=5, data__num_threads=0), tmp_path)
    assert losses(tmp_path) == losses(undisturbed[0])
    assert len(set(losses(tmp_path))) == NUM_STEPS


def test_another_seed_gives_other_losses(folder, undisturbed, tmp_path):
    stand_in.train(stand_in.make_config(folder, 2, optim__warmup_steps=1, seed=4), tmp_path)
    assert losses(tmp_path) != losses(undisturbed[0])[:2]


@pytest.mark.slow
def test_killed_and_stopped_anywhere_it_continues_with_the_same_losses(folder, undisturbed, tmp_path):
    # kill -9 before the first checkpoint, kill -9 while one is being written, SIGTERM, and then to the end.
    killed = run_program(tmp_path, folder, "SIGKILL", 3, "eval_every=6")
    assert killed.returncode == -signal.SIGKILL
    assert read_metrics(tmp_path)[-1]["step"] == 3
    assert run_program(tmp_path, folder, "SIGKILL", 8, "eval_every=6").returncode == -signal.SIGKILL
    stopped = run_program(tmp_path, folder, "SIGTERM", 9, "eval_every=6")
    assert stopped.returncode == 130, stopped.stderr
    assert (tmp_path / "checkpoints" / "10").is_dir()  # the step under way was finished and saved
    assert run_program(tmp_path, folder, "eval_every=6").returncode == 0
    lines, expected = (read_metrics(path) for path in (tmp_path, undisturbed[0]))
    for line in lines + expected:
        for rate in ("pairs_per_s", "tflops_per_device"):
            line.pop(rate, None)
    assert lines == expected
    ours, theirs = (store.load(path / "weights.safetensors")[0] for path in (tmp_path, undisturbed[0]))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def stop_at(step):
    """Make a `progress` that sends SIGTERM once a step is taken; the run stops after the next one."""
    return lambda now, *_: os.kill(os.getpid(), signal.SIGTERM) if now == step else None


def test_stopped_where_it_would_evaluate_it_does_so_later_or_at_the_last_step_at_once(folder, undisturbed, tmp_path):
    config = stand_in.make_config(folder, NUM_STEPS, eval_every=6)
    with pytest.raises(KeyboardInterrupt):
        stand_in.train(config, tmp_path, stop_at(5))
    assert read_metrics(tmp_path)[-1]["step"] == 6 and "eval/loss" not in read_metrics(tmp_path)[-1]
    assert stand_in.train(config, tmp_path, stop_at(11))["step"] == NUM_STEPS
    found, expected = (
        [(line["step"], line["eval/loss"]) for line in read_metrics(path) if "eval/loss" in line]
        for path in (tmp_path, undisturbed[0])
    )
    assert found == expected


def test_finished_run_started_again_changes_nothing(folder, undisturbed):
    workdir, result, _ = undisturbed
    before = (workdir / "weights.safetensors").read_bytes(), (workdir / "metrics.jsonl").read_bytes()
    again = stand_in.train(stand_in.make_config(folder, NUM_STEPS, eval_every=6), workdir)
    assert ((workdir / "weights.safetensors").read_bytes(), (workdir / "metrics.jsonl").read_bytes()) == before
    assert again["loss"] == result["loss"] and again["eval/loss"] == result["eval/loss"]


@pytest.mark.slow
def test_one_device_gives_the_losses_of_eight(folder, undisturbed, tmp_path):
    assert run_program(tmp_path, folder, devices=1).returncode == 0
    np.testing.assert_allclose(losses(tmp_path), losses(undisturbed[0]), rtol=2e-5)


@pytest.mark.parametrize("fsdp", [4])
def test_parameters_split_over_devices_give_the_same_losses(folder, undisturbed, tmp_path, fsdp):
    stand_in.train(stand_in.make_config(folder, NUM_STEPS, mesh__fsdp=fsdp), tmp_path)
    np.testing.assert_allclose(losses(tmp_path), losses(undisturbed[0]), rtol=2e-5)


@pytest.mark.slow
def test_checkpoint_of_one_mesh_continues_on_another(folder, undisturbed, tmp_path):
    assert run_program(tmp_path, folder, "SIGTERM", 5, "mesh__fsdp=4").returncode == 130
    assert run_program(tmp_path, folder, devices=1).returncode == 0
    np.testing.assert_allclose(losses(tmp_path), losses(undisturbed[0]), rtol=2e-5)


def run_hosts(workdir, folder, *signals, num=2, devices=4):
    """Train as several processes; the last one gets the signal."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    hosts = []
    for index in range(num):
        environment = os.environ | {
            "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
            "JAX_COMPILATION_CACHE_DIR": str(jax.config.jax_compilation_cache_dir),
            "HOSTS": f"{port},{num},{index}",
        }
        mine = map(str, signals if index == num - 1 else ())
        command = [sys.executable, "-m", "tests.stand_in", str(workdir), str(folder), str(NUM_STEPS), *mine]
        command += ["mesh__fsdp=2"]
        hosts.append(subprocess.Popen(command, cwd=REPO, env=environment, stderr=subprocess.PIPE, text=True))
    errors = [host.communicate(timeout=600)[1] for host in hosts]
    return [host.returncode for host in hosts], errors


@pytest.mark.slow
def test_two_hosts_stop_together_and_hand_over_to_one(folder, undisturbed, tmp_path):
    codes, errors = run_hosts(tmp_path, folder, "SIGINT", 3)  # which is passed on as SIGTERM
    assert codes == [130, 130], errors
    assert len(losses(tmp_path)) < NUM_STEPS
    assert run_program(tmp_path, folder, devices=4).returncode == 0
    np.testing.assert_allclose(losses(tmp_path), losses(undisturbed[0]), rtol=2e-5)


def test_step_is_traced_once(undisturbed):
    assert undisturbed[2].count(True) == 1 and undisturbed[2].count(False) == 1


# ---- what a run writes ----


def test_training_lowers_the_loss(undisturbed):
    values = losses(undisturbed[0])
    assert np.mean(values[-3:]) < 0.5 * np.mean(values[:3])


def test_metrics_hold_rates_norms_and_evaluations(undisturbed):
    lines = read_metrics(undisturbed[0])
    training = [line for line in lines if "loss" in line]
    rates = {"pairs_per_s", "tflops_per_device"}
    assert {"step", "loss", "guess", "lr", "grad_norm", "update_norm", "param_norm", *rates} == set(training[0])
    assert all(line["pairs_per_s"] > 0 for line in training)
    # The kernel of 5x5x2x8 at 6x8 places and the head of 8x2, 8 pairs on 8 devices, forward and backward. Of the
    # images no gradient is asked.
    flop = 2 * (2 * 6 * 8 * 25 * 2 * 8) + 3 * (2 * 8 * 2)
    for line in training:
        assert math.isclose(line["tflops_per_device"], flop / 1e12 * line["pairs_per_s"] / 8, rel_tol=1e-6)
    evaluations = [line for line in lines if "eval/loss" in line]
    assert [line["step"] for line in evaluations] == [0, 6, 12]
    assert len({line["eval/loss"] for line in evaluations}) == 3


def test_tensorboard_files_hold_the_same_numbers(undisturbed):
    found = {}
    for path in sorted((undisturbed[0] / "tensorboard").iterdir()):
        for payload in records.read_tfrecord(path):  # event files are TFRecords
            event = event_pb2.Event.FromString(payload)
            for value in event.summary.value:
                if value.tag == "loss":
                    found[event.step] = value.simple_value
    assert found == dict(enumerate(losses(undisturbed[0]), start=1))


def test_unfinished_last_line_of_a_killed_run_is_dropped(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_weights_file_holds_the_variables_and_says_what_they_are_and_of_what_made(folder, undisturbed):
    variables, meta = store.load(undisturbed[0] / "weights.safetensors")
    assert variables["params"]["encode"]["kernel"].shape == (5, 5, 2, 8)
    assert set(variables["batch_stats"]["norm"]) == {"mean", "var"}
    assert (variables["batch_stats"]["norm"]["mean"] != 0).any()
    assert meta["model"] == "stand_in" and meta["config"] == {"width": 8} and meta["steps"] == NUM_STEPS
    made_of = {"records": str(folder), "split": "train", "num_records": 20, "sha256": read_digest(folder)}
    assert meta["data"] == [made_of] and meta["init_weights_sha256"] is None
    assert undisturbed[1]["num_params"] == sum(a.size for a in jax.tree.leaves(variables["params"]))


def test_training_starts_from_given_weights(folder, undisturbed, tmp_path):
    weights = undisturbed[0] / "weights.safetensors"
    config = stand_in.make_config(folder, 1, optim__warmup_steps=0, optim__lr=1e-12, optim__min_lr=0.0)
    config.init_weights = str(weights)
    stand_in.train(config, tmp_path)
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert store.load(tmp_path / "weights.safetensors")[1]["init_weights_sha256"] == digest
    ours, theirs = (store.load(path)[0]["params"] for path in (tmp_path / "weights.safetensors", weights))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-9), ours, theirs)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("other_list, steps, score", [(False, 4, 0.4), (True, 8, 0.3)])  # of equal ones the latest
def test_weights_of_the_best_evaluation_are_kept_also_by_a_run_that_was_interrupted(
    folder, tmp_path, monkeypatch, other_list, steps, score
):
    second = SimpleNamespace(time=lambda: 1e9)  # both runs start in it: neither's events may replace the other's
    monkeypatch.setattr("tensorboardX.event_file_writer.time", second)
    config = stand_in.make_config(folder, 8, eval_every=2, checkpoint_every=2, eval__records="")
    config.eval.pairs = str(tmp_path / "pairs.txt")
    (tmp_path / "pairs.txt").write_text("a list")
    seen, pictures = [], {"matches/0": np.full((4, 6, 3), 7, np.uint8)}

    def run(scores, until):
        left = iter(scores)

        def watch(variables, rows):
            seen.append(variables)
            return {SCORE: next(left)}, pictures

        def progress(step, *_):
            if step == until:
                raise Interrupted

        loop.run(config, tmp_path, stand_in.StandIn(), stand_in.objective, stand_in.META, progress, watch)

    with pytest.raises(Interrupted):
        run([0.1, 0.2, 0.4], 5)  # at steps 0, 2 and 4
    if other_list:
        (tmp_path / "pairs.txt").write_text("another list")
    run([0.3, 0.3], None)  # at steps 6 and 8
    variables, meta = store.load(tmp_path / "best.safetensors")
    assert (meta["steps"], meta["score"]) == (steps, score)
    jax.tree.map(np.testing.assert_array_equal, variables, seen[steps // 2])
    assert [line[SCORE] for line in read_metrics(tmp_path) if SCORE in line] == [0.1, 0.2, 0.4, 0.3, 0.3]
    found = [e for path in (tmp_path / "tensorboard").iterdir() for e in records.read_tfrecord(path)]
    values = [v for e in found for v in event_pb2.Event.FromString(e).summary.value if v.tag == "matches/0"]
    assert len(values) == 5 and (values[0].image.height, values[0].image.width) == (4, 6)


def test_without_a_list_of_pairs_no_weights_are_the_best(folder, tmp_path):
    config = stand_in.make_config(folder, 2, eval_every=1, optim__warmup_steps=1)
    shown = []

    def watch(variables, rows):
        shown.append(rows["image0"].shape)
        return {}, {}

    loop.run(config, tmp_path, stand_in.StandIn(), stand_in.objective, stand_in.META, None, watch)
    assert shown == [(8, 24, 32, 1)] * 3 and not (tmp_path / "best.safetensors").exists()


def test_what_was_left_out_is_counted_over_interruptions_and_in_validation_too(tmp_path, compiled, monkeypatch):
    path = tmp_path / "a.tfrecord"
    payloads = [records.encode(make_record(i, num_matches=3 if i == 3 else 64)) for i in range(6)]
    records.write_tfrecord(path, payloads)
    data = bytearray(path.read_bytes())
    data[16 + len(payloads[0])] ^= 1  # the header of the second record
    path.write_bytes(data)
    closed = []
    monkeypatch.setattr(Batches, "close", lambda self, close=Batches.close: (closed.append(self), close(self)))
    config = stand_in.make_config(path, 6, data__num_threads=0, eval_every=6)
    with pytest.raises(KeyboardInterrupt):
        stand_in.train(config, tmp_path / "run", stop_at(2))
    assert len(closed) == 2  # of training and of validation
    found = stand_in.train(config, tmp_path / "run")["incidents"]
    batches = Batches(config.data, config.seed, config.batch_size)
    for _ in range(config.num_steps):
        next(batches)
    of_training = {reason: count for reason, count in found.items() if not reason.startswith("validation: ")}
    assert of_training == batches.incidents and len(of_training) == 2 and of_training[TOO_FEW_MATCHES] > 6
    assert found[f"validation: {TOO_FEW_MATCHES}"] > 2


def test_trace_is_stopped_if_and_only_if_it_was_started(folder, tmp_path, monkeypatch):
    calls = []
    for name in ("start_trace", "stop_trace"):
        monkeypatch.setattr(jax.profiler, name, lambda *_, name=name: calls.append(name))
    for profiled, stop, expected in [((0, 5), 1, 2), ((1, 4), 3, 0), ((4, 100), None, 2)]:
        config = stand_in.make_config(folder, 6, profile_steps=profiled)
        calls.clear()
        try:
            stand_in.train(config, tmp_path, stop_at(stop))  # at step 2, at step 4, at the end
        except KeyboardInterrupt:
            assert stop is not None
        assert calls == ["start_trace", "stop_trace"][:expected]


# ---- optimiser and mesh ----


def test_learning_rate_follows_gims_formula():
    optim = stand_in.make_config("x", optim__lr=1e-3, optim__min_lr=5e-5, optim__warmup_steps=100).optim
    schedule = state.make_schedule(optim, 1000, 8)
    for s in (0, 37, 99, 100, 555, 1000):
        if s < 100:  # gim trainer: a tenth of lr, rising to lr in the warm-up
            expected = 0.1 * 1e-3 + s / 100 * 0.9 * 1e-3
        else:  # then b - (b - min) s / T with the b that passes through lr at the end of the warm-up
            b = 1000 / 900 * (1e-3 - 5e-5) + 5e-5
            expected = (1000 - s) / 1000 * (b - 5e-5) + 5e-5
        assert math.isclose(float(schedule(s)), expected, rel_tol=1e-5), s


def test_cosine_schedule_ends_at_the_minimum_and_is_half_way_in_the_middle():
    changes = dict(optim__decay="cosine", optim__lr=1.0, optim__min_lr=0.2, optim__warmup_steps=10)
    schedule = state.make_schedule(stand_in.make_config("x", **changes).optim, 110, 8)
    np.testing.assert_allclose([schedule(10), schedule(60), schedule(110)], [1.0, 0.6, 0.2], rtol=1e-5)


def test_stepped_learning_rate_follows_loftrs_recipe():
    # TRUE_LR = 8e-3 * batch / 64; linear from a tenth of it for 10 / (batch / 64) steps; halved at every boundary.
    changes = dict(optim__decay="steps", optim__lr=8e-3, optim__warmup_steps=10, optim__decay_at=(60, 80))
    optim = stand_in.make_config("x", optim__lr_scaling="linear", **changes).optim
    schedule = state.make_schedule(optim, 100, 16)
    expected = {0: 2e-4, 20: 1.1e-3, 40: 2e-3, 59: 2e-3, 61: 1e-3, 81: 5e-4, 99: 5e-4}
    np.testing.assert_allclose([schedule(s) for s in expected], list(expected.values()), rtol=1e-5)


def test_learning_rate_multiplier_scales_the_update_of_matching_parameters_alone():
    params = {"encode": {"kernel": np.ones(3, np.float32)}, "head": {"kernel": np.ones(3, np.float32)}}
    grads = jax.tree.map(lambda a: 0.1 * a, params)
    updates = []
    for multipliers in ((), (("^encode/", 0.25),)):
        optim = stand_in.make_config("x", optim__lr_multipliers=multipliers).optim
        tx, _ = state.make_optimizer(optim, 100, 8)
        updates.append(tx.update(grads, tx.init(params), params)[0])
    plain, scaled = updates
    np.testing.assert_allclose(scaled["encode"]["kernel"], 0.25 * plain["encode"]["kernel"], rtol=1e-6)
    np.testing.assert_array_equal(scaled["head"]["kernel"], plain["head"]["kernel"])
    tx, _ = state.make_optimizer(stand_in.make_config("x", optim__lr_multipliers=(("backbon/", 0.1),)).optim, 100, 8)
    with pytest.raises(ValueError, match=r"'backbon/' matches no parameter, such as encode/kernel"):
        tx.update(grads, tx.init(params), params)


def test_first_update_is_adamw_with_clipping_by_hand():
    # Adam's first update is lr * sign(g); decoupled decay adds lr * wd * p, for every parameter.
    optim = stand_in.make_config("x", optim__warmup_steps=0, optim__lr=0.5, optim__weight_decay=0.1).optim
    tx, _ = state.make_optimizer(optim, 100, 8)
    params = {"a": np.array([2.0, -4.0], np.float32)}
    update, _ = tx.update({"a": np.array([30.0, -40.0], np.float32)}, tx.init(params), params)
    np.testing.assert_allclose(update["a"], [-0.5 * (1 + 0.2), 0.5 * (1 + 0.4)], rtol=1e-4)


def test_averaged_parameters_follow_the_closed_form(folder, tmp_path):
    # With decay 0.5: after one step ema = (p0 + p1) / 2, so p1 = 2 ema - p0.
    config = stand_in.make_config(folder, 1, optim__warmup_steps=0)
    stand_in.train(config, tmp_path / "plain")
    tx, _ = state.make_optimizer(config.optim, 1, 8)
    init = state.make_init(stand_in.StandIn(), 1, tx, False)
    before = jax.jit(init)(jax.random.key(config.seed)).params
    config.optim.ema_decay = 0.5
    stand_in.train(config, tmp_path / "ema")
    after, averaged = (store.load(tmp_path / n / "weights.safetensors")[0]["params"] for n in ("plain", "ema"))
    expected = jax.tree.map(lambda a, b: 0.5 * a + 0.5 * b, before, after)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), averaged, expected)


def test_large_arrays_are_split_over_fsdp_and_small_ones_are_not():
    mesh = sharding.make_mesh(4)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4}
    shapes = {"big": np.zeros((6, 32, 8)), "odd": np.zeros((33, 63)), "small": np.zeros(8)}
    placed = sharding.state_shardings(mesh, shapes, min_size=64)
    assert placed["big"].shard_shape((6, 32, 8)) == (6, 8, 8)
    assert placed["odd"].is_fully_replicated and placed["small"].is_fully_replicated
    with pytest.raises(ValueError, match=r"mesh\.fsdp: found 3, expected a divisor of 8 devices"):
        sharding.make_mesh(3)


def test_optimiser_state_is_split_like_the_parameters():
    mesh = sharding.make_mesh(4)
    tx = optax.adam(1e-3)
    abstract = state.abstract_state(state.make_init(stand_in.StandIn(), 1, tx, True), mesh, 64)
    kernel = abstract.params["encode"]["kernel"]
    assert not kernel.sharding.is_fully_replicated
    for tree in (abstract.opt_state[0].mu, abstract.opt_state[0].nu, abstract.ema):
        assert tree["encode"]["kernel"].sharding == kernel.sharding


@pytest.mark.slow
def test_loftr_trains_from_the_command_line_and_its_weights_match(folder, tmp_path, capsys):
    # The real chain at its smallest: a narrow network, two steps, a look at a known pair before and after them, then a
    # matcher of the weights.
    for number in (0, 1):
        cv2.imwrite(str(tmp_path / f"{number}.png"), texture(number, 96, 64))
    K = "80 0 47.5 0 80 31.5 0 0 1"
    (tmp_path / "pairs.txt").write_text(f"0.png 1.png 0 0 {K} {K} 1 0 0 1 0 1 0 0 0 0 1 0 0 0 0 1\n")
    options = dict(num_steps=2, batch_size=8, size="(64,48)", max_matches=32, min_matches=4)
    options = {**options, "optim.warmup_steps": 1, "data.records": str(folder)}
    options |= {"model.initial_dim": 8, "model.block_dims": "(8,8,16)", "model.num_heads": 2}
    options |= {"model.coarse_layers": "('self','cross')", "eval_every": 2, "eval.pairs": str(tmp_path / "pairs.txt")}
    for name in ("size", "max_matches", "min_matches"):
        options[f"data.{name}"] = options.pop(name)
    argv = ["train", "--config=configs/loftr.py:tiny", f"--workdir={tmp_path}"]
    assert main(argv + [f"--config.{name}={value}" for name, value in options.items()]) == 0
    printed = capsys.readouterr().out
    assert "step 2 of 2: loss" in printed and str(tmp_path / "weights.safetensors") in printed
    assert all(math.isfinite(value) and value > 0 for value in losses(tmp_path))
    matcher = load_matcher("loftr_tiny", tmp_path / "weights.safetensors", thr=0.0)
    assert matcher.config.block_dims == (8, 8, 16)
    image = texture(0, 96, 64)
    assert len(matcher(image, image)) > 0
    assert [line["step"] for line in read_metrics(tmp_path) if SCORE in line] == [0, 2]
    best = load_matcher("loftr_tiny", tmp_path / "best.safetensors", thr=0.0)
    assert len(best(image, image)) > 0 and store.load(tmp_path / "best.safetensors")[1]["steps"] == 2  # of equal ones


# ---- what is refused ----


def test_loss_that_is_not_finite_stops_the_run_and_is_not_saved(folder, tmp_path):
    config = stand_in.make_config(folder, 8, checkpoint_every=1, optim__lr=1e30, optim__clip_norm=0.0)
    with pytest.raises(ValueError, match=r"step \d: loss (nan|inf).*not finite; last checkpoint") as error:
        stand_in.train(config, tmp_path)
    failed = int(str(error.value).split()[1].rstrip(":"))
    saved = [int(p.name) for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()]
    assert max(saved, default=0) < failed
    assert not (tmp_path / "weights.safetensors").exists()
    with np.load(tmp_path / f"bad_batch_{failed}.npz") as batch:
        assert batch["image0"].shape == (8, 24, 32, 1)


def test_folder_of_another_experiment_is_refused_by_the_setting(folder, undisturbed):
    config = stand_in.make_config(folder, NUM_STEPS, eval_every=6, optim__lr=0.5)
    with pytest.raises(ValueError, match=r"holds another experiment: optim\.lr: found 0\.5, expected 0\.02"):
        stand_in.train(config, undisturbed[0])
    assert json.loads((undisturbed[0] / "config.json").read_text())["optim"]["lr"] == 0.02


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"batch_size": 12}, r"batch_size: found 12, expected a multiple of 8 devices"),
        ({"num_steps": 0}, r"num_steps: found 0, expected 1 or more"),
        ({"optim__warmup_steps": 12}, r"optim\.warmup_steps: found 12, expected 0 to 11"),
        ({"optim__decay": "step"}, r"optim\.decay: found 'step', expected one of linear, cosine, constant, steps"),
        ({"eval_every": 2, "eval__records": ""}, r"eval\.records, eval\.pairs: found ''"),
        ({"eval__num_batches": 0}, r"eval\.num_batches: found 0, expected 1 or more"),
        ({"profile_steps": (5, 5)}, r"profile_steps: found \(5, 5\), expected none or two of them, ascending"),
        ({"optim__lr": 0.0}, r"optim\.lr: found 0\.0, expected above 0"),
        ({"optim__lr": float("nan")}, r"optim\.lr: found nan, expected a number"),
        ({"optim__canonical_batch": 0}, r"optim\.canonical_batch: found 0, expected 1 or more"),
        ({"wandb": "project"}, r"wandb: found 'project', but the package is missing: pip install 'gim-jax\[wandb\]'"),
        ({"init_weights": "/nowhere.safetensors"}, r"/nowhere\.safetensors: no such file"),
        ({"data__augment": {"rotation": 3}}, r"data\.augment: .*rotation"),
    ],
)
def test_wrong_setting_is_named(folder, tmp_path, monkeypatch, changes, message):
    monkeypatch.setitem(sys.modules, "wandb", None)  # as where it is not installed
    with pytest.raises(ValueError, match=message):
        stand_in.train(stand_in.make_config(folder, **changes), tmp_path)


def test_stock_configuration_stands_in_for_its_name_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("loftr.py", "configs/loftr.py", "./configs/loftr.py"):
        assert config_path(f"{name}:gim") == (REPO / "configs/loftr.py", "gim")
    for name in ("/home/nobody/x/loftr.py", "x/loftr.py", "../configs/loftr.py"):
        with pytest.raises(ValueError, match=f"--config={name}:gim: no such config file; known: dkm.py"):
            config_path(f"{name}:gim")


@pytest.mark.parametrize(
    "argument",
    ["--config.optim.lrr=1", "--config.optim.lr=abc", "--config.nothing.x=1", "--config.batch_size=1.5", "--typo=1"],
)
def test_command_refuses_a_typo_in_one_line(tmp_path, capsys, argument):
    argv = ["train", "--config=configs/loftr.py:tiny", f"--workdir={tmp_path / 'run'}", argument]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert error.startswith("gim-jax train: ") and error.count("\n") == 1
    assert ("no such setting: 'lrr' Did you mean" in error) == ("lrr" in argument)
    assert not (tmp_path / "run").exists()
