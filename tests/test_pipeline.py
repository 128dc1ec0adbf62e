"""The input pipeline: what a step sees depends on the seed and the step alone, and nothing bad goes unnamed."""

import itertools
import json
import os
import subprocess
import sys
import threading
from collections import Counter

import numpy as np
import pytest

from gim_jax.data import pipeline, records
from gim_jax.data.pipeline import TOO_FEW_MATCHES, Batches
from gim_jax.data.scenes import Order, Sampling
from tests.pairs import data_config, make_record

PLAIN = {"enabled": False}


def number(seed, **changes):
    """Make a record that can be told by its confidence, which is (seed + 1) / 256."""
    return records.encode(make_record(seed, confidence=np.full(64, (seed + 1) / 256, np.float32), **changes))


def numbers(batch):
    return [round(float(c) * 256) - 1 for c in batch["conf"][:, 0]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "ten"
    records.write_dataset(path, "pairs", "train", 3, [number(i) for i in range(10)])
    return path


def take(data, count, batch_size=4, seed=5, shard=(0, 1), state=None):
    batches = Batches(data, seed, batch_size, *shard)
    if state is not None:
        batches.set_state(state)
    result = list(itertools.islice(batches, count))
    batches.close()
    return result


def part(batch, host, num_hosts):
    """The block of a global batch that a host makes."""
    return {name: np.split(a, num_hosts)[host] for name, a in batch.items()}


def assert_same(first, second):
    assert len(first) == len(second)
    for a, b in zip(first, second):
        assert a.keys() == b.keys()
        for name in a:
            np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def test_batch_has_the_static_shapes_and_types_of_the_contract(folder):
    (batch,) = take(data_config(folder, size=(64, 48), channels=3, max_matches=20), 1)
    expected = {}
    for i in "01":
        expected[f"image{i}"] = ((4, 48, 64, 3), np.uint8)
        expected[f"mask{i}"] = ((4, 6, 8), np.bool_)
        expected[f"kpts{i}"] = ((4, 20, 2), np.float32)
    expected |= {"match_mask": ((4, 20), np.bool_), "conf": ((4, 20), np.float32)}
    assert {name: (a.shape, a.dtype.type) for name, a in batch.items()} == expected


def test_every_epoch_holds_every_record_once_in_another_order(folder):
    seen = [n for batch in take(data_config(folder, augment=PLAIN), 10) for n in numbers(batch)]
    epochs = [seen[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4


@pytest.mark.parametrize("num_threads", [1, 3])
def test_threads_change_nothing(folder, num_threads):
    assert_same(take(data_config(folder), 6), take(data_config(folder, num_threads=num_threads), 6))


def test_all_threads_work_however_few_batches_are_made_ahead(folder, monkeypatch):
    together, calls = threading.Barrier(3), itertools.count()

    def meet(*args, make_sample=pipeline.make_sample):
        if next(calls) < 3:
            together.wait(5)  # for three threads at once
        return make_sample(*args)

    monkeypatch.setattr(pipeline, "make_sample", meet)
    take(data_config(folder, num_threads=3, num_prefetch=1), 3, batch_size=1)


@pytest.mark.parametrize("num_hosts", [2, 4])
def test_hosts_share_out_the_same_global_batches(folder, num_hosts):
    whole = take(data_config(folder), 5)
    parts = [take(data_config(folder), 5, shard=(p, num_hosts)) for p in range(num_hosts)]
    for p in range(num_hosts):
        assert_same(parts[p], [part(batch, p, num_hosts) for batch in whole])


@pytest.mark.parametrize("stop", [0, 1, 4])
@pytest.mark.parametrize("hosts", [(1, 1), (2, 1), (1, 4)])
def test_position_continues_exactly_on_another_number_of_hosts_and_threads(folder, stop, hosts):
    before, after = hosts
    whole = take(data_config(folder), 7)
    batches = Batches(data_config(folder, num_threads=2), 5, 4, 0, before)
    for _ in range(stop):
        next(batches)
    state = json.loads(json.dumps(batches.get_state()))
    batches.close()
    for p in range(after):
        rest = take(data_config(folder), 7 - stop, shard=(p, after), state=state)
        assert_same(rest, [part(batch, p, after) for batch in whole[stop:]])


def test_seed_changes_order_and_augmentation(folder):
    a, b = (take(data_config(folder), 2, seed=s) for s in (1, 2))
    assert numbers(a[0]) + numbers(a[1]) != numbers(b[0]) + numbers(b[1])


def test_same_record_is_augmented_differently_in_every_epoch(folder, tmp_path):
    records.write_dataset(tmp_path / "one", "pairs", "train", 1, [number(3)])
    first, second = take(data_config(tmp_path / "one"), 2, batch_size=1)
    assert (first["image1"] != second["image1"]).any()


def test_position_in_other_data_is_refused(folder, tmp_path):
    state = Batches(data_config(folder), 5, 4).get_state()
    records.write_dataset(tmp_path / "nine", "pairs", "train", 1, [number(i) for i in range(9)])
    with pytest.raises(ValueError, match=r"num_records: found \[10\], expected \[9\]"):
        Batches(data_config(tmp_path / "nine"), 5, 4).set_state(state)
    records.write_dataset(tmp_path / "others", "pairs", "train", 1, [number(10 + i) for i in range(10)])
    others = Batches(data_config(tmp_path / "others"), 5, 4)
    with pytest.raises(ValueError, match=r"others: found sha256 [0-9a-f]{64}, expected [0-9a-f]{64}"):
        others.set_state(state)
    others.set_state({name: value for name, value in state.items() if name != "sha256"})  # of an earlier version


def test_mixture_follows_the_weights_and_each_part_its_epochs(folder, tmp_path):
    records.write_dataset(tmp_path / "b", "pairs", "train", 1, [number(100 + i) for i in range(4)])
    data = data_config(f"{folder},{tmp_path / 'b'}", weights=(1.0, 3.0), augment=PLAIN)
    seen = Counter(n for batch in take(data, 20) for n in numbers(batch))
    small = {n: c for n, c in seen.items() if n >= 100}
    assert sum(small.values()) == 60 and set(small.values()) == {15}
    assert sum(seen.values()) - 60 == 20 and all(c == 2 for n, c in seen.items() if n < 100)


def test_damaged_record_is_replaced_counted_and_named(tmp_path):
    path = tmp_path / "a.tfrecord"
    payloads = [number(i) for i in range(4)]
    records.write_tfrecord(path, payloads)
    data = bytearray(path.read_bytes())
    data[16 + len(payloads[0]) + 500] ^= 1  # inside the second record
    path.write_bytes(data)
    batches = Batches(data_config(path, augment=PLAIN), 5, 4)
    seen = [n for batch in itertools.islice(batches, 3) for n in numbers(batch)]
    assert 1 not in seen and len(seen) == 12
    ((reason, count),) = batches.incidents.items()
    assert "a.tfrecord: record 1 at byte" in reason and count >= 3
    with pytest.raises(ValueError, match="record 1 at byte"):
        take(data_config(path, on_damage="raise"), 3)


def test_damaged_header_loses_one_record_and_is_named(tmp_path):
    path = tmp_path / "a.tfrecord"
    payloads = [number(i) for i in range(4)]
    records.write_tfrecord(path, payloads)
    data = bytearray(path.read_bytes())
    data[16 + len(payloads[0])] ^= 1
    path.write_bytes(data)
    batches = Batches(data_config(path, augment=PLAIN), 5, 3)
    assert batches.num_records == [3]
    assert "the length field is damaged" in next(iter(batches.incidents))
    assert sorted(numbers(next(batches))) == [0, 2, 3]


def test_pair_with_too_few_matches_is_replaced_and_counted(tmp_path):
    good = [number(i) for i in range(3)]
    poor = records.encode(make_record(9, num_matches=3))
    records.write_tfrecord(tmp_path / "a.tfrecord", [*good, poor])
    batches = Batches(data_config(tmp_path / "a.tfrecord", augment=PLAIN), 5, 4)
    for _ in range(3):
        assert set(numbers(next(batches))) <= {0, 1, 2}
    assert list(batches.incidents) == [TOO_FEW_MATCHES]


def test_replacement_comes_from_the_range_of_overlap_that_is_drawn_from(tmp_path):
    good = [number(i, overlap=0.5) for i in range(3)] + [number(i, overlap=0.9) for i in range(3, 9)]
    poor = [records.encode(make_record(20 + i, num_matches=3, overlap=0.5)) for i in range(4)]
    records.write_dataset(tmp_path, "pairs", "train", 1, good + poor)
    data = data_config(tmp_path, augment=PLAIN, sampling={"max_overlap": 0.7, "epoch": 7})
    seen = Counter(n for batch in take(data, 7) for n in numbers(batch))
    assert set(seen) == {0, 1, 2} and sum(seen.values()) == 28


def test_epochs_on_both_sides_of_a_boundary_are_drawn_once(monkeypatch):
    drawn = []

    def draw(order, number, draw=Order._draw):
        drawn.append(number)
        return draw(order, number)

    monkeypatch.setattr(Order, "_draw", draw)
    order = Order(np.zeros(10, int), np.full(10, 0.5), Sampling(epoch=10), 0)
    places = [order[i] for i in (9, 10, 8, 11, 9, 10)]  # as threads come to it
    assert drawn == [0, 1] and places[0] == places[4] and places[1] == places[5]


def test_data_without_a_usable_record_is_an_error_not_a_hang(tmp_path):
    records.write_tfrecord(tmp_path / "a.tfrecord", [records.encode(make_record(9, num_matches=3))])
    with pytest.raises(ValueError, match="100 records in a row were unusable"):
        take(data_config(tmp_path / "a.tfrecord"), 1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"size": (60, 48)}, r"data\.size: found \(60, 48\), expected \(width, height\), multiples of 8"),
        ({"channels": 2}, r"data\.channels: found 2"),
        ({"min_matches": 33}, r"data\.min_matches: found 33, expected 1 to 32"),
        ({"weights": (1.0, 2.0)}, r"data\.weights: found \[1\.0, 2\.0\], expected 1 positive"),
        ({"on_damage": "ignore"}, r"data\.on_damage: found 'ignore'"),
        ({"records": ""}, r"data\.records: found ''"),
        ({"augment": {"dark_prob": float("nan")}}, r"data\.augment: dark_prob: found nan, expected float"),
        ({"augment": {"subset": "first"}}, r"data\.augment: subset: found 'first'"),
        ({"sampling": {"min_overlap": 0.8, "max_overlap": 0.7}}, r"data\.sampling: min_overlap: found 0\.8 to 0\.7"),
        ({"records": "/nowhere"}, r"/nowhere: no such file or folder"),
        ({"split": "val"}, r"no split 'val'; there are: train"),
    ],
)
def test_wrong_setting_is_named(folder, changes, message):
    with pytest.raises(ValueError, match=message):
        Batches(data_config(folder, **changes), 0, 4)


def test_no_jax_device_is_touched(folder):
    code = (
        "import sys\n"
        "from gim_jax.data.pipeline import Batches\n"
        "from tests.pairs import data_config\n"
        "next(Batches(data_config(sys.argv[1], num_threads=2), 0, 4))\n"
    )
    # JAX would fail to start on a platform that does not exist.
    environment = os.environ | {"JAX_PLATFORMS": "none_such", "PYTHONPATH": os.getcwd()}
    subprocess.run([sys.executable, "-c", code, str(folder)], check=True, env=environment)
