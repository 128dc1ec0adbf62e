"""The site says what is true: its commands are accepted, its pictures exist, its table names every model."""

import argparse
import dataclasses
import importlib
import re
import shlex
from pathlib import Path

import pytest

from gim_jax.cli import COMMANDS
from gim_jax.matchers import Preset
from gim_jax.models import MODELS

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(DOCS.rglob("*.md"))


def commands() -> list[str]:
    found = []
    for page in PAGES:
        text = page.read_text()
        found += re.findall(r"^(gim-jax .+)$", text, re.M) + re.findall(r"`(gim-jax [a-z]+ [^`]+)`", text)
    return sorted(set(found))


@pytest.mark.parametrize("line", commands())
def test_commands_are_accepted(line):
    _, name, *words = shlex.split(line)
    assert name in COMMANDS
    if name in ("records", "eval") and words[0] in ("verify", "compare"):
        return  # commands of their own, tested with them
    parser = argparse.ArgumentParser(exit_on_error=False)
    module = importlib.import_module(f"gim_jax.cli.{name}")
    module.add_arguments(parser)
    _, rest = parser.parse_known_args(words)
    assert all(word.startswith("--config.") for word in rest), f"{rest} not accepted"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_and_pictures_exist(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).is_file(), target


def test_table_names_every_model():
    text = (DOCS / "models.md").read_text()
    assert [name for name in MODELS if f"`{name}`" not in text] == []


def test_settings_exist():
    """What the pages change by `--set` is a field of a network, of a resizing or of a detector."""
    parts = [Preset, *(MODELS[name].config for name in ("gim_dkm", "gim_loftr", "gim_lightglue"))]
    known = {"key"} | {field.name for part in parts for field in dataclasses.fields(part)}
    detector = MODELS["gim_lightglue"].config.extractor
    known |= {f"extractor.{field.name}" for field in dataclasses.fields(detector)}
    pages = [*PAGES, DOCS.parent / "README.md"]
    named = {key for page in pages for key in re.findall(r"--set ([a-z_.]+)=", page.read_text())}
    assert named - known == set()
