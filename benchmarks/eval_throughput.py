"""Pairs per second of `gim-jax eval --benchmark=zeb` with a full-size network: matching and poses side by side.

The weights come from a rule (`weights_rule.py` of the golden folder), so the AUC means nothing; shapes, times and
memory are those of the real network. The first run compiles; the second one, in a new folder, is the figure. Matching
and poses are timed by themselves: the whole has to take little more than the longer of the two.

    python benchmarks/eval_throughput.py [--model loftr_outdoor] [--pairs 4] [--sets ICL] [--workers 1] [--json FILE]
"""

import argparse
import importlib.util
import json
import os
import resource
import tempfile
import time
from pathlib import Path

from evaluation import SHARED, SOURCES, arrange

from gim_jax import api
from gim_jax.cli.models import format_table
from gim_jax.eval import benchmarks
from gim_jax.eval.document import versions
from gim_jax.models import get_model
from gim_jax.weights import store
from gim_jax.weights.convert import from_torch

GOLDEN = Path(os.environ.get("GIM_JAX_GOLDEN", SHARED / "golden"))
KEYS = {"loftr_outdoor": "loftr", "gim_loftr": "gim_loftr", "gim_dkm": "gim_dkm", "dkm_outdoor": "dkm"}


def rule_weights(model: str, path: Path) -> None:
    """Write the weights of a model that the rule makes from its official keys."""
    spec = importlib.util.spec_from_file_location("weights_rule", GOLDEN / "weights_rule.py")
    assert spec is not None and spec.loader is not None
    rule = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(rule)
    listing = json.loads((GOLDEN / "keys" / f"{KEYS[model]}.json").read_text())
    state = rule.state_dict(listing["model"], listing["entries"], listing["salt"])
    info = get_model(model)
    state = {key: value for key, value in state.items() if key != "coarse_matching.bin_score"}
    store.save(path, from_torch(state, info.template()), {"model": info.family, "name": model, "config": {}})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="loftr_outdoor", choices=list(KEYS))
    parser.add_argument("--pairs", type=int, default=4, help="of each set")
    parser.add_argument("--sets", nargs="+", default=["ICL"], choices=list(SOURCES))
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json")
    args = parser.parse_args()
    if not (SHARED / "data").is_dir():
        raise SystemExit(f"no folder of real pairs at {SHARED / 'data'} (set GIM_JAX_SHARED)")
    load = os.getloadavg()[0]
    api.enable_compilation_cache()
    rows, seconds = [("run", "pairs", "wall s", "pairs/s", "matching s", "poses s")], {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in args.sets:
            arrange(SHARED / "data" / SOURCES[name], root / "zeb", name, args.pairs)
        rule_weights(args.model, root / "weights.safetensors")
        plan = benchmarks.zeb_plan(root / "zeb", args.model, args.sets)
        api_matcher = benchmarks.matchers(args.model, root / "weights.safetensors", args.batch_size, plan.matcher, 1)[
            0
        ]()
        benchmarks.matchers = lambda *_: [lambda: api_matcher]  # the same compiled program in both runs
        for run in ("with compilation", "compiled"):
            begin = time.perf_counter()
            _, done = benchmarks.evaluate(
                plan,
                args.model,
                root / "weights.safetensors",
                folder=root / run,
                batch_size=args.batch_size,
                num_workers=args.workers,
            )
            wall = time.perf_counter() - begin
            num = len(plan.pairs)
            rows.append(
                (run, str(num), f"{wall:.1f}", f"{num / wall:.3f}", f"{done.match_s:.1f}", f"{done.measure_s:.1f}")
            )
            seconds[run] = {"wall": wall, "match": done.match_s, "measure": done.measure_s, "pairs": num}
    size = get_model(args.model).num_params
    print(f"{args.model}, {size:,} parameters, {', '.join(args.sets)}, batch {args.batch_size}")
    print(format_table(rows))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory {peak:.1f} GiB; {os.cpu_count()} cores, load before {load:.1f}, {args.workers} pose processes")
    print(", ".join(f"{k} {v}" for k, v in versions().items()))
    if args.json:
        Path(args.json).write_text(json.dumps({"seconds": seconds, "versions": versions(), "peak_GiB": peak}, indent=1))


if __name__ == "__main__":
    main()
