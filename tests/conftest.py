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


def read_by_triton(query, key, value, weights, key_mask, scaling=None, *options):
    "The kernels want heads of 16 at least: narrower ones get zeros, which change no score, no value's length and no gradient. Where there is a GPU they run on it."
    from revela_nb.kernel import triton_attention
    D, device = query.shape[-1], "cuda" if torch.cuda.is_available() else query.device
    q, k, v = (torch.nn.functional.pad(x, (0, max(16 - D, 0))).to(device) for x in (query, key, value))
    out = triton_attention(q, k, v, weights.to(device), key_mask.to(device), D ** -0.5 if scaling is None else scaling, *options)
    return out[..., :D].to(query.device)


@pytest.fixture(params=["matmul", "sdpa", "triton"])
def path(request, monkeypatch):
    "The in-batch stream reads by this way, and is seen to: what CPUs run in float32, what other devices and types run, and the kernels of GPUs."
    from revela_nb import attention, kernel, patching
    if request.param == "triton" and kernel.triton is None: pytest.skip("needs triton: pip install triton (Linux)")
    way = {"matmul": attention.ReadByMatmul.apply, "sdpa": attention.read_by_sdpa, "triton": read_by_triton}[request.param]
    calls = []
    place = (patching, "read_chunks") if request.param == "triton" else (attention.ReadByMatmul, "apply")
    monkeypatch.setattr(*place, lambda *given: calls.append(1) or way(*given))
    yield request.param
    assert calls, f"nothing was read by {request.param}"
