"""PyTorch state dicts become Flax variables by name and layout alone."""

import jax
import numpy as np
import pytest
from flax import linen as nn
from jax import numpy as jnp

from gim_jax.weights.convert import from_torch, rename, torch_key


class Block(nn.Module):
    def setup(self):
        self.mlp = [nn.Dense(3, use_bias=False), jax.nn.relu, nn.Dense(2)]
        self.norm = nn.LayerNorm()

    def __call__(self, x):
        for f in self.mlp:
            x = f(x)
        return self.norm(x)


class Net(nn.Module):
    def setup(self):
        self.conv = nn.Conv(6, (3, 5), feature_group_count=2)
        self.bn = nn.BatchNorm(use_running_average=True)
        self.layers = [Block(), Block()]
        self.head = {"16": [nn.Dense(4), nn.Dense(5)]}
        self.bin_score = self.param("bin_score", nn.initializers.ones, ())

    def __call__(self, x):
        x = self.bn(self.conv(x))
        for layer in self.layers:
            x = layer(x)
        for head in self.head["16"]:
            x = head(x)
        return x * self.bin_score


TEMPLATE = jax.eval_shape(Net().init, jax.random.key(0), jnp.zeros((1, 4, 4, 4)))
SHAPES = {  # as torch would list them
    "conv.weight": (6, 2, 3, 5),
    "conv.bias": (6,),
    "bn.weight": (6,),
    "bn.bias": (6,),
    "bn.running_mean": (6,),
    "bn.running_var": (6,),
    "bn.num_batches_tracked": (),
    "layers.0.mlp.0.weight": (3, 6),
    "layers.0.mlp.2.weight": (2, 3),
    "layers.0.mlp.2.bias": (2,),
    "layers.0.norm.weight": (2,),
    "layers.0.norm.bias": (2,),
    "layers.1.mlp.0.weight": (3, 2, 1),  # Conv1d with a window of one
    "layers.1.mlp.2.weight": (2, 3, 1, 1),  # Conv2d with a window of one
    "layers.1.mlp.2.bias": (2,),
    "layers.1.norm.weight": (2,),
    "layers.1.norm.bias": (2,),
    "head.16.0.weight": (4, 2),
    "head.16.0.bias": (4,),
    "head.16.1.weight": (5, 4),
    "head.16.1.bias": (5,),
    "bin_score": (),
}


@pytest.fixture
def state():
    rng = np.random.default_rng(0)
    return {k: rng.standard_normal(s).astype(np.float32) for k, s in SHAPES.items()}


def test_torch_key_splits_trailing_numbers_only():
    assert torch_key(("a_b", "layer2_outconv2_0", "kernel")) == "a_b.layer2_outconv2.0.weight"
    assert (
        torch_key(("conv_refiner_16", "hidden_blocks_3_1", "mean")) == "conv_refiner.16.hidden_blocks.3.1.running_mean"
    )
    assert torch_key(("bin_score",)) == "bin_score"


def test_every_value_lands_at_its_place(state):
    v = from_torch(state, TEMPLATE)
    p = v["params"]
    o, i, h, w = 4, 1, 2, 3
    assert p["conv"]["kernel"][h, w, i, o] == state["conv.weight"][o, i, h, w]
    assert p["layers_0"]["mlp_0"]["kernel"][5, 2] == state["layers.0.mlp.0.weight"][2, 5]
    assert p["layers_1"]["mlp_0"]["kernel"][1, 2] == state["layers.1.mlp.0.weight"][2, 1, 0]
    assert p["layers_1"]["mlp_2"]["kernel"][2, 1] == state["layers.1.mlp.2.weight"][1, 2, 0, 0]
    assert p["head_16_1"]["kernel"].shape == (4, 5)
    np.testing.assert_array_equal(p["layers_0"]["norm"]["scale"], state["layers.0.norm.weight"])
    np.testing.assert_array_equal(v["batch_stats"]["bn"]["var"], state["bn.running_var"])
    np.testing.assert_array_equal(p["bn"]["scale"], state["bn.weight"])
    assert p["bin_score"] == state["bin_score"] and p["bin_score"].shape == ()
    assert jax.tree.structure(v) == jax.tree.structure(TEMPLATE)


def test_rules_strip_rename_and_drop(state):
    file = {"model." + k.replace("head.16", "old_head"): a for k, a in state.items()} | {
        "model.fc.weight": np.zeros((2, 2))
    }
    rules = [(r"^model\.", ""), (r"^fc\.", None), (r"^old_head", "head.16")]
    plain, ruled = from_torch(state, TEMPLATE), from_torch(file, TEMPLATE, rules)
    jax.tree.map(np.testing.assert_array_equal, plain, ruled)


def test_errors_list_all_missing_extra_and_misshapen_keys(state):
    state["layers.7.mlp.0.weight"] = state.pop("layers.0.mlp.0.weight")
    del state["bn.running_var"]
    state["conv.weight"] = np.zeros((6, 4, 3, 5), np.float32)
    with pytest.raises(ValueError) as error:
        from_torch(state, TEMPLATE)
    text = str(error.value)
    assert "2 missing: " in text and "bn.running_var" in text and "layers.0.mlp.0.weight" in text
    assert "1 extra: layers.7.mlp.0.weight" in text
    assert "conv.weight (6, 4, 3, 5), expected (6, 2, 3, 5)" in text


def test_two_keys_that_become_one_are_an_error():
    with pytest.raises(ValueError, match="both become a"):
        rename(["x.a", "a"], [(r"^x\.", "")])
