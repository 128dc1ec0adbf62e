"""A model as a folder in the layout of a model hub: model.safetensors, config.json and README.md, the model card.

`gim_jax.load_matcher` takes such a folder as `weights`. Nothing is sent anywhere: `hf upload NAME FOLDER` does that.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import jax

from gim_jax import __version__
from gim_jax.api import load_matcher
from gim_jax.data.json_file import write_json
from gim_jax.data.tfrecord import write_atomic
from gim_jax.models import get_model
from gim_jax.weights import store

LICENCES = {"Apache-2.0": "apache-2.0", "MIT": "mit"}  # ours -> the hub's; all others are "other" with their own words
CARD = """---
library_name: gim-jax
license: {licence}
{licence_name}tags:
- image-matching
- jax
- flax
---

# {name}

Weights of the image matcher `{name}` (family {family}, {num_params:,} parameters) for
gim-jax {version}. They come from: {source}.

Licence of the weights: {words}.

```python
import gim_jax

matcher = gim_jax.load_matcher("{name}", "FOLDER")  # this folder
matches = matcher("a.jpg", "b.jpg")  # kpts0, kpts1 [M, 2] px, conf [M]
```

`model.safetensors` (sha256 `{sha256}`) holds the arrays, and the configuration in its header;
`config.json` repeats the configuration.{figures}
"""


def write_folder(name: str, weights: str | Path, out: str | Path) -> dict[str, Any]:
    """Write the folder `out`, which is made if it is not there; the card last.

    Args:
      name: of a model. weights: its .safetensors file, checked against the model first.

    Returns:
      the content of config.json.

    Raises:
      ValueError: what `load_matcher` refuses, a model without weights, a file in the place of the folder.
    """
    out, info = Path(out), get_model(name)
    if info.family == "rootsift":
        raise ValueError("model: rootsift has no weights")
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out}: is a file, expected a folder to write")
    matcher = load_matcher(name, weights)  # refuses what does not belong to it
    _, meta, sha256 = store.read(weights)
    config = {
        "library_name": "gim-jax",
        "model": name,
        "family": info.family,
        "config": meta.get("config") or {},
        "licence": info.licence,
        "source": info.weights_source,
        "sha256": sha256,
        "settings": matcher.describe()["settings"],
    }
    known = LICENCES.get(info.licence)
    figures = ", ".join(f"{figure} {value:g}" for figure, value in info.published.items())
    card = CARD.format(
        name=name,
        family=info.family,
        num_params=sum(int(leaf.size) for leaf in jax.tree.leaves(matcher.variables)),
        version=__version__,
        source=info.weights_source,
        licence=known or "other",
        licence_name="" if known else f"license_name: {json.dumps(info.licence)}\n",
        words=info.licence,
        sha256=sha256,
        figures=f"\n\nPublished by the authors of the model, not measured here: {figures}." if figures else "",
    )
    out.mkdir(parents=True, exist_ok=True)
    with open(store.file_of(weights), "rb") as source:
        write_atomic(out / store.HUB_FILE, lambda file: shutil.copyfileobj(source, file))
    write_json(out / "config.json", config)
    write_atomic(out / "README.md", lambda file: file.write(card.encode()))
    return config
