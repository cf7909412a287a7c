"""No network in tests, quiet libraries, Triton's interpreter where there is no GPU, and the optional folder of shared data."""
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest  # noqa: E402
import torch  # noqa: E402

if not torch.cuda.is_available(): os.environ.setdefault("TRITON_INTERPRET", "1")    # before any test imports triton: it looks when a kernel is defined


@pytest.fixture
def shared():
    "The folder of golden numbers and data sets beside the checkout; tests that need it skip where it is absent."
    folder = Path(__file__).parents[2] / "shared"
    if not (folder / "data").is_dir(): pytest.skip("../shared is not here")
    return folder
