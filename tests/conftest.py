"""What every test shares: threads, random state, the hypothesis profile, the data folder."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

# pytester runs pytest inside pytest. The plugin that curvlin installs is named for checkouts that are not installed.
pytest_plugins = ["pytester", "pytest_curvlin"]

# Examples of a property are cheap but their operators take time to build: no deadline, and sizes vary,
# so a slow draw is not a fault. CI repeats the same examples in every run.
_SHARED = {
    "deadline": None,
    "max_examples": 25,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}
settings.register_profile("dev", **_SHARED)
settings.register_profile("ci", derandomize=True, print_blob=True, **_SHARED)
settings.register_profile("thorough", **{**_SHARED, "max_examples": 500})


def pytest_configure(config: pytest.Config) -> None:
    default = "ci" if os.environ.get("CI") else "dev"
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", default))
    if os.environ.get("PYTEST_XDIST_WORKER"):  # one worker per core already
        torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed_and_restore() -> Iterator[None]:
    """Every test starts from the same generator and leaves torch's defaults as it found them."""
    dtype, threads = torch.get_default_dtype(), torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(dtype)
    if torch.get_num_threads() != threads:
        torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of real data sets, from CURVLIN_DATA; the test is skipped where there is none."""
    folder = os.environ.get("CURVLIN_DATA")
    if not folder or not Path(folder).is_dir():
        pytest.skip("CURVLIN_DATA names no folder of data sets")
    return Path(folder)
