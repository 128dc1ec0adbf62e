"""Records: framing, schema, shards, packing, and what damage does."""

import hashlib
import json
import os
import signal
import struct
import subprocess
import sys
from dataclasses import fields, replace

import google_crc32c
import numpy as np
import pytest

from gim_jax.cli import main
from gim_jax.cli.pack import pack
from gim_jax.data import records, tfrecord
from tests.pairs import make_record
from tests.posed import posed_record


def flip(path, offset, bit=0):
    data = bytearray(path.read_bytes())
    data[offset] ^= 1 << bit
    path.write_bytes(data)


def assert_same_record(a, b):
    for field in fields(records.PairRecord):
        if field.name != "pair_id":
            np.testing.assert_array_equal(getattr(a, field.name), getattr(b, field.name), err_msg=field.name)


# ---- one record ----


def test_decode_inverts_encode():
    # A last row of zeros would be lost by any reader that strips trailing zero bytes.
    record = make_record()
    record.correspondences[-1] = 0
    assert_same_record(record, records.decode(records.encode(record)))


def test_record_without_matches_round_trips():
    record = make_record(num_matches=0)
    assert records.decode(records.encode(record)).correspondences.shape == (0, 4)


def test_encoding_is_deterministic_and_idempotent():
    payload = records.encode(make_record())
    assert records.encode(make_record()) == payload
    assert records.encode(records.decode(payload)) == payload


def test_pair_id_depends_on_content_and_not_on_provenance():
    record = make_record()
    same = replace(record, video="renamed.mp4", code_version="9.9", label_config_hash="f" * 16)
    moved = replace(record, correspondences=record.correspondences + np.float32(0.25))
    assert records.make_pair_id(same) == records.make_pair_id(record)
    assert records.make_pair_id(moved) != records.make_pair_id(record)
    assert records.make_pair_id(replace(record, teachers=("x", "y"))) != records.make_pair_id(record)


@pytest.mark.parametrize(
    "field, value",
    [
        ("correspondences", np.zeros((64, 3), np.float32)),
        ("correspondences", np.full((64, 4), np.nan, np.float32)),
        ("confidence", np.full(64, 1.5, np.float32)),
        ("confidence", np.zeros(63, np.float32)),
        ("teacher", np.full(64, 2)),
        ("hops", np.zeros(64, np.int32)),
        ("F", np.zeros((2, 3))),
        ("size0", (64, 96)),
        ("image1", b"GIF89a"),
        ("image0", b""),
        ("schema_version", 3),
        ("pair_id", "0" * 32),
        ("video", "x" * 5000),
    ],
)
def test_encode_refuses_a_field_out_of_range_by_name(field, value):
    named = "image0" if field == "size0" else field  # the size is compared with the image's own
    with pytest.raises(ValueError, match=f"^{named}: ") as error:
        records.encode(make_record(**{field: value}))
    assert "\n" not in str(error.value)


def test_decode_refuses_bytes_that_are_not_a_record():
    for payload in (b"", b"\x00", b"hello", bytes(100), records.encode(make_record())[:-1]):
        with pytest.raises(ValueError):
            records.decode(payload)


def test_decode_survives_random_damage():
    # Whatever bytes come in, the answer is a record or a ValueError.
    payload = records.encode(make_record(width=16, height=16, num_matches=4))
    rng = np.random.default_rng(0)
    for _ in range(500):
        data = bytearray(payload)
        data[rng.integers(len(data))] = rng.integers(256)
        try:
            records.decode(bytes(data))
        except ValueError as error:
            assert str(error)


def test_jpeg_size_reads_the_header_that_opencv_wrote():
    record = make_record(width=104, height=56)
    assert records.jpeg_size(record.image0) == (104, 56, 3)


def test_file_name_that_is_not_utf8_is_kept_readable():
    name = os.fsdecode(b"caf\xe9.mp4")
    assert records.decode(records.encode(make_record(video=name))).video == "caf\\udce9.mp4"


# ---- one file ----


def test_framing_is_the_tfrecord_format(tmp_path):
    payload = b"any bytes"
    records.write_tfrecord(tmp_path / "a.tfrecord", [payload])

    def masked(data):  # by the format's definition, in other arithmetic than the code's
        crc = google_crc32c.value(data)
        return (((crc >> 15) + (crc % 2**15) * 2**17) + 0xA282EAD8) % 2**32

    length = struct.pack("<Q", len(payload))
    expected = length + struct.pack("<I", masked(length)) + payload + struct.pack("<I", masked(payload))
    assert (tmp_path / "a.tfrecord").read_bytes() == expected


@pytest.fixture
def three(tmp_path):
    """A file of three records of 100, 200 and 300 bytes, which start at bytes 0, 116 and 332."""
    payloads = [bytes([n]) * (100 * n) for n in (1, 2, 3)]
    path = tmp_path / "three.tfrecord"
    assert records.write_tfrecord(path, payloads) == 3
    return path, payloads


@pytest.mark.parametrize(
    "offset, bit, kept",
    [
        (116, 0, (0, 2)),
        (120, 7, (0, 2)),
        (124, 3, (0, 2)),
        (128, 0, (0, 2)),
        (330, 5, (0, 2)),
        (331, 7, (0, 2)),
    ],
    ids=["length", "length high", "length crc", "payload", "payload crc", "payload crc last"],
)
def test_every_flipped_bit_is_found_and_the_rest_is_read(three, offset, bit, kept):
    path, payloads = three
    flip(path, offset, bit)
    with pytest.raises(ValueError, match=r"three\.tfrecord: record 1 at byte 116: ") as error:
        list(records.read_tfrecord(path))
    assert "\n" not in str(error.value)
    skipped = []
    assert list(records.read_tfrecord(path, "skip", skipped)) == [payloads[i] for i in kept]
    assert len(skipped) == 1 and "record 1 at byte 116" in skipped[0]


@pytest.mark.parametrize("size", [1, 11, 12, 50, 115, 117, 331, 647])
def test_truncated_file_is_named_and_intact_records_read(three, size):
    path, payloads = three
    path.write_bytes(path.read_bytes()[:size])
    num_intact = sum(size >= end for end in (116, 332, 648))
    start = (0, 116, 332)[num_intact]
    with pytest.raises(ValueError, match=rf"three\.tfrecord: record {num_intact} at byte {start}: the file ends"):
        list(records.read_tfrecord(path))
    assert list(records.read_tfrecord(path, "skip")) == payloads[:num_intact]


def test_length_of_a_hostile_header_takes_no_memory(tmp_path):
    length = struct.pack("<Q", 1 << 62)
    path = tmp_path / "huge.tfrecord"
    path.write_bytes(length + struct.pack("<I", tfrecord._masked_crc(length)) + b"x")
    with pytest.raises(ValueError, match="found a record of 4611686018427387904 bytes"):
        records.TFRecordSource([path])


def test_source_reads_any_record_of_any_file(tmp_path, three):
    path, payloads = three
    other = tmp_path / "other.tfrecord"
    records.write_tfrecord(other, [b"x", b""])
    source = records.TFRecordSource([path, other])
    assert len(source) == 5
    assert [source[i] for i in (4, 0, 3, 2, 1)] == [b"", payloads[0], b"x", payloads[2], payloads[1]]
    assert list(source.subset([3, 1])) == [b"x", payloads[1]]


def test_source_checks_the_crc_on_access(three):
    path, payloads = three
    flip(path, 130)
    source = records.TFRecordSource([path])
    assert source[0] == payloads[0]
    with pytest.raises(ValueError, match="record 1 at byte 116: the payload is damaged"):
        source[1]


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.tfrecord"
    records.write_tfrecord(path, [b"old"])

    def failing():
        yield b"new"
        raise ValueError("no more")

    with pytest.raises(ValueError, match="no more"):
        records.write_tfrecord(path, failing())
    assert list(records.read_tfrecord(path)) == [b"old"]
    assert os.listdir(tmp_path) == ["a.tfrecord"]


def test_killed_write_leaves_no_file_of_that_name(tmp_path):
    code = (
        "import sys, os, signal\n"
        "from gim_jax.data import tfrecord\n"
        "def payloads():\n"
        "    yield b'x' * 1000000\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "tfrecord.write_tfrecord(sys.argv[1], payloads())\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "a.tfrecord")])
    assert done.returncode == -signal.SIGKILL
    assert not (tmp_path / "a.tfrecord").exists()


# ---- a folder of shards ----


@pytest.fixture(scope="module")
def payloads():
    return [records.encode(make_record(seed)) for seed in range(24)]


def folder_bytes(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_dataset_does_not_depend_on_input_order_or_duplicates(tmp_path, payloads):
    first = records.write_dataset(tmp_path / "a", "pairs", "train", 3, payloads)
    shuffled = [payloads[i] for i in np.random.default_rng(0).permutation(24)]
    second = records.write_dataset(tmp_path / "b", "pairs", "train", 3, iter(shuffled + payloads[:5]))
    digest = first["sha256"]
    assert first == {"num_records": 24, "num_duplicates": 0, "sha256": digest}
    assert second == {"num_records": 24, "num_duplicates": 5, "sha256": digest}
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")
    names = [f"pairs-train.tfrecord-0000{i}-of-00003" for i in range(3)]
    assert sorted(folder_bytes(tmp_path / "a")) == [
        "dataset_info.json",
        "features.json",
        "pairs-train.scenes.npz",
        "pairs-train.sha256",
        *names,
    ]


def test_digest_is_of_the_records_in_their_order(tmp_path, payloads):
    result = records.write_dataset(tmp_path, "pairs", "train", 2, payloads)
    paths = records.dataset_paths(tmp_path)
    stored = [hashlib.sha256(payload).digest() for path in paths for payload in records.read_tfrecord(path)]
    expected = hashlib.sha256(b"".join(stored)).hexdigest()
    assert result["sha256"] == records.dataset_digest(tmp_path, "train") == expected
    records.write_dataset(tmp_path, "pairs", "train", 2, payloads[:-1])
    assert records.dataset_digest(tmp_path, "train") != expected


def test_same_pair_from_two_runs_is_one_record_whichever_came_first(tmp_path, payloads):
    again = records.encode(make_record(0, code_version="9.9.9"))
    assert again != payloads[0]
    for folder, order in (("a", [payloads[0], again]), ("b", [again, payloads[0]])):
        assert records.write_dataset(tmp_path / folder, "pairs", "train", 1, order)["num_records"] == 1
    assert folder_bytes(tmp_path / "a") == folder_bytes(tmp_path / "b")


def test_tfds_opens_the_folder_and_reads_the_same_values(tmp_path, payloads):
    import cv2
    import tensorflow_datasets as tfds

    records.write_dataset(tmp_path, "pairs", "train", 2, payloads)
    records.write_dataset(tmp_path, "pairs", "val", 1, payloads[:3])
    builder = tfds.builder_from_directory(tmp_path)
    assert {k: v.num_examples for k, v in builder.info.splits.items()} == {"train": 24, "val": 3}
    assert [os.path.basename(p) for p in builder.info.splits["train"].filepaths] == [
        "pairs-train.tfrecord-00000-of-00002",
        "pairs-train.tfrecord-00001-of-00002",
    ]
    record = make_record(7)
    example = builder.info.features.deserialize_example_np(payloads[7])
    assert set(example) == {field.name for field in fields(records.PairRecord)}
    for name in (
        "correspondences",
        "confidence",
        "teacher",
        "hops",
        "F",
        "size0",
        "size1",
        "time0_s",
        "time1_s",
    ):
        np.testing.assert_array_equal(example[name], getattr(record, name), err_msg=name)
    for name in ("frame0", "frame1", "interval", "schema_version"):
        assert example[name] == getattr(record, name), name
    for name in ("video", "video_sha256", "licence", "label_config_hash"):
        assert example[name].decode() == getattr(record, name), name
    assert [name.decode() for name in example["teachers"]] == ["rootsift", "loftr"]
    bgr = cv2.imdecode(np.frombuffer(record.image0, np.uint8), cv2.IMREAD_COLOR)
    np.testing.assert_array_equal(example["image0"], bgr[..., ::-1])


def test_records_need_no_tensorflow_and_no_jax(tmp_path, payloads):
    records.write_dataset(tmp_path, "pairs", "train", 1, payloads)
    code = (
        "import sys\n"
        "from gim_jax.data import records\n"
        "assert records.verify(sys.argv[1]) == (24, [])\n"
        "assert not {'tensorflow', 'jax'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True)


def test_verify_names_every_kind_of_problem(tmp_path, payloads):
    records.write_dataset(tmp_path, "pairs", "train", 2, payloads)
    shard0, shard1 = records.dataset_paths(tmp_path)
    assert records.verify(tmp_path) == (24, [])
    in0, in1 = (list(records.read_tfrecord(path)) for path in (shard0, shard1))
    broken = records.encode(make_record(100, image0=make_record(100).image0[:200]))
    blind = records.encode(posed_record(depth1=posed_record()[0].depth1[:60])[0])
    records.write_tfrecord(shard0, [*in0, in1[0], broken, blind, b"junk"])
    flip(shard1, 500)
    num_intact, problems = records.verify(tmp_path)
    text = "\n".join(problems)
    for expected in (
        "belongs in shard 1",
        "image0 cannot be decoded",
        "depth1 cannot be decoded",
        "record 0 at byte 0: the payload is damaged",
        f"found {len(in0) + 4} records, expected {len(in0)} by dataset_info.json",
        f"record {len(in0) + 3}: found 4 bytes that are not a tf.Example",
    ):
        assert expected in text
    assert num_intact == 24 - 1


def test_missing_shard_and_foreign_json_are_refused(tmp_path, payloads):
    records.write_dataset(tmp_path, "pairs", "train", 2, payloads)
    records.dataset_paths(tmp_path)[1].unlink()
    with pytest.raises(ValueError, match="1 of 2 shards are missing"):
        records.dataset_paths(tmp_path)
    with pytest.raises(ValueError, match="no split 'val'; there are: train"):
        records.dataset_paths(tmp_path, "val")
    info = json.loads((tmp_path / "dataset_info.json").read_text())
    (tmp_path / "dataset_info.json").write_text(json.dumps(info | {"name": "../../etc/x"}))
    with pytest.raises(ValueError, match=r"name: found '\.\./\.\./etc/x'"):
        records.dataset_paths(tmp_path)


# ---- packing ----


@pytest.fixture
def labels(tmp_path, payloads):
    folder = tmp_path / "labels"
    folder.mkdir()
    for video, span in {"a": slice(0, 10), "b": slice(8, 16), "c": slice(16, 24)}.items():
        records.write_tfrecord(folder / f"{video}.tfrecord", payloads[span])
    return folder


def test_pack_merges_videos_drops_duplicates_and_is_idempotent(tmp_path, labels, capsys):
    out = tmp_path / "packed"
    argv = ["pack", str(labels), "--out", str(out), "--name", "town", "--num-shards", "2"]
    assert main(argv) == 0
    assert "holds 24 pairs of 3 files in 2 shards; 2 duplicates dropped" in capsys.readouterr().out
    before = folder_bytes(out)
    assert records.verify(out) == (24, [])
    assert main(argv) == 0
    assert "is up to date" in capsys.readouterr().out
    assert folder_bytes(out) == before
    assert sorted(os.listdir(tmp_path)) == ["labels", "packed"]


def test_pack_skips_damage_and_says_so(tmp_path, labels, capsys):
    flip(labels / "b.tfrecord", 400)
    assert main(["pack", str(labels), "--out", str(tmp_path / "packed")]) == 1
    captured = capsys.readouterr()
    assert "b.tfrecord: record 0 at byte 0: the payload is damaged" in captured.err
    assert "holds 24 pairs" in captured.out  # the damaged one was a duplicate
    assert records.verify(tmp_path / "packed") == (24, [])


def test_pack_after_a_kill_finishes_and_leaves_nothing_behind(tmp_path, labels):
    code = (
        "import os, signal, sys\n"
        "from gim_jax.cli import pack\n"
        "write = pack.records.write_tfrecord\n"
        "def killed(path, payloads):\n"
        "    if '00001-of' in str(path): os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return write(path, payloads)\n"
        "pack.records.write_tfrecord = killed\n"
        "pack.pack(sys.argv[1], sys.argv[2], num_shards=2)\n"
    )
    out = tmp_path / "packed"
    assert subprocess.run([sys.executable, "-c", code, str(labels), str(out)]).returncode == -signal.SIGKILL
    assert not out.exists()
    assert pack(labels, out, num_shards=2)["num_records"] == 24
    assert records.verify(out) == (24, [])
    assert sorted(os.listdir(tmp_path)) == ["labels", "packed"]


def test_pack_follows_changed_labels(tmp_path, labels, payloads):
    out = tmp_path / "packed"
    pack(labels, out)
    (labels / "c.tfrecord").unlink()
    assert pack(labels, out)["num_records"] == 16
    assert records.verify(out) == (16, [])


def test_pack_refuses_what_it_did_not_make(tmp_path, labels, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    (tmp_path / "empty").mkdir()
    assert main(["pack", str(labels), "--out", str(tmp_path / "mine")]) == 2
    assert main(["pack", str(tmp_path / "empty"), "--out", str(tmp_path / "x")]) == 2
    assert main(["pack", str(tmp_path / "nowhere"), "--out", str(tmp_path / "x")]) == 2
    assert main(["pack", str(labels), "--out", str(tmp_path / "x"), "--name", "../evil"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and all(line.startswith("gim-jax pack: ") for line in lines)
    assert os.listdir(tmp_path / "mine") == ["thesis.txt"]
    assert not (tmp_path / "x").exists()


def test_records_command_verifies_shows_and_counts(tmp_path, labels, capsys):
    assert main(["records", "verify", str(labels)]) == 1  # two records are in two files
    assert main(["records", "stats", str(labels)]) == 0
    out = capsys.readouterr().out
    assert "26 of 1 videos" in out and "matches     1664" in out and "40 frames: 26" in out
    assert main(["records", "show", str(labels / "a.tfrecord"), "--limit", "2"]) == 0
    assert capsys.readouterr().out.count("frames 20-60") == 2
    assert main(["records", "verify", str(tmp_path / "nowhere")]) == 2
