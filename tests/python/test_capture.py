"""The recorder: what calls it takes and what it refuses."""

import numpy as np
import pytest
from capture_packages import MISSING, require

require(MISSING)

import torch  # noqa: E402
import transformers  # noqa: E402
from capture_zoo import CACHE, TOKENS, ZOO, build, sequence  # noqa: E402
from kvreplay import capture  # noqa: E402
from kvreplay.capture.rotation import Frequencies  # noqa: E402
from kvreplay.trace import Trace  # noqa: E402
from transformers import DynamicCache, StaticCache  # noqa: E402


@pytest.fixture
def llama():
    return build(ZOO["llama"], "sdpa")


def feed(model, pieces, ids=None):
    """Runs `ids` in calls of the given sizes, with a cache, which is returned."""
    ids = sequence(sum(pieces)) if ids is None else ids
    cache, at = DynamicCache(config=model.config), 0
    with torch.no_grad():
        for size in pieces:
            model(ids[:, at : at + size], use_cache=True, **{CACHE: cache})
            at += size
    return cache


def once(model, path, ids, **options):
    """A trace of one call."""
    with capture.recorder(model, path, **options), torch.no_grad():
        model(ids)
    return Trace(path)


def assert_same(one, other, limit=1e-5):
    """q, k, v and o of two traces agree within `limit` of their norm."""
    assert one.layers == other.layers
    for index in one.layers:
        for name in "qkvo":
            a, b = getattr(one.layer(index), name), getattr(other.layer(index), name)
            assert a.shape == b.shape and np.linalg.norm(a - b) <= limit * np.linalg.norm(b), (index, name)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3", "gpt_oss", "gpt_neox"])
@pytest.mark.parametrize("pieces", [(50, 30), (16, 16, 16, 16, 16), (70, *[1] * 10)], ids=["two", "chunks", "decode"])
def test_calls_in_pieces_make_the_same_trace(tmp_path, name, pieces):
    model = build(ZOO[name], ZOO[name].attentions[0])
    with capture.recorder(model, tmp_path / "pieces.h5"):
        feed(model, pieces)
    got = Trace(tmp_path / "pieces.h5")
    assert got.prompt_tokens == (70 if 1 in pieces else TOKENS)
    assert_same(got, once(model, tmp_path / "once.h5", sequence()))


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 3e-2)])
def test_generate_equals_teacher_forcing(tmp_path, dtype, limit):
    model = build(ZOO["llama"], "sdpa", getattr(torch, dtype))
    with capture.recorder(model, tmp_path / "generated.h5", include="logprob"):
        ids = model.generate(sequence(40), max_new_tokens=25, do_sample=False, eos_token_id=None, pad_token_id=0)
    generated = Trace(tmp_path / "generated.h5")
    assert (generated.tokens, generated.prompt_tokens) == (64, 40)  # the last token is never fed
    assert np.array_equal(generated.header.token_id, ids[0, :64].numpy())
    assert generated.header.segment.tolist() == [1] * 40 + [4] * 24
    forced = once(model, tmp_path / "forced.h5", ids[:, :64], prompt_tokens=40, include="logprob")
    assert_same(generated, forced, limit)
    assert forced.header.segment.tolist() == [1] * 40 + [3] * 24
    # generate asks for the prompt's last logits only: the rest comes from a pass of its own
    assert np.abs(generated.header.logprob - forced.header.logprob).max() <= 20 * limit


def test_logprobs_are_the_model_s(llama, tmp_path):
    trace = once(llama, tmp_path / "t.h5", sequence(), include="logprob")
    with torch.no_grad():
        log_p = torch.log_softmax(llama(sequence()).logits[0, :-1], -1)
    want = log_p.gather(1, sequence()[0, 1:, None])[:, 0].numpy()
    assert trace.header.logprob[0] == 0
    assert np.allclose(trace.header.logprob[1:], want, rtol=0, atol=1e-6)


@pytest.mark.parametrize("known", [True, False], ids=["prompt given", "prompt found"])
def test_queries_and_their_index(llama, tmp_path, known):
    prompt = {"prompt_tokens": 70} if known else {}
    with capture.recorder(llama, tmp_path / "few.h5", queries="last:8,decode", include="gradient", **prompt):
        feed(llama, (40, 30, *[1] * 10))
    with capture.recorder(llama, tmp_path / "all.h5", include="gradient", **prompt):
        feed(llama, (40, 30, *[1] * 10))
    few, every = Trace(tmp_path / "few.h5"), Trace(tmp_path / "all.h5")
    for index in few.layers:
        layer = few.layer(index)
        assert layer.q_index.tolist() == list(range(62, 80)) and layer.has_q_index
        assert not every.layer(index).has_q_index
        for name in ("q", "o", "e"):
            assert np.array_equal(layer.words(name), every.layer(index).words(name)[:, 62:])
        assert np.array_equal(layer.words("k"), every.layer(index).words("k"))


def test_a_rotation_that_changes_midway_is_stored_rotated(tmp_path):
    """Dynamic NTK frequencies grow with the sequence; keys in the cache keep the ones they were rotated with."""
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=48, intermediate_size=64, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=2, max_position_embeddings=64, rope_parameters=rope,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    with capture.recorder(model, tmp_path / "t.h5", queries="last:30,decode") as recorder:
        cache = feed(model, (40, 16, 10, *[1] * 14))
    assert set(recorder.layers_post) == {0, 1} and "reproduce" in recorder.layers_post[0]
    trace = Trace(tmp_path / "t.h5")
    for index in trace.layers:
        assert trace.layer(index).rope == "post"
        assert np.array_equal(trace.layer(index).k, cache.layers[index].keys[0].numpy())


def test_a_rotation_that_is_not_understood_is_never_called_none(llama, tmp_path, monkeypatch):
    """GPT-J keeps tables of sines instead of frequencies, HunYuan normalises after rotating: such keys stay rotated."""
    monkeypatch.setattr(Frequencies, "__init__", lambda self, decoder: setattr(self, "modules", []))
    trace = once(llama, tmp_path / "t.h5", sequence())
    assert trace.model.rope_type == "unknown" and not trace.model.inv_freq.any()
    assert {trace.layer(index).rope for index in trace.layers} == {"post"}


def test_extras_go_to_the_layers_asked_for(llama, tmp_path):
    trace = once(
        llama, tmp_path / "t.h5", sequence(), include=["wo", "gradient", "sampled_gradient:3"], include_layers=[0, 2]
    )
    assert trace.layer(1).names == ("q", "k", "v", "o")
    assert trace.layer(2).names == ("q", "k", "v", "o", "wo", "e", "g")
    assert np.array_equal(trace.layer(2).wo, llama.model.layers[2].self_attn.o_proj.weight.detach().numpy())
    assert trace.layer(0).g.shape == (3, 6, TOKENS, 8)


class Letters:
    """A tokenizer's one method that is used."""

    def decode(self, ids):
        return chr(ord("0") + ids[0])


def test_tokens_can_be_left_out(llama, tmp_path):
    text = once(llama, tmp_path / "a.h5", sequence(), tokenizer=Letters()).header
    assert text.text == [chr(ord("0") + i) for i in sequence()[0].tolist()]
    none = once(llama, tmp_path / "b.h5", sequence(), tokenizer=Letters(), tokens=False).header
    assert none.token_id is None and none.text is None


def test_segments(llama, tmp_path):
    named = [("system", 10), ("context", 20), ("question", 5)]
    trace = once(llama, tmp_path / "t.h5", sequence(), prompt_tokens=60, segments=named)
    assert trace.header.segment.tolist() == [0] * 10 + [1] * 20 + [2] * 5 + [1] * 25 + [3] * 20
    with pytest.raises(capture.CaptureError, match="preamble"):
        once(llama, tmp_path / "u.h5", sequence(), segments=[("preamble", 3)])


def test_embeddings_instead_of_ids(llama, tmp_path):
    with capture.recorder(llama, tmp_path / "t.h5"), torch.no_grad():
        llama(inputs_embeds=llama.get_input_embeddings()(sequence()))
    trace = Trace(tmp_path / "t.h5")
    assert trace.header.token_id is None
    assert_same(trace, once(llama, tmp_path / "u.h5", sequence()), 0)


# --- refusals --------------------------------------------------------------------------------------------------------


def refused(model, tmp_path, words, call, **options):
    """`call(model)` inside a recording raises CaptureError with `words`, leaves no file and a model as before."""
    before = model.config._attn_implementation
    with pytest.raises(capture.CaptureError, match=words):
        with capture.recorder(model, tmp_path / "t.h5", **options), torch.no_grad():
            call(model)
    assert list(tmp_path.iterdir()) == []
    assert model.config._attn_implementation == before


def twice(model):
    model(sequence())
    model(sequence())


def without_cache(model):
    model(sequence(), use_cache=False)
    model(sequence(), position_ids=torch.arange(TOKENS, 2 * TOKENS)[None], use_cache=False)


def static(model):
    cache = StaticCache(config=model.config, max_cache_len=128)
    model(sequence(), use_cache=True, **{CACHE: cache})


def masked(first, last):
    def call(model):
        mask = torch.ones(1, TOKENS, dtype=torch.int64)
        mask[0, first:last] = 0
        model(sequence(), attention_mask=mask)

    return call


def blocks(model):
    """A mask that is causal within blocks of 20 tokens."""
    index = torch.arange(TOKENS)
    same = index[:, None] // 20 == index // 20
    model(sequence(), attention_mask=(same & (index[:, None] >= index))[None, None])


def bidirectional(model):
    model(sequence(), attention_mask=torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool))


@pytest.mark.parametrize(
    ("words", "call"),
    [
        ("batch of 2", lambda model: model(sequence().expand(2, -1))),
        ("left padding", masked(0, 3)),
        ("hides tokens", masked(77, 80)),
        ("does not continue the sequence", twice),
        ("does not continue the sequence", without_cache),
        ("static", static),
        ("neither causal", blocks),
        ("neither causal", bidirectional),
        ("not called", lambda model: None),
        ("prompt_tokens is 99", None),
    ],
    ids=["batch", "left", "right", "twice", "no cache", "static", "blocks", "bidirectional", "nothing", "prompt"],
)
def test_calls_that_a_trace_cannot_hold(llama, tmp_path, words, call):
    if call is None:
        refused(llama, tmp_path, words, lambda model: model(sequence()), prompt_tokens=99)
    else:
        refused(llama, tmp_path, words, call)


@pytest.mark.parametrize(
    ("words", "options"),
    [
        ("layer 7 has no softmax attention; layers that have: 0-2", {"layers": [7]}),
        ("layers is empty", {"layers": []}),
        ("'first:3' is none of", {"queries": "first:3"}),
        ("'hessian' is none of", {"include": "wo,hessian"}),
        ("layer 1 is not among the recorded", {"layers": [0], "include": "wo", "include_layers": [1]}),
        ("leaves no row", {"queries": "decode"}),
    ],
)
def test_requests_that_make_no_sense(llama, tmp_path, words, options):
    refused(llama, tmp_path, words, lambda model: model(sequence()), **options)


def test_training_mode_and_compiled_models(llama, tmp_path):
    refused(llama.train(), tmp_path, "training mode", twice)
    refused(torch.compile(llama.eval()), tmp_path, "compiled", twice)


def test_two_recordings_at_once(llama, tmp_path):
    with pytest.raises(capture.CaptureError, match="recorded already"):
        with capture.recorder(llama, tmp_path / "a.h5"), capture.recorder(llama, tmp_path / "b.h5"):
            pass
    assert list(tmp_path.iterdir()) == [] and llama.config._attn_implementation == "sdpa"


def test_two_models_of_a_kind_at_once(llama, tmp_path):
    other = build(ZOO["llama"], "eager", seed=5)
    with capture.recorder(llama, tmp_path / "a.h5"), capture.recorder(other, tmp_path / "b.h5"), torch.no_grad():
        llama(sequence())
        other(sequence())
    assert_same(Trace(tmp_path / "a.h5"), once(llama, tmp_path / "c.h5", sequence()), 0)
    assert_same(Trace(tmp_path / "b.h5"), once(other, tmp_path / "d.h5", sequence()), 0)
    assert {Trace(tmp_path / name).layer(0).rope for name in ("a.h5", "b.h5")} == {"pre"}


def test_latent_attention_names_the_layer(tmp_path):
    config = transformers.DeepseekV3Config(
        vocab_size=64, hidden_size=48, intermediate_size=64, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, kv_lora_rank=16, q_lora_rank=24, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, n_routed_experts=4, n_group=1, topk_group=1, num_experts_per_tok=1,
        first_k_dense_replace=2,
    )  # fmt: skip
    model = transformers.DeepseekV3ForCausalLM(config).eval()
    refused(model, tmp_path, r"layer 1 \(model.layers.1.self_attn\): multi-head latent attention", twice, layers=[1])


def test_cross_attention_names_the_layer(tmp_path):
    config = transformers.BartConfig(
        vocab_size=64, d_model=48, encoder_layers=1, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=32, decoder_ffn_dim=32, max_position_embeddings=128,
    )  # fmt: skip
    model = transformers.BartForConditionalGeneration(config).eval()
    refused(model, tmp_path, r"layer 0 \(model.decoder.layers.0.encoder_attn\): cross-attention", twice)


def test_a_model_that_does_more_to_its_attention(llama, tmp_path, monkeypatch):
    """Arithmetic that the trace cannot say is found by replaying a few rows before the file is complete."""
    import transformers.models.llama.modeling_llama as source

    stock = source.eager_attention_forward
    llama.config._attn_implementation = "eager"
    monkeypatch.setattr(source, "eager_attention_forward", lambda m, q, k, v, *a, **o: stock(m, q * 1.2, k, v, *a, **o))
    refused(llama, tmp_path, "layer 0 .* replayed from the recording is .* off", lambda model: model(sequence()))
