"""`gim-jax pack`: merge the labels of videos into one folder of training records."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

from gim_jax.data import records

MANIFEST = "packed.json"


def add_arguments(parser) -> None:
    parser.add_argument("labels", help="folder of a labelling run: one *.tfrecord per video")
    parser.add_argument("--out", required=True, help="folder to write; it appears only when it is complete")
    parser.add_argument("--name", default="pairs", help="name of the data set (default: pairs)")
    parser.add_argument("--split", default="train", help="name of the split (default: train)")
    parser.add_argument("--num-shards", type=int, default=8, help="files to spread the records over (default: 8)")


def run(args) -> int:
    result = pack(args.labels, args.out, args.name, args.split, args.num_shards)
    for line in result["damaged"]:
        print(f"gim-jax pack: skipped: {line}", file=sys.stderr)
    verb = "is up to date:" if result["up_to_date"] else "holds"
    print(
        f"{args.out} {verb} {result['num_records']} pairs of {result['num_files']} files in"
        f" {result['num_shards']} shards; {result['num_duplicates']} duplicates dropped,"
        f" {len(result['damaged'])} damaged places skipped"
    )
    return 1 if result["damaged"] else 0


def pack(labels: str | Path, out: str | Path, name: str = "pairs", split: str = "train", num_shards: int = 8) -> dict:
    """Merge every `*.tfrecord` of a labelling folder into hash-assigned shards.

    CRCs are verified, records with the same content are kept once, damaged ones are left out and listed. The
    result is built beside `out` and renamed, so `out` is always complete; packing the same files again does
    nothing.

    Returns: dict(num_records, num_duplicates, num_files, num_shards, damaged=[one line each], up_to_date).
    Raises: ValueError if there is nothing to pack, or if `out` exists and was not made by packing.
    """
    labels, out = Path(labels), Path(out)
    if not labels.is_dir():
        raise ValueError(f"{labels}: no such folder; expected the output of a labelling run")
    if (labels / "dataset_info.json").exists():
        raise ValueError(f"{labels}: is packed already; expected one *.tfrecord per video")
    paths = records.dataset_paths(labels)
    inputs = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    key = {"name": name, "split": split, "num_shards": num_shards, "inputs": inputs}
    manifest = out / MANIFEST
    if manifest.is_file():
        done = json.loads(manifest.read_text())
        if done["key"] == key:
            return done["result"] | {"up_to_date": True}
    elif out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out}: exists and was not made by `gim-jax pack`; expected a new folder")

    source = records.TFRecordSource(paths, on_error="skip")
    damaged, intact = list(source.skipped), []
    for index in range(len(source)):
        try:
            records.decode(source[index])
            intact.append(index)
        except ValueError as error:
            text = str(error)
            damaged.append(text if text.startswith(source.where(index)) else f"{source.where(index)}: {text}")
    if not intact:
        first = f"; the first: {damaged[0]}" if damaged else ""
        raise ValueError(f"{labels}: found no intact record in {len(paths)} files, expected at least 1{first}")

    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    counts = records.write_dataset(partial, name, split, num_shards, source.subset(intact))
    result = counts | {"num_files": len(paths), "num_shards": num_shards, "damaged": damaged}
    text = json.dumps({"key": key, "result": result}, indent=1)
    records.write_atomic(partial / MANIFEST, lambda file: file.write(text.encode()))
    if out.exists():
        previous = out.with_name(f".{out.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        out.rename(previous)
        partial.rename(out)
        shutil.rmtree(previous)
    else:
        partial.rename(out)
    return result | {"up_to_date": False}
