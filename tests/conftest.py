"""Fixtures that all tests share: short runs, and real data, where this machine has them."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported, here and in every process that a test starts: the networks are tiny, and
# two threads that wait for each other on a busy machine are many times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from hypothesis import settings

from tests.short_runs import shorten, with_reports

# A machine under load is no failure. (Hypothesis makes its choices repeatable by itself under CI.)
settings.register_profile("project", deadline=None)
settings.load_profile("project")


def pytest_collection_finish() -> None:
    """What is imported by now stays: no later collection of garbage need look at it again."""
    gc.freeze()


def _data_folder(variable: str, holds: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        pytest.skip(f"{variable} is not set: it names a folder with {holds}")
    folder = Path(value)
    if not any(folder.glob(holds)):
        pytest.fail(f"{variable} is {value}, which has no {holds}")
    return folder


@pytest.fixture(scope="session")
def isbi2012() -> Path:
    """The ISBI 2012 training slices: image/0.png ... 29.png and label/0.png ... 29.png."""
    return _data_folder("ISBI2012_DIR", "image/0.png")


@pytest.fixture(scope="session")
def mnist() -> Path:
    """MNIST as mnist_train.npz and mnist_test.npz."""
    return _data_folder("MNIST_DIR", "mnist_train.npz")


@pytest.fixture(scope="session")
def nuclei() -> Path:
    """Images of the 2018 Data Science Bowl: ID/images/ID.png and ID/masks/, a file a nucleus."""
    return _data_folder("NUCLEI_DIR", "*/masks/*.png")


@pytest.fixture(scope="module")
def short_runs() -> Iterator[None]:
    """Runs of this module draw few pictures and no report."""
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        yield


@pytest.fixture
def reports(short_runs: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """But in this test they draw their report."""
    with_reports(monkeypatch)
