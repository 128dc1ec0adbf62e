"""What accelerators need: full-size networks in static shapes that lower for every platform, and bfloat16 with islands
of float32."""

import dataclasses
from collections import Counter

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from jax.extend.core import ClosedJaxpr, Jaxpr
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from gim_jax import export
from gim_jax.models import FAMILIES, MODELS, in_dtype
from gim_jax.models.disk import DiskConfig
from gim_jax.models.superpoint import CONFIGS, SuperPoint, SuperPointConfig
from tests.networks import random_variables

ZEB = (1600, 1216)  # 1600x1200 in its bucket
SUPERPOINT, SUPERGLUE, LIGHTGLUE, LOFTR, DKM = 1_300_865, 12_023_297, 11_851_601, 11_561_456, 70_212_090
FULL = {  # published size px, matches, parameters as counted in the official code, by part
    "superglue_outdoor": (ZEB, 2048, {"extractor": SUPERPOINT, "matcher": SUPERGLUE}),
    "gim_lightglue": (ZEB, 2048, {"extractor": SUPERPOINT, "matcher": LIGHTGLUE}),
    "lightglue_disk": ((1024, 768), 2048, {"extractor": 1_092_369, "matcher": LIGHTGLUE + 128 * 256 + 256}),
    "loftr_outdoor": (
        (896, 896),
        4096,
        {"backbone": 5_915_888, "loftr_coarse": 5_251_072, "fine_preprocess": 65_792, "loftr_fine": 328_704},
    ),
    "loftr_outdoor_ot": (
        (896, 896),
        4096,
        {
            "backbone": 5_915_888,
            "loftr_coarse": 5_251_072,
            "coarse_matching": 1,
            "fine_preprocess": 65_792,
            "loftr_fine": 328_704,
        },
    ),
    "gim_loftr": ((896, 896), 4096, {"backbone": 10_600_536, "loftr_coarse": 5_251_072, "loftr_fine": 328_704}),
    "dkm_outdoor": (ZEB, 5000, {"encoder": 23_508_032, "decoder": 46_704_058}),
    "gim_dkm": (ZEB, 5000, {"encoder": 23_508_032, "decoder": 46_704_058}),
}
TINY_SUPERPOINT = SuperPointConfig(64, border_of="image")
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiling, not running
SMALL = {  # changes that make a network of every family small; the matchers take all pairs
    "loftr_tiny": {"thr": 0.0, "border_rm": 0, "coarse_layers": ("self", "cross")},
    "loftr_outdoor_ot": {
        "initial_dim": 16,
        "block_dims": (16, 24, 32),
        "num_heads": 2,
        "coarse_layers": ("self", "cross"),
        "thr": 0.0,
    },
    "dkm_tiny": {"size": (64, 64), "num_matches": 64, "num_hidden": 1},
    "superglue_outdoor": {"extractor": TINY_SUPERPOINT, "num_layers": 2, "threshold": -1.0},
    "superglue_open": {
        "extractor": dataclasses.replace(TINY_SUPERPOINT, open=True, sampling="exact"),
        "num_layers": 2,
        "threshold": -1.0,
    },
    "gim_lightglue": {"extractor": TINY_SUPERPOINT, "num_layers": 2, "threshold": -1.0},
    "lightglue_disk": {"extractor": DiskConfig(64), "num_layers": 1, "threshold": -1.0},
}
FLOAT32_ONLY = {  # softmax, Sinkhorn, Gaussian process, choices among scores, places
    "exp", "log", "log1p", "cholesky", "triangular_solve", "argmax", "top_k", "sort", "sin", "cos", "floor", "round",
}  # fmt: skip


def count(tree) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))


def small(name, dtype="bfloat16"):
    """The program of a small network, its configuration and its arguments for one pair of 128x64."""
    info = MODELS[name]
    config = in_dtype(dataclasses.replace(info.config, **SMALL[name]), dtype)
    return info, config, export.program(info, config), export.abstract_inputs(info, info.template(config), (128, 64))


def equations(jaxpr):
    """All equations of a jaxpr, those in loops and calls too."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(equation.params, is_leaf=lambda v: isinstance(v, Jaxpr | ClosedJaxpr)):
            if isinstance(value, Jaxpr | ClosedJaxpr):
                yield from equations(getattr(value, "jaxpr", value))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow if "dkm" in n else ()) for n in FULL])
def test_full_size_has_the_published_parameters_and_lowers_for_every_platform(name):
    size, num_matches, parts = FULL[name]
    info = MODELS[name]
    config = in_dtype(info.config, "bfloat16")
    template = info.template(config)
    assert {part: count(tree) for part, tree in template["params"].items()} == parts
    assert sum(parts.values()) == info.num_params
    inputs = export.abstract_inputs(info, template, size)
    run = jax.jit(export.program(info, config))
    out = jax.eval_shape(run, *inputs)
    assert {key: (value.shape, str(value.dtype)) for key, value in out.items()} == {
        "kpts0": ((1, num_matches, 2), "float32"),
        "kpts1": ((1, num_matches, 2), "float32"),
        "conf": ((1, num_matches), "float32"),
        "mask": ((1, num_matches), "bool"),
    }
    exported = jax.export.export(run, platforms=("cpu", "cuda", "tpu"))(*inputs)
    assert exported.platforms == ("cpu", "cuda", "tpu")


def test_full_size_superpoint():
    module = SuperPoint(dataclasses.replace(CONFIGS["gim_superpoint"], dtype="bfloat16"))
    image = jax.ShapeDtypeStruct((1, ZEB[1], ZEB[0], 1), np.float32)
    variables = jax.eval_shape(module.init, jax.random.key(0), image)
    assert count(variables["params"]) == SUPERPOINT
    out = jax.eval_shape(module.apply, variables, image)
    assert out["kpts"].shape == (1, 2048, 2) and out["desc"].shape == (1, 2048, 256)
    assert {value.dtype for key, value in out.items() if key != "mask"} == {np.dtype("float32")}


@pytest.mark.parametrize("name", SMALL)
def test_bfloat16_leaves_scores_and_geometry_in_float32(name):
    _, _, run, inputs = small(name)
    convolutions, wrong = Counter(), []
    for equation in equations(jax.make_jaxpr(run)(*inputs).jaxpr):
        kind, operands = equation.primitive.name, [v.aval for v in equation.invars if hasattr(v.aval, "dtype")]
        if kind == "conv_general_dilated" and operands[1].shape[0] > 1:
            convolutions[str(operands[0].dtype)] += 1
        if kind in FLOAT32_ONLY and any(v.dtype == jnp.bfloat16 for v in operands):
            wrong.append(equation)
        # the default precision of accelerators rounds operands to 8 bits: a place in a wide image to 4 px
        narrow = kind == "dot_general" and min(v.shape[-1] if v.shape else 1 for v in operands) <= 3
        if narrow and operands[0].dtype == operands[1].dtype == jnp.float32:
            if equation.params["precision"] != (jax.lax.Precision.HIGHEST,) * 2:
                wrong.append(equation)
    assert not wrong, "\n".join(f"{e.primitive} {[v.aval for v in e.invars]}" for e in wrong)
    assert convolutions["bfloat16"] > 5 and not convolutions["float32"]


def random_weights(info, config):
    """Random weights as the artefact takes them."""
    image, size = np.zeros((1, 64, 64, info.channels), np.float32), np.array([[64, 64]], np.int32)
    sizes = [size, size] if FAMILIES[info.family][2] else []
    leaves = jax.tree_util.tree_flatten_with_path(random_variables(info.network(config), image, image, *sizes))[0]
    return {"/".join(part.key for part in path): leaf for path, leaf in leaves}


@pytest.mark.parametrize("name", [name for name in SMALL if name not in ("loftr_outdoor_ot", "superglue_open")])
def test_bfloat16_is_finite_and_inside_the_images(name):
    info, config, run, inputs = small(name)
    images = np.random.default_rng(0).integers(0, 255, (2, 1, 64, 128, info.channels), dtype=np.uint8)
    images = images.astype(inputs[1].dtype)
    sizes = np.array([[128, 64]], np.int32), np.array([[96, 64]], np.int32)
    inputs = random_weights(info, config), *images, *sizes
    out = jax.jit(run).lower(*inputs).compile(QUICK)(*inputs)
    assert out["kpts0"].dtype == out["kpts1"].dtype == out["conf"].dtype == jnp.float32
    assert out["mask"].any() and all(np.isfinite(value).all() for value in out.values())
    for key, (size,) in zip(("kpts0", "kpts1"), sizes):
        found = np.asarray(out[key])[np.asarray(out["mask"])]
        assert (found > -8).all() and (found < size + 8).all()


def test_pairs_of_a_batch_lie_on_as_many_devices():
    """Every device matches its own pairs and hears nothing of the others."""
    info, config, run, _ = small("loftr_tiny", "float32")
    mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
    all_same, split = PartitionSpec(), PartitionSpec("data")
    images = np.random.default_rng(0).integers(0, 255, (2, 8, 64, 64, 1), dtype=np.uint8)
    batch = *images, *[np.full((8, 2), 64, np.int32)] * 2
    weights = jax.device_put(random_weights(info, config), NamedSharding(mesh, all_same))
    spread = jax.shard_map(run, mesh=mesh, in_specs=(all_same, *[split] * 4), out_specs=split, check_vma=False)
    compiled = jax.jit(spread).lower(weights, *batch).compile(QUICK)
    words = "all-gather", "all-reduce", "all-to-all", "collective-permute"
    assert not any(word in compiled.as_text() for word in words)

    def call(*arrays):
        return compiled(weights, *(jax.device_put(value, NamedSharding(mesh, split)) for value in arrays))

    out, turned = call(*batch), call(*(np.roll(value, 1, axis=0) for value in batch))
    assert out["kpts1"].sharding.spec == split and out["mask"].sum() > 50
    assert (np.asarray(out["kpts1"][0]) != np.asarray(out["kpts1"][1])).any()
    for key, value in turned.items():
        np.testing.assert_array_equal(np.roll(out[key], 1, axis=0), value, err_msg=key)
