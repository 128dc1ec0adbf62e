"""The training loop: `train(config, workdir)`; started again in the same folder it continues where it was.

The same configuration gives the same losses bit for bit, interrupted or not: the order of records, the augmentation
and the random numbers depend on the seed and the step alone, and a checkpoint holds the state, the data position and
the timer together.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from contextlib import ExitStack, closing, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np
from jax.experimental import multihost_utils

from gim_jax import __version__
from gim_jax.config import config_hash, replace
from gim_jax.data.pipeline import Batches
from gim_jax.data.tfrecord import write_atomic
from gim_jax.models import get_model, in_dtype, without_how
from gim_jax.train import sharding
from gim_jax.train.checkpoints import Checkpoints, StopSignal
from gim_jax.train.compiled import PEAKS, count_flops
from gim_jax.train.kinds import Settings
from gim_jax.train.state import shardings_of
from gim_jax.train.step import build_step, make_eval_step
from gim_jax.train.watch import SCORE, Watch
from gim_jax.train.writers import Writers, require_wandb
from gim_jax.weights import store

WEIGHTS, BEST = "weights.safetensors", "best.safetensors"
FREE = (
    "log_every",
    "checkpoint_every",
    "keep_checkpoints",
    "profile_steps",
    "mesh",
    "data.records",
    "eval.records",
    "eval.pairs",
    "eval.num_pictures",
    "wandb",
    "data.num_",
)
# prefixes of settings that change no loss: a run may continue with other values

Progress = Callable[[int, int, dict[str, float]], None]


def train(config: Any, workdir: str | Path, progress: Progress | None = None) -> dict[str, Any]:
    """Train the model `config.model.name` of an `ml_collections.ConfigDict`; see `run`."""
    module, objective, meta = build(config)
    watch = Watch(config.eval, meta) if config.eval_every else None
    return run(config, workdir, module, objective, meta, progress, watch)


def build(config: Any) -> tuple[Any, Callable, dict[str, Any]]:
    """Make the network and its objective, and what a weights file says of the network."""
    from gim_jax.train.objectives import OBJECTIVES

    info = get_model(config.model.name)
    if info.family not in OBJECTIVES:
        raise ValueError(f"model.name: {info.name} cannot be trained; families that can: {', '.join(OBJECTIVES)}")
    fields = {name: value for name, value in config.model.to_dict().items() if name != "name"}
    model_config = replace(info.config, fields, "config.model")
    model_config = in_dtype(model_config, model_config.dtype)
    meta = {"model": info.family, "name": info.name, "config": without_how(dataclasses.asdict(model_config))}
    channels = getattr(model_config, "in_channels", info.channels)
    if config.data.channels != channels:
        raise ValueError(f"data.channels: found {config.data.channels}, expected {channels} for {info.name}")
    if getattr(model_config, "match_type", "dual_softmax") != "dual_softmax":
        raise ValueError(f"model.match_type: found {model_config.match_type!r}, expected 'dual_softmax' for training")
    settings = replace(Settings(), config.objective.to_dict(), "config.objective")
    objective = functools.partial(OBJECTIVES[info.family], settings=settings)
    return info.network(model_config), objective, meta


def run(
    config: Any,
    workdir: str | Path,
    module: Any,
    objective: Callable,
    meta: dict[str, Any],
    progress: Progress | None = None,
    watch: Callable[..., tuple[dict[str, float], dict[str, np.ndarray]]] | None = None,
) -> dict[str, Any]:
    """Train a module on an objective for `config.num_steps` steps.

    Args:
      config: seed, num_steps, batch_size (global), log_every, checkpoint_every, keep_checkpoints, eval_every
        (0 = never), init_weights ("" = from scratch), data (see `Batches`), eval (records, split, num_batches, and
        see `Watch`), optim (see `make_optimizer`), mesh (fsdp, fsdp_min_size), wandb.
      workdir: gets `config.json`, `metrics.jsonl`, `tensorboard/`, `checkpoints/` and, at the end, the weights
        `weights.safetensors`; with `eval.pairs` also `best.safetensors`, the best on this list, with `profile_steps`
        `profile/` (TensorBoard's profiler), and where the loss is not finite the batch that made it so,
        `bad_batch_<step>.npz`.
      module, objective: the network and its row of OBJECTIVES.
      meta: what the weights file says of the model.
      progress: called with (steps taken, steps in all, metrics) after every step.
      watch: see `Watch`; called on the first host at every evaluation.

    Metrics are those of the step (`make_train_step`), pairs_per_s, tflops_per_device (of the traced step, what is
    computed again for the gradient included) and, of devices whose peak is known, mfu, its share of the bfloat16 peak.

    Returns: the last value of every metric, `step`, `elapsed_s` over all runs, `num_params`, `weights` (path),
      `incidents` (records that this host left out, by reason; of the first host over all runs) and `seconds` of this
      run by phase.

    Raises:
      ValueError: a wrong setting, unusable records, a folder with another experiment, or a loss that is not finite.
      KeyboardInterrupt: after SIGTERM or Ctrl-C, once the state is saved.
    """
    workdir = Path(workdir)
    workdir.mkdir(parents=True, exist_ok=True)
    _check_ranges(config)
    parts = config.optim.accumulate
    if parts < 1 or config.batch_size % (jax.device_count() * parts):
        expected = f"a multiple of {jax.device_count()} devices" + (f" x accumulate {parts}" if parts != 1 else "")
        raise ValueError(f"batch_size: found {config.batch_size}, expected {expected}")

    require_wandb(config.wandb)

    # ---- What is trained, on what ----
    mesh = sharding.make_mesh(config.mesh.fsdp)
    hosts = (jax.process_index(), jax.process_count())
    batches = Batches(config.data, config.seed, config.batch_size, *hosts)
    validation = None
    if config.eval_every:
        if not (config.eval.records or config.eval.pairs):
            raise ValueError("eval.records, eval.pairs: found '', expected records or a list, or eval_every=0")
    if config.eval_every and config.eval.records:
        data = config.data.to_dict() | {"records": config.eval.records, "split": config.eval.split, "weights": ()}
        data["augment"] = data["augment"] | {"enabled": False}
        validation = Batches(ml_collections.ConfigDict(data), config.seed, config.batch_size, *hosts)
    init, abstract, train_step = build_step(config, module, objective, mesh)
    peak = PEAKS.get(jax.devices()[0].device_kind)
    eval_step = make_eval_step(objective, module, config.seed, mesh, abstract)
    _claim(config, workdir)

    seconds: dict[str, float] = defaultdict(float)
    with (
        Checkpoints(workdir / "checkpoints", config.keep_checkpoints) as checkpoints,
        StopSignal() as stop,
        closing(batches),
        closing(validation) if validation else nullcontext(),
    ):
        # ---- Start or continue ----
        with _timed(seconds, "start"):
            start, extra = checkpoints.latest or 0, dict[str, Any](elapsed_s=0.0)
            if checkpoints.latest is None:
                state = jax.jit(init, out_shardings=shardings_of(abstract))(jax.random.key(config.seed))
                if config.init_weights:
                    state, extra["init_weights_sha256"] = _load_weights(state, abstract, config.init_weights)
            else:
                state, extra = checkpoints.restore(start, abstract)
                batches.set_state(extra["data"])
        first_host = jax.process_index() == 0
        before: Counter[str] = Counter()

        def incidents() -> Counter[str]:
            """Count what was left out so far, by reason."""
            seen = Counter(batches.incidents)  # copied at once: threads count on
            of_validation = dict(validation.incidents) if validation else {}
            return before + seen + Counter({f"validation: {why}": count for why, count in of_validation.items()})

        if first_host:
            before = Counter(extra.get("incidents", {})) - incidents()  # what opening the files finds it finds again
        num_params = sum(math.prod(p.shape) for p in jax.tree.leaves(abstract.params))
        began = time.monotonic() - extra["elapsed_s"]

        def about(**values: Any) -> dict[str, Any]:
            """Say what the weights are and of what they were made."""
            made = {"config_hash": config_hash(config), "code_version": __version__, "data": batches.made_of}
            return meta | made | {"init_weights_sha256": extra.get("init_weights_sha256")} | values

        tflop = 0.0
        profile_from, profile_to = config.profile_steps or (None, None)
        pairs = config.eval.pairs if config.eval_every else ""
        pairs_sha256 = hashlib.sha256(Path(pairs).read_bytes()).hexdigest() if pairs else None
        settings = json.loads(json.dumps(config.to_dict(), default=str))
        with (
            Writers(workdir, start, config.wandb, settings) if first_host else _NoWriters() as writers,
            ExitStack() as profiler,
        ):
            best = _best_score(workdir / BEST, start, pairs_sha256) if first_host else -1.0
            # A run that stopped at an evaluation, or ended before one, has none of this step.
            evaluated = any(line["step"] == start and any(map(_is_eval, line)) for line in writers.lines)
            evaluated = bool(multihost_utils.broadcast_one_to_all(np.int32(evaluated)))
            pending = None  # metrics of the last step: read when the next one is under way
            counted = (start, time.monotonic())

            def flush() -> None:
                nonlocal pending, counted
                if pending is None:
                    return
                step, metrics, batch = pending
                pending = None
                with _timed(seconds, "first step" if step == start + 1 else "steps"):
                    values = {name: float(value) for name, value in jax.device_get(metrics).items()}
                now = time.monotonic()
                rate = (step - counted[0]) / max(now - counted[1], 1e-9)
                values |= {"pairs_per_s": config.batch_size * rate, "tflops_per_device": tflop * rate}
                if peak:
                    values["mfu"] = tflop * rate / peak
                counted = (step, now)
                finite = math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"])
                if step % config.log_every == 0 or step == config.num_steps or not finite:
                    writers.write(step, values)
                if not finite:
                    saved = _save_batch(workdir / f"bad_batch_{step}.npz", batch)
                    kept = f"step {checkpoints.latest}" if checkpoints.latest is not None else "none"
                    raise ValueError(
                        f"step {step}: loss {values['loss']}, gradient norm {values['grad_norm']}: not finite; "
                        f"last checkpoint: {kept}; lower optim.lr or look at the data{saved}"
                    )
                if progress:
                    progress(step, config.num_steps, values)

            # ---- The loop: evaluate, save, then the next batch and step, then the metrics of the step before ----
            for step in range(start, config.num_steps + 1):
                last = step == config.num_steps
                stopping = stop.reached(step)
                saving = step > start and (step % config.checkpoint_every == 0 or last or stopping)
                evaluating = config.eval_every and (last or (step % config.eval_every == 0 and not stopping))
                evaluating = evaluating and not (step == start and evaluated)
                if saving or evaluating:
                    flush()
                if evaluating:
                    with _timed(seconds, "evaluate"):
                        scalars, rows = {}, None
                        if validation:
                            scalars, rows = _evaluate(eval_step, state, validation, config.eval.num_batches, mesh)
                        if watch:
                            variables = sharding.to_host(state.variables(averaged=True))
                        if watch and first_host:
                            seen, pictures = watch(variables, rows)
                            scalars |= seen
                            writers.draw(step, pictures)
                            if SCORE in scalars and scalars[SCORE] >= best:  # of equal ones the latest
                                best = scalars[SCORE]
                                made = about(steps=step, score=best, pairs_sha256=pairs_sha256)
                                store.save(workdir / BEST, variables, made)
                        writers.write(step, scalars)
                if saving:
                    with _timed(seconds, "save"):
                        extra |= {"data": batches.get_state(), "elapsed_s": time.monotonic() - began}
                        extra["incidents"] = incidents()
                        checkpoints.save(step, state, extra)
                if stopping and not last:
                    raise KeyboardInterrupt
                if last:
                    break
                if step == profile_from:
                    jax.profiler.start_trace(str(workdir / "profile"))
                    profiler.callback(jax.profiler.stop_trace)  # also where the run ends before
                with _timed(seconds, "data"):
                    batch = sharding.put_batch(mesh, next(batches))
                with _timed(seconds, "compile" if step == start else "steps"):
                    if step == start:  # the trace is the one that is compiled
                        tflop = count_flops(train_step.trace(state, batch).jaxpr.jaxpr) / mesh.size / 1e12
                    state, metrics = train_step(state, batch)
                flush()
                pending = (step + 1, metrics, batch)
                if step + 1 == profile_to:
                    flush()
                    profiler.close()

        variables = sharding.to_host(state.variables(averaged=True))
        if first_host:
            store.save(workdir / WEIGHTS, variables, about(steps=config.num_steps))
        return writers.latest | {
            "step": config.num_steps,
            "elapsed_s": time.monotonic() - began,
            "num_params": num_params,
            "weights": str(workdir / WEIGHTS),
            "incidents": dict(incidents()),
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }


def _check_ranges(config: Any) -> None:
    """Raise ValueError for a number that is out of its range."""
    values = _flat(config.to_dict())
    for name, value in values.items():
        if isinstance(value, float) and math.isnan(value):
            raise ValueError(f"{name}: found nan, expected a number")
    least = dict.fromkeys(("num_steps", "batch_size", "log_every", "checkpoint_every", "keep_checkpoints"), 1)
    least |= {"eval_every": 0, "eval.num_batches": 1, "eval.num_pictures": 0}
    for name, lowest in least.items():
        if values[name] < lowest:
            raise ValueError(f"{name}: found {values[name]}, expected {lowest} or more")
    steps = tuple(config.profile_steps)
    if steps and (len(steps) != 2 or not 0 <= steps[0] < steps[1]):
        raise ValueError(f"profile_steps: found {steps}, expected none or two of them, ascending from 0")


def _best_score(path: Path, start: int, pairs_sha256: str | None) -> float:
    """Read the score of the best weights so far, -1 where there are none, or on another list or of undone steps."""
    meta = store.load(path)[1] if path.exists() else {}
    counts = meta.get("steps", start + 1) <= start and meta.get("pairs_sha256", pairs_sha256) == pairs_sha256
    return meta.get("score", -1.0) if counts else -1.0


def _is_eval(name: str) -> bool:
    return name.startswith("eval/")


class _NoWriters:
    """Stand in for the writers on all hosts but the first."""

    latest: dict[str, Any] = {}  # noqa: RUF012
    lines = ()

    def write(self, step: int, scalars: dict[str, float]) -> None:
        pass

    def __enter__(self) -> _NoWriters:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@contextmanager
def _timed(seconds: dict[str, float], phase: str):
    began = time.monotonic()
    yield
    seconds[phase] += time.monotonic() - began


def _save_batch(path: Path, batch: dict[str, jax.Array]) -> str:
    """Write this host's rows of the batch that made the loss not finite; say where."""
    rows: dict[str, Any] = {
        name: np.concatenate([np.asarray(shard.data) for shard in array.addressable_shards])
        for name, array in batch.items()
    }
    if jax.process_count() > 1:
        path = path.with_stem(f"{path.stem}_host{jax.process_index()}")
    write_atomic(path, lambda file: np.savez(file, **rows))
    return f" of the batch in {path}"


def _evaluate(eval_step: Callable, state: Any, validation: Batches, num_batches: int, mesh: Any) -> tuple[dict, dict]:
    """Average the objective's metrics over the first batches of the validation data, always the same ones.

    Returns: {name: scalar}, and this host's rows of the last batch.
    """
    validation.set_state(validation.get_state() | {"global_next_index": 0})
    results, rows = [], {}
    for index in range(num_batches):
        rows = next(validation)
        results.append(jax.device_get(eval_step(state, sharding.put_batch(mesh, rows), np.int32(index))))
    return {f"eval/{name}": float(np.mean([r[name] for r in results])) for name in results[0]}, rows


def _load_weights(state: Any, abstract: Any, path: str) -> tuple[Any, str]:
    """Replace the variables of a fresh state by those of a weights file; return its sha256, too."""
    variables, _, sha256 = store.read(path)
    store.check(variables, abstract.variables(), path)
    put = lambda arrays, like: jax.tree.map(lambda a, l: jax.device_put(a, l.sharding), arrays, like)  # noqa: E731
    params = put(variables["params"], abstract.params)
    ema = put(variables["params"], abstract.params) if abstract.ema is not None else None
    stats = put(variables.get("batch_stats", {}), abstract.batch_stats)
    return state.replace(params=params, batch_stats=stats, ema=ema), sha256


def _claim(config: Any, workdir: Path) -> None:
    """Write `config.json` into a new folder; in a used one, refuse a configuration that would change the losses."""
    path = workdir / "config.json"
    ours = json.loads(json.dumps(config.to_dict(), default=str))
    if path.exists():
        try:
            theirs = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error}); expected the configuration of a run") from error
        flat_ours, flat_theirs = _flat(ours), _flat(theirs)
        for name in sorted(flat_ours.keys() | flat_theirs.keys()):
            found, expected = flat_ours.get(name, "nothing"), flat_theirs.get(name, "nothing")
            if found != expected and not name.startswith(FREE):
                raise ValueError(
                    f"{workdir}: holds another experiment: {name}: found {found}, expected {expected};"
                    " give another --workdir"
                )
    if jax.process_index() == 0:
        text = json.dumps(ours, indent=1, sort_keys=True)
        write_atomic(path, lambda file: file.write(text.encode()))


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts to dotted names."""
    flat = {}
    for name, value in tree.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = value
    return flat
