"""e and g against plain autograd, chunk by chunk."""

import numpy as np
import pytest
from capture_packages import MISSING, require

require(MISSING)

import torch  # noqa: E402
from capture_zoo import CACHE, TOKENS, ZOO, build, sequence  # noqa: E402
from kvreplay import capture  # noqa: E402
from kvreplay.capture.gradients import chunk_bounds  # noqa: E402
from kvreplay.trace import Trace  # noqa: E402
from transformers import DynamicCache  # noqa: E402

CHUNK, PROMPT, SAMPLES, SEED = 32, 50, 3, 7


def reference(model, first, end, loss_of):
    """dLoss/do [layers][Hq, n, Dv] for tokens [first, end), what comes before a constant: autograd with respect to a
    zero added to the input of every output projection."""
    ids, cache = sequence(), DynamicCache(config=model.config)
    if first:
        with torch.no_grad():
            model(ids[:, :first], use_cache=True, **{CACHE: cache})
    layers = model.model.layers
    zeros = [torch.zeros(1, end - first, 48, requires_grad=True) for _ in layers]
    hooks = [
        layer.self_attn.o_proj.register_forward_pre_hook(lambda _m, args, zero=zero: (args[0] + zero,))
        for layer, zero in zip(layers, zeros, strict=True)
    ]
    with torch.enable_grad():
        log_p = torch.log_softmax(model(ids[:, first:end], use_cache=True, **{CACHE: cache}).logits[0], -1)
        grads = torch.autograd.grad(loss_of(log_p, ids[0, first:end]), zeros)
    for hook in hooks:
        hook.remove()
    return [grad[0].view(end - first, 6, 8).transpose(0, 1).numpy() for grad in grads]


def near(got, want, limit=1e-5):
    """|got - want| <= limit * |want|; NaN is never near."""
    return np.linalg.norm(got - want) <= limit * np.linalg.norm(want)


@pytest.fixture(scope="module", params=["llama", "mistral", "gemma2"])
def recorded(request, tmp_path_factory):
    model = build(ZOO[request.param], ZOO[request.param].attentions[0])
    path = tmp_path_factory.mktemp("gradients") / "t.h5"
    with capture.recorder(
        model, path, prompt_tokens=PROMPT, include=f"gradient,sampled_gradient:{SAMPLES}", chunk=CHUNK, seed=SEED
    ):
        with torch.no_grad():
            model(sequence())
    assert all(parameter.requires_grad for parameter in model.parameters())
    return model, Trace(path)


def test_chunks_begin_again_after_the_prompt():
    assert chunk_bounds(1024, 768, 512) == [(0, 512), (512, 768), (768, 1024)]
    assert chunk_bounds(5, 0, 2) == [(0, 2), (2, 4), (4, 5)]
    assert chunk_bounds(4, 4, 8) == [(0, 4)]


def test_e_is_the_gradient_of_each_chunk_s_mean_cross_entropy(recorded):
    model, trace = recorded
    for first, end in chunk_bounds(TOKENS, PROMPT, CHUNK):
        want = reference(model, first, end, lambda log_p, ids: -log_p[:-1].gather(1, ids[1:, None]).mean())
        for index in trace.layers:
            got = trace.layer(index).e[:, first:end]
            assert got.dtype == np.float32 and near(got, want[index]), (index, first)
            assert not got[:, -1].any()  # the chunk's last token predicts nothing inside it


def test_g_is_the_gradient_of_minus_log_p_of_the_model_s_own_draws(recorded):
    model, trace = recorded
    with torch.no_grad():
        p = torch.log_softmax(model(sequence()[:, :CHUNK]).logits[0], -1).exp()
    labels = torch.multinomial(p, SAMPLES, True, generator=torch.Generator().manual_seed(SEED))
    for sample in range(SAMPLES):
        chosen = labels[:, sample : sample + 1]
        want = reference(model, 0, CHUNK, lambda log_p, _ids, chosen=chosen: -log_p.gather(1, chosen).sum())
        for index in trace.layers:
            assert near(trace.layer(index).g[sample, :, :CHUNK], want[index]), (sample, index)
    assert trace.layer(0).g.shape == (SAMPLES, 6, TOKENS, 8)


def test_sampling_is_repeatable(tmp_path):
    model = build(ZOO["llama"], "sdpa")
    words = []
    for seed in (0, 0, 1):
        with capture.recorder(model, tmp_path / "t.h5", include="sampled_gradient:2", seed=seed), torch.no_grad():
            model(sequence())
        words.append(Trace(tmp_path / "t.h5").layer(1).words("g"))
    assert np.array_equal(words[0], words[1]) and not np.array_equal(words[0], words[2])


@pytest.mark.parametrize(("dtype", "limit", "kept"), [("float16", 5e-2, "float32"), ("bfloat16", 2e-1, "bfloat16")])
def test_narrow_types_do_not_underflow(tmp_path, dtype, limit, kept):
    path = tmp_path / "t.h5"
    model = build(ZOO["llama"], "eager", getattr(torch, dtype))
    with capture.recorder(model, path, include="gradient", chunk=CHUNK, prompt_tokens=PROMPT), torch.no_grad():
        model(sequence())
    layer = Trace(path).layer(2)
    assert layer.dtype("e") == kept
    # the same weights, rounded to the narrow type, in float32
    want = reference(model.float(), 0, CHUNK, lambda log_p, ids: -log_p[:-1].gather(1, ids[1:, None]).mean())[2]
    assert near(layer.e[:, :CHUNK], want, limit)


def test_gradients_with_a_cache_free_single_token_chunk(tmp_path):
    """A chunk of one token has no next token inside: its gradient is zero, not missing."""
    model = build(ZOO["llama"], "sdpa")
    with capture.recorder(model, tmp_path / "t.h5", include="gradient", chunk=CHUNK), torch.no_grad():
        model(sequence(CHUNK + 1))
    e = Trace(tmp_path / "t.h5").layer(0).e
    assert not e[:, CHUNK:].any() and e[:, :CHUNK].any()
