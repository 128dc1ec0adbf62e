"""`gim-jax pack`: merge the labels of videos into one folder of training records."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from gim_jax.data import records
from gim_jax.data.json_file import read_json, write_json

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
    nothing. A folder holds one split.

    Returns: dict(num_records, num_duplicates, num_files, num_shards, damaged=[one line each], up_to_date).
    Raises: ValueError if there is nothing to pack, or if `out` was not made by packing, or of another name or split.
    """
    labels, out = Path(labels), Path(out)
    if not labels.is_dir():
        raise ValueError(f"{labels}: no such folder; expected the output of a labelling run")
    if (labels / "dataset_info.json").exists():
        raise ValueError(f"{labels}: is packed already; expected one *.tfrecord per video")
    paths = records.dataset_paths(labels)
    inputs = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in paths]
    key = {"name": name, "split": split, "num_shards": num_shards, "inputs": inputs}
    done = read_json(out / MANIFEST)
    if done is not None:
        try:
            there, result = done["key"], done["result"]
            one, two = f"{there['name']}-{there['split']}", f"{name}-{split}"
        except (KeyError, TypeError) as error:
            raise ValueError(f"{out / MANIFEST}: was not written by `gim-jax pack`; remove the folder") from error
        if one != two:
            raise ValueError(f"{out}: holds {one}, expected another folder for {two}")
        if there == key and _is_whole(out, split):
            return result | {"up_to_date": True}
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
    write_json(partial / MANIFEST, {"key": key, "result": result})
    if out.exists():
        previous = out.with_name(f".{out.name}.previous")
        shutil.rmtree(previous, ignore_errors=True)
        out.rename(previous)
        partial.rename(out)
        shutil.rmtree(previous)
    else:
        partial.rename(out)
    return result | {"up_to_date": False}


def _is_whole(folder: Path, split: str) -> bool:
    """Are all shards there?"""
    try:
        return bool(records.dataset_paths(folder, split))
    except ValueError:
        return False
