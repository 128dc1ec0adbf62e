"""Time, memory and parity of every network against the PyTorch implementation that equals the official code.

Both get the same inputs and the same weights, made by a rule from each parameter's official name, so that nothing is
downloaded; both have two threads and float32; each runs in a process of its own and repetitions take turns, so that
other load hits both. Peak memory is the resident set of the whole process, our compilation included.

Run:
    pip install -e ".[bench]" && pip install --no-deps vismatch==1.4.0
    python benchmarks/inference.py [--repetitions 5] [CASE ...]

The peers: transformers (SuperPoint, SuperGlue), kornia (LightGlue, LoFTR, DISK; GIM's LoFTR with torchvision's
ResNet-50 in it), vismatch (DKM, GIM's own code). Without them our own figures are printed, and what is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import platform
import re
import statistics
import sys
import tempfile
import time
import warnings
import zlib
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from side_by_side import THREADS, compare

WIDTH, HEIGHT = 640, 480
LOFTR = (  # features that tell cells apart, so that thousands match as in a real pair
    (r"^loftr_coarse\.layers\.7\.norm2\.weight$", 6.0, 0.0),
    (r"^loftr_coarse\.layers\.\d\.norm2\.weight$", 0.5, 0.0),
    (r"^backbone\.layer3_outconv\.weight$", 4.0, 0.0),
    (r"^backbone\.conv1\.weight$", 3.0, 0.0),
    (r"^backbone\.layer\d\.\d\.bn2\.weight$", 1.5, 0.0),
    (r"^backbone\.layer\d\.\d\.bn2\.bias$", 1.0, -0.5),
    (r"^backbone\.encode\.conv1\.weight$", 5.0, 0.0),
    (r"^backbone\.encode\.layer\d\.\d\.bn3\.weight$", 1.5, 0.0),
    (r"^backbone\.encode\.layer\d\.\d\.bn3\.bias$", 1.0, -0.3),
)
CHANGES = {  # (pattern of official names, factor and shift of the rule's value); the first that is found counts
    "superpoint": ((r"^convPb\.weight$", 3.0, 0.0), (r"^conv(\d[ab]|Pa|Da)\.weight$", 2**0.5, 0.0)),
    "superglue": (
        (r"\.mlp\.3\.(weight|bias)$", 0.05, 0.0),
        (r"^kenc\.encoder\.12\.(weight|bias)$", 0.1, 0.0),
        (r"^final_proj\.weight$", 40.0, 0.0),
    ),
    "lightglue": ((r"\.ffn\.3\.(weight|bias)$", 0.05, 0.0), (r"\.final_proj\.weight$", 30.0, 0.0)),
    "loftr_outdoor": LOFTR,
    "gim_loftr": LOFTR,
    "dkm": ((r"terminal_module|out_conv", 0.1, 0.0),),  # the warp stays inside the images
    "disk": ((r"\d\.weight$", 1.4, 0.0),),
}


def weight(network: str, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """Make one parameter from its official name: a torch layout, float32."""
    rng = np.random.default_rng(zlib.crc32(key.encode()))
    value = rng.standard_normal(shape, np.float32)
    if key.endswith("running_var"):
        value = 1 + 0.2 * np.abs(value)
    elif key.endswith(("running_mean", "bias")):
        value *= 0.1
    elif len(shape) > 1:
        value *= np.float32(np.prod(shape[1:]) ** -0.5)
    else:
        value = 1 + 0.1 * value
    factor, shift = next(((f, s) for pattern, f, s in CHANGES[network] if re.search(pattern, key)), (1.0, 0.0))
    return np.asarray(value * factor + shift, np.float32)


def images(channels: int) -> tuple[np.ndarray, np.ndarray]:
    """Two crops of one texture, 24 px right and 16 px down of each other: [1, H, W, channels] in [0.1, 1]."""
    rng = np.random.default_rng(0)
    scene = np.zeros((HEIGHT + 16, WIDTH + 24, channels), np.float32)
    for cell in (4, 16, 64):  # blobs of several sizes
        coarse = rng.uniform(-1, 1, (scene.shape[0] // cell + 2, scene.shape[1] // cell + 2, channels))
        scene += np.kron(coarse, np.ones((cell, cell, 1)))[: scene.shape[0], : scene.shape[1]].astype(np.float32)
    scene = 0.1 + 0.9 * (scene - scene.min()) / (scene.max() - scene.min())
    return scene[None, :HEIGHT, :WIDTH], np.ascontiguousarray(scene[None, 16:, 24:])


def keypoints(count: int, dim: int = 256) -> list[dict]:
    """Two sets of features, the same ones seen twice in another order."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((count, dim))
    kpts = rng.uniform((8, 8), (WIDTH - 8, HEIGHT - 8), (count, 2))
    sets = []
    for order in (np.arange(count), rng.permutation(count)):
        desc = base[order] + 0.3 * rng.standard_normal((count, dim))
        sets.append(
            {
                "kpts": kpts[order][None].astype(np.float32),
                "scores": rng.random((1, count), np.float32),
                "desc": (desc / np.linalg.norm(desc, axis=-1, keepdims=True))[None].astype(np.float32),
            }
        )
    return sets


# ---- what is compared: a dict of "id" [N] int (what the rows are) and arrays [N, ...]


def detections(kpts, scores, desc) -> dict:
    kpts = np.rint(np.asarray(kpts)).astype(int)
    return {"id": kpts[:, 1] * WIDTH + kpts[:, 0], "scores": np.asarray(scores), "desc": np.asarray(desc)}


def index_matches(matches0, scores0) -> dict:
    matches0, scores0 = np.asarray(matches0), np.asarray(scores0)
    row = np.flatnonzero(matches0 >= 0)
    return {"id": row * 10**6 + matches0[row], "conf": scores0[row]}


def point_matches(kpts0, kpts1, conf) -> dict:
    kpts0 = np.asarray(kpts0)
    return {
        "id": (kpts0[:, 1] * WIDTH + kpts0[:, 0]).astype(int),
        "kpts1_px": np.asarray(kpts1),
        "conf": np.asarray(conf),
    }


def dense(warp, certainty) -> dict:
    warp, certainty = np.asarray(warp).reshape(-1, 4), np.asarray(certainty).ravel()
    return {"id": np.arange(len(certainty)), "warp": warp, "certainty": certainty}


# ---- ours


def ours(network: str, count: int, cache: str):
    """Compile our network, or load it from the folder `cache`; see `side_by_side.compare`."""
    import jax
    import jaxlib
    from flax import traverse_util

    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    from gim_jax.models import disk, dkm, lightglue, loftr, superglue, superpoint
    from gim_jax.weights.convert import flax_layout, torch_key

    size = np.array([[WIDTH, HEIGHT]], np.int32)
    if network in ("superpoint", "disk"):
        module = (
            superpoint.SuperPoint(superpoint.SuperPointConfig(count))
            if network == "superpoint"
            else disk.Disk(disk.DiskConfig(count))
        )
        args, apply = (images(3 if network == "disk" else 1)[0],), module.apply

        def outputs(out):
            mask = np.asarray(out["mask"][0])
            return detections(*(np.asarray(out[k][0])[mask] for k in ("kpts", "scores", "desc")))
    elif network in ("superglue", "lightglue"):
        module = (
            superglue.SuperGlueMatcher(superglue.SuperGlueConfig())
            if network == "superglue"
            else lightglue.LightGlueMatcher(lightglue.LightGlueConfig())
        )
        args, apply = (*({**f, "mask": None} for f in keypoints(count)), size, size), module.apply

        def outputs(out):
            return index_matches(out["matches0"][0], out["scores0"][0])
    elif network == "dkm":
        module = dkm.DKM(dkm.DKMConfig(size=(512, 384), upsample_size=None))
        args = images(3)
        apply = lambda variables, a, b: dkm.dense_match(module, variables, a, b)  # noqa: E731

        def outputs(out):
            return dense(*out)
    else:
        module = loftr.LoFTR(replace(loftr.CONFIGS[network], thr=0.0))
        args, apply = images(module.config.in_channels), module.apply

        def outputs(out):
            mask = np.asarray(out["mask"][0])
            return point_matches(*(np.asarray(out[k][0])[mask] for k in ("kpts0", "kpts1", "conf")))

    shapes = traverse_util.flatten_dict(jax.eval_shape(module.init, jax.random.key(0), *args))

    def parameter(path, leaf):
        kernel = path[-1] == "kernel"
        shape = (*leaf.shape[:-3:-1], *leaf.shape[:-2]) if kernel else leaf.shape
        return jax.device_put(flax_layout(weight(network, torch_key(path[1:]), shape), path[-1], leaf.ndim))

    variables = traverse_util.unflatten_dict({path: parameter(path, leaf) for path, leaf in shapes.items()})
    args = jax.device_put(args)
    start = time.perf_counter()
    compiled = jax.jit(apply).lower(variables, *args).compile()
    info = {
        "compile_s": time.perf_counter() - start,
        "temp_mb": compiled.memory_analysis().temp_size_in_bytes / 2**20,
        "version": f"jax {jax.__version__}, jaxlib {jaxlib.__version__}",
    }
    return lambda: jax.block_until_ready(compiled(variables, *args)), outputs, info


# ---- the peers


def peer(network: str, count: int):
    """Build the peer's network; see `side_by_side.compare`."""
    import torch

    warnings.simplefilter("ignore")  # of torchvision and torch about the peers' old calls
    torch.set_num_threads(THREADS)
    mend_torchvision(torch)
    module, run, outputs, package, rules = globals()[f"peer_{network}"](torch, count)
    state = module.state_dict()
    for key, value in state.items():
        if value.dtype.is_floating_point:
            name = key
            for pattern, replacement in rules:
                name = re.sub(pattern, replacement, name)
            new = weight(network, name, tuple(value.shape))
            if network == "superglue":  # transformers keeps the channels of a head together
                heads = np.arange(256).reshape(64, 4).T.ravel()
                new = new[heads] if ".attention.self." in key else new
                new = new[:, heads] if ".attention.output.dense.weight" in key else new
            value.copy_(torch.from_numpy(new))
    module.eval()

    def timed():
        with torch.inference_mode():
            return run()

    return timed, outputs, {"version": f"torch {torch.__version__}, {package}"}


def nchw(torch, image):
    return torch.from_numpy(np.ascontiguousarray(image.transpose(0, 3, 1, 2)))


def peer_superpoint(torch, count):
    import transformers

    config = transformers.SuperPointConfig(max_keypoints=count)
    module = transformers.SuperPointForKeypointDetection(config)
    image = nchw(torch, images(1)[0]).repeat(1, 3, 1, 1)
    rules = (
        (r"^encoder\.conv_blocks\.(\d)\.conv_(\w)", lambda m: f"conv{int(m[1]) + 1}{m[2]}"),
        (r"^keypoint_decoder\.conv_score_(\w)", r"convP\1"),
        (r"^descriptor_decoder\.conv_descriptor_(\w)", r"convD\1"),
    )

    def outputs(out):
        kpts = out.keypoints[0].numpy() * [WIDTH, HEIGHT]
        return detections(kpts, out.scores[0], out.descriptors[0])

    return module, lambda: module(image), outputs, f"transformers {transformers.__version__}", rules


def peer_superglue(torch, count):
    import transformers

    config = transformers.SuperGlueConfig(sinkhorn_iterations=20, matching_threshold=0.2)  # the official scripts'
    module = transformers.SuperGlueForKeypointMatching(config)
    sets = keypoints(count)
    both = [torch.from_numpy(np.stack([f[k] for f in sets], 1)) for k in ("kpts", "desc", "scores")]
    mask = torch.ones(1, 2, count, dtype=torch.int)
    rules = (
        (r"^keypoint_encoder\.encoder\.(\d)\.linear", lambda m: f"kenc.encoder.{3 * int(m[1])}"),
        (r"^keypoint_encoder\.encoder\.(\d)\.batch_norm", lambda m: f"kenc.encoder.{3 * int(m[1]) + 1}"),
        (r"^keypoint_encoder\.encoder\.4\.", "kenc.encoder.12."),
        (r"attention\.self\.(query|key|value)", lambda m: f"attn.proj.{['query', 'key', 'value'].index(m[1])}"),
        (r"attention\.output\.dense", "attn.merge"),
        (r"mlp\.1\.", "mlp.3."),
        (r"mlp\.0\.batch_norm", "mlp.1"),
        (r"mlp\.0\.linear", "mlp.0"),
        (r"^final_projection\.", ""),
    )

    def run():
        return module._match_image_pair(*both, HEIGHT, WIDTH, mask=mask)

    return (
        module,
        run,
        lambda out: index_matches(out[0][0, 0], out[1][0, 0]),
        f"transformers {transformers.__version__}",
        rules,
    )


def peer_lightglue(torch, count):
    import kornia

    module = kornia.feature.LightGlue(features=None, weights=None, depth_confidence=-1.0, width_confidence=-1.0)
    data = {
        f"image{i}": {
            "keypoints": torch.from_numpy(f["kpts"]),
            "descriptors": torch.from_numpy(f["desc"]),
            "image_size": torch.tensor([[float(WIDTH), float(HEIGHT)]]),
        }
        for i, f in enumerate(keypoints(count))
    }

    outputs = lambda out: index_matches(out["matches0"][0], out["matching_scores0"][0])  # noqa: E731
    return module, lambda: module(data), outputs, f"kornia {kornia.__version__}", ()


def peer_loftr_outdoor(torch, _, **config):
    import kornia

    settings = {**kornia.feature.loftr.loftr.default_cfg, **config}
    settings["match_coarse"] = {**settings["match_coarse"], "thr": 0.0}  # all that are each other's best
    module = kornia.feature.LoFTR(pretrained=None, config=settings)
    pair = {f"image{i}": nchw(torch, image) for i, image in enumerate(images(1))}

    def outputs(out):
        return point_matches(*(out[k] for k in ("keypoints0", "keypoints1", "confidence")))

    return module, lambda: module(pair), outputs, f"kornia {kornia.__version__}", ()


def peer_gim_loftr(torch, _):
    import torchvision

    nn, functional = torch.nn, torch.nn.functional
    module, _, outputs, package, rules = peer_loftr_outdoor(torch, 0, fine_concat_coarse_feat=False)
    pair = {f"image{i}": nchw(torch, image) for i, image in enumerate(images(3))}

    class Backbone(nn.Module):
        """ResNet-50 without pooling up to layer 3 and LoFTR's feature pyramid, as GIM has it."""

        def __init__(self):
            super().__init__()
            self.encode = torchvision.models.resnet50()
            del self.encode.layer4, self.encode.fc
            conv = lambda cin, cout, k: nn.Conv2d(cin, cout, k, padding=k // 2, bias=False)  # noqa: E731
            smooth = lambda hidden, cout: nn.Sequential(  # noqa: E731
                conv(hidden, hidden, 3), nn.BatchNorm2d(hidden), nn.LeakyReLU(), conv(hidden, cout, 3)
            )
            self.layer3_outconv, self.layer2_outconv = conv(1024, 256, 1), conv(512, 256, 1)
            self.layer2_outconv2 = smooth(256, 196)
            self.layer1_outconv, self.layer1_outconv2 = conv(256, 196, 1), smooth(196, 128)

        def forward(self, x):
            net = self.encode
            x1 = net.layer1(net.relu(net.bn1(net.conv1(x))))
            x2 = net.layer2(x1)
            coarse = self.layer3_outconv(net.layer3(x2))
            out = coarse
            for lateral, merge, smooth in (
                (x2, self.layer2_outconv, self.layer2_outconv2),
                (x1, self.layer1_outconv, self.layer1_outconv2),
            ):
                up = functional.interpolate(out, scale_factor=2.0, mode="bilinear", align_corners=True)
                out = smooth(merge(lateral) + up)
            return coarse, out

    module.backbone = Backbone()
    return module, lambda: module(pair), outputs, f"{package}, torchvision {torchvision.__version__}", rules


def peer_disk(torch, count):
    import kornia

    module = kornia.feature.DISK()
    image = nchw(torch, images(3)[0])

    def outputs(out):
        return detections(out[0].keypoints, out[0].detection_scores, out[0].descriptors)

    return module, lambda: module(image, n=count), outputs, f"kornia {kornia.__version__}", ()


def peer_dkm(torch, _):
    found = importlib.util.find_spec("vismatch")  # without importing it: it wants 28 packages
    if found is None or not found.submodule_search_locations:
        raise ImportError("No module named 'vismatch'")
    sys.path.insert(0, str(Path(found.submodule_search_locations[0]) / "third_party/gim"))
    from dkm.models.model_zoo.DKMv3 import DKMv3  # pyright: ignore

    inverse = torch.linalg.inv  # of batches: wrong or refused with two threads (torch 2.13, CPU), so one by one
    torch.linalg.inv = lambda batch: torch.stack([inverse(matrix) for matrix in batch])
    module = DKMv3(weights=None, h=384, w=512)
    module.upsample_preds = False
    pair = [nchw(torch, image) for image in images(3)]

    run = lambda: module.match(*pair, device="cpu")  # noqa: E731
    return module, run, lambda out: dense(*out), "vismatch's copy of GIM", ()


def mend_torchvision(torch):
    """Import torchvision, which is installed but may be for another build of torch: then it lacks two operators,
    which nothing here calls, and breaks whoever imports it."""
    try:
        import torchvision  # noqa: F401
    except ModuleNotFoundError:
        return
    except RuntimeError:
        for name in [name for name in sys.modules if name.startswith("torchvision")]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "FRAGMENT")
        for schema in ("nms(Tensor a, Tensor b, float c) -> Tensor", "qnms(Tensor a) -> Tensor"):
            library.define(schema)
        kept_alive.append(library)


kept_alive: list = []  # a library ends with its object


# ---- the table


@dataclass(frozen=True)
class Case:
    network: str
    count: int  # of keypoints, where that is a setting
    what: str


CASES = (
    Case("superpoint", 1024, "SuperPoint, 640x480"),
    Case("disk", 2048, "DISK, 640x480"),
    Case("superglue", 1024, "SuperGlue, 1024 keypoints"),
    Case("superglue", 2048, "SuperGlue, 2048 keypoints"),
    Case("lightglue", 1024, "LightGlue, 1024 keypoints"),
    Case("lightglue", 2048, "LightGlue, 2048 keypoints"),
    Case("loftr_outdoor", 0, "LoFTR outdoor, 640x480"),
    Case("gim_loftr", 0, "GIM-LoFTR, 640x480"),
    Case("dkm", 0, "DKM both ways, 384x512"),
)


def parity(a: dict, b: dict) -> str:
    """Say how far two sets of outputs are apart."""
    common, at_a, at_b = np.intersect1d(a["id"], b["id"], return_indices=True)
    differences = [f"{k} {np.abs(a[k][at_a] - b[k][at_b]).max(initial=0):.1e}" for k in a if k != "id"]
    return (
        f"{len(common)} of {len(a['id'])} and {len(b['id'])} rows common, largest difference {', '.join(differences)}"
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = list(dict.fromkeys(case.network for case in CASES))
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(names)}; all if none")
    parser.add_argument("--repetitions", type=int, default=5)
    args = parser.parse_args()
    unknown = set(args.cases) - set(names)
    if unknown:
        parser.error(f"no such case: {', '.join(sorted(unknown))}")

    print(
        f"{platform.processor() or platform.machine()}, {THREADS} threads each, {args.repetitions} repetitions in turn"
    )
    print("| network | ours: median s (min; CPU s) | peer | time | CPU | peak MB ours / peer | memory | compile s |")
    print("|---|---|---|---|---|---|---|---|")
    for case in CASES:
        if args.cases and case.network not in args.cases:
            continue
        arguments = (case.network, case.count)
        with tempfile.TemporaryDirectory() as cache:
            forms = {"ours": (ours, (*arguments, cache)), "peer": (peer, arguments)}
            found = compare(forms, args.repetitions)
            again = compare({"ours": forms["ours"]}, 1)["ours"]  # as every program but the first finds it
        print(row(case, found["ours"], found["peer"]), flush=True)
        our, other = found["ours"], found["peer"]
        notes = [f"  {our.info['version']}; temporaries {our.info['temp_mb']:.0f} MB"]
        if other.missing:
            notes.append(f"  peer not installed: {other.missing} (see the head of this file)")
        else:
            notes.append(f"  against {other.info['version']}: {parity(our.outputs, other.outputs)}")
        seconds, share = again.info["compile_s"], again.peak_mb / other.peak_mb if other.peak_mb else float("nan")
        notes.append(f"  from the compilation cache {seconds:.1f} s, peak {again.peak_mb:.0f} MB, ratio {share:.2f}")
        notes.append(f"  load {os.getloadavg()[0]:.1f}")
        print("\n".join(notes), flush=True)


def row(case, our, other) -> str:
    """Write one line of the table."""

    def took(r):
        return f"{statistics.median(r.wall_s):.3f} ({min(r.wall_s):.3f}; {statistics.median(r.cpu_s):.3f})"

    cells = [case.what, took(our)]
    if other.missing:
        cells += ["not installed", "", "", f"{our.peak_mb:.0f}", ""]
    else:
        # neighbours in time share the load of the machine
        time_ratio = statistics.median(a / b for a, b in zip(our.wall_s, other.wall_s))
        cpu_ratio = statistics.median(a / b for a, b in zip(our.cpu_s, other.cpu_s))
        cells += [took(other), f"{time_ratio:.2f}", f"{cpu_ratio:.2f}"]
        cells += [f"{our.peak_mb:.0f} / {other.peak_mb:.0f}", f"{our.peak_mb / other.peak_mb:.2f}"]
    cells.append(f"{our.info['compile_s']:.1f}")
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
