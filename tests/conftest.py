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
    from revela_nb.streams import triton_attention
    D, device = query.shape[-1], "cuda" if torch.cuda.is_available() else query.device
    q, k, v = (torch.nn.functional.pad(x, (0, max(16 - D, 0))).to(device) for x in (query, key, value))
    out = triton_attention(q, k, v, weights.to(device), key_mask.to(device), D ** -0.5 if scaling is None else scaling, *options)
    return out[..., :D].to(query.device)


def attend_by_triton(query, key, value, key_mask, pairs, own, scaling=None, *options):
    "The same for both streams in one pass."
    from revela_nb.streams import attend
    D, device = query.shape[-1], "cuda" if torch.cuda.is_available() else query.device
    q, k, v = (torch.nn.functional.pad(x, (0, max(16 - D, 0))).to(device) for x in (query, key, value))
    if torch.is_tensor(own): own = own.to(device)
    pairs = type(pairs)(**{name: x.to(device) for name, x in vars(pairs).items()})
    out = attend(q, k, v, key_mask.to(device), pairs, own, D ** -0.5 if scaling is None else scaling, *options)
    return out[..., :D].to(query.device)


@pytest.fixture(params=["matmul", "sdpa", "triton", "streams"])
def path(request, monkeypatch):
    "The in-batch stream reads by this way, and is seen to: what CPUs run in float32, what other devices and types run, the kernels of GPUs for neighbours alone, and for both streams."
    from revela_nb import attention, kernel, patching
    if request.param in ("triton", "streams") and kernel.triton is None: pytest.skip("needs triton: pip install triton (Linux)")
    way = {"matmul": attention.ReadByMatmul.apply, "sdpa": attention.read_by_sdpa, "triton": read_by_triton, "streams": attend_by_triton}[request.param]
    calls = []
    place = {"triton": (patching, "read_chunks"), "streams": (patching, "attend")}.get(request.param, (attention.ReadByMatmul, "apply"))
    if request.param == "streams":
        def listed(weights, key_mask, norm, min_weight, **options):
            return Reading(weights, key_mask, norm, min_weight, patching.double_pairs(patching.list_pairs(weights, key_mask, min_weight)), **options)
        Reading = patching.Reading
        monkeypatch.setattr(patching, "Reading", listed)
        monkeypatch.setattr(patching, "runs_triton", lambda query: True)
    monkeypatch.setattr(*place, lambda *given: calls.append(1) or way(*given))
    yield request.param
    assert calls, f"nothing was read by {request.param}"
