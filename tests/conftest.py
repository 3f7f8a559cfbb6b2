"""Where the tests find things; and a test skips only for the reason that it prints."""
import os, sys
from configparser import ConfigParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")      # tiny models run several times faster
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]


def pytest_report_header(config):
    data = data_dir()
    absent = f"{data} is absent, tests that compare with it skip"
    return f"published data: {data if data.is_dir() else absent}"


def data_dir() -> Path:
    "Data that others published: $TRANSFORMER2_DATA, else ../shared/data beside the repository."
    return Path(os.environ.get("TRANSFORMER2_DATA") or ROOT.parent / "shared" / "data")


@pytest.fixture(scope="session")
def root() -> Path:
    "The folder that holds settings.ini."
    return ROOT


@pytest.fixture(scope="session")
def settings() -> dict:
    "settings.ini."
    parser = ConfigParser(); parser.read(ROOT / "settings.ini", encoding="utf-8")
    return dict(parser["DEFAULT"])


@pytest.fixture(scope="session")
def published() -> Path:
    "The folder of published data, or a skip that says where it was looked for."
    if not data_dir().is_dir():
        pytest.skip(f"no published data at {data_dir()}; set TRANSFORMER2_DATA")
    return data_dir()
