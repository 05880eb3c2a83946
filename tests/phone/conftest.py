"""What the tests of emulated phones share: the page, a server for it, and phones."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from emulated_phone import Phone
from phone_site import Site, serving
from phone_tools import WEB, run_node
from small_net import CLASSES, SHAPE, SmallBundle

from fedpara_edge.formats.bundle import Bundle


@pytest.fixture(scope="session")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("page") / "page"
    run_node(WEB / "build.mjs", folder, "--compress")
    return folder


@pytest.fixture
def bundle(small_bundle: SmallBundle) -> Bundle:
    return small_bundle("sgd", dropout=0.2)


@pytest.fixture
def site(page: Path, bundle: Bundle) -> Iterator[Site]:
    with serving(Site(page)) as site:
        site.hand_out("bundle", bundle.path)
        yield site


@pytest.fixture
def phone(tmp_path: Path, site: Site) -> Callable[..., Phone]:
    """Make a phone with a name and examples of its own."""

    def make(name: str, *, examples: int = 29) -> Phone:
        random = np.random.default_rng(len(name))
        x = random.standard_normal((examples, *SHAPE), dtype=np.float32)
        np.savez_compressed(tmp_path / f"{name}.npz", x=x, y=random.integers(0, CLASSES, examples))
        return Phone(tmp_path / f"{name}.profile", tmp_path / f"{name}.npz", site.url)

    return make
