"""kvreplay.similarity: every streamed number against the T x T matrix, the golden merging sets, and bad input."""

import numpy as np
import pandas as pd
import pytest
from kvreplay import matrices
from kvreplay.rotation import rotate
from kvreplay.schema import Header, LayerData, Model
from kvreplay.similarity import cosines
from kvreplay.similarity.__main__ import main
from kvreplay.similarity.trace import analyse, sentences
from kvreplay.trace import Trace, write

SAMPLE = "smollm2-135m-wikitext2.h5"
GOLDEN_KEYS = np.array([[1, 0], [0.2, 1], [0.3, 1.1], [0.5, 1], [-1, 0.4]])


def unit(tokens: int, d: int = 6, seed: int = 0) -> np.ndarray:
    """Rows that share a direction, as keys do."""
    return cosines.unit_rows([np.random.default_rng(seed).standard_normal((tokens, d)) + 1])


def ranks_of(values: np.ndarray) -> np.ndarray:
    """Ranks from 0; equal values share the mean of theirs."""
    return np.array([(values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


# ---- golden keys of merge-methods.md 2.10


def test_golden_adjacent_cosines():
    found = cosines.adjacent(cosines.unit_rows([GOLDEN_KEYS]))
    np.testing.assert_allclose(found, [0.196116135, 0.997630328, 0.980580676, -0.083045480], atol=1e-7)


@pytest.mark.parametrize(
    ("threshold", "sets"), [(0.75, [0, 1, 1, 1, 2]), (0.99, [0, 1, 1, 2, 3]), (1.0, [0, 1, 2, 3, 4]), (-1, [0] * 5)]
)
def test_golden_merging_sets(threshold, sets):
    found = cosines.adjacent(cosines.unit_rows([GOLDEN_KEYS]))
    assert cosines.merging_sets(found, threshold).tolist() == sets
    assert cosines.sparsity(found, threshold) == 1 - (sets[-1] + 1) / 5


# ---- against the whole matrix


def test_unit_rows_in_pieces_zero_and_huge():
    rows = np.array([[3, 4], [0, 0], [1e38, -1e38], [1e-40, 0]], np.float32)
    whole = cosines.unit_rows([rows])
    np.testing.assert_allclose(whole, [[0.6, 0.8], [0, 0], [0.5**0.5, -(0.5**0.5)], [1, 0]], rtol=1e-6)
    np.testing.assert_array_equal(cosines.unit_rows([rows[:1], rows[1:]]), whole)


@pytest.mark.parametrize("tokens", [6, 101, 700])
@pytest.mark.parametrize("block", [7, 512])
def test_lags_are_diagonals(tokens, block):
    rows = unit(tokens)
    whole = rows.astype(np.float64) @ rows.T.astype(np.float64)
    expected = [np.diagonal(whole, lag).mean() for lag in range(1, min(100, tokens - 1) + 1)]
    np.testing.assert_allclose(cosines.lag_means(rows, block), expected, atol=1e-6)
    assert cosines.lag_means(rows)[0] == pytest.approx(cosines.adjacent(rows).mean(), abs=1e-6)


@pytest.mark.parametrize("tokens", [6, 128, 129, 300])
def test_maps_are_means_of_blocks(tokens):
    rows, edges = unit(tokens), cosines.block_edges(tokens)
    assert edges[0] == 0 and edges[-1] == tokens and len(edges) - 1 <= 128 and (np.diff(edges) > 0).all()
    whole = rows.astype(np.float64) @ rows.T.astype(np.float64)
    means = cosines.block_means(rows, edges)
    for a, b in np.ndindex(means.shape):
        block = whole[edges[a] : edges[a + 1], edges[b] : edges[b + 1]]
        others = block[~np.eye(len(block), dtype=bool)] if a == b and len(block) > 1 else block
        assert means[a, b] == pytest.approx(others.mean(), abs=1e-6), (a, b)
    assert cosines.overall_mean(rows) == pytest.approx(whole[~np.eye(tokens, dtype=bool)].mean(), abs=1e-6)


# ---- rank correlation


def test_pairs_are_those_of_asymkv_and_the_same_every_time():
    i, j = cosines.neighbour_pairs(5000)
    assert (i.min(), i.max(), j.min()) == (5, 999, 1) and (j <= i - 2).all() and len(i) == 2000
    assert all(np.array_equal(a, b) for a, b in zip((i, j), cosines.neighbour_pairs(5000), strict=True))
    i, j = cosines.neighbour_pairs(6)
    assert set(i) == {5} and set(j) == {1, 2, 3}
    assert cosines.ends(1000).tolist() == list(range(1000))
    assert cosines.ends(1002).tolist() == [*range(500), *range(502, 1002)]


def test_rank_correlation_by_counting():
    rows = unit(40)
    i, j = cosines.neighbour_pairs(40)
    whole = rows @ rows.T
    rank = np.zeros((40, 40))
    rank[np.tril_indices(40, -1)] = ranks_of(whole[np.tril_indices(40, -1)])
    expected = np.corrcoef(rank[i, j], rank[i, j + 1])[0, 1]
    assert cosines.neighbour_rank_correlation(rows, i, j) == pytest.approx(expected, abs=1e-9)


def test_rank_correlation_of_smooth_random_and_constant_rows():
    rng = np.random.default_rng(1)
    walk = cosines.unit_rows([np.cumsum(rng.standard_normal((900, 8)), axis=0)])
    noise = cosines.unit_rows([rng.standard_normal((900, 64))])
    pairs = cosines.neighbour_pairs(900)
    assert cosines.neighbour_rank_correlation(walk, *pairs) > 0.95
    assert abs(cosines.neighbour_rank_correlation(noise, *pairs)) < 0.1
    assert np.isnan(cosines.neighbour_rank_correlation(np.zeros((900, 2), np.float32), *pairs))


# ---- the command


def test_command(data, tmp_path, capsys):
    assert main([str(data / SAMPLE), "--out", str(tmp_path / "out")]) == 0
    said, _, written = capsys.readouterr().out.partition("\n\n")
    stems = ["adjacent", "lag", "rank", "sets", *(f"map-{layer:03d}" for layer in (0, 9, 19, 29))]
    names = {f"similarity-{stem}.{kind}" for stem in stems for kind in ("pdf", "png", "csv")}
    assert {p.name for p in (tmp_path / "out").iterdir()} == names == {p.rsplit("/", 1)[1] for p in written.split()}
    tables = {stem: pd.read_csv(tmp_path / f"out/similarity-{stem}.csv") for stem in stems}
    assert all({"layer", "head", "matrix", "quantity", "value"} <= set(table) for table in tables.values())
    assert len(said.splitlines()) == 5
    trace = Trace(data / SAMPLE)
    layer = trace.layer(19)
    turned = rotate(layer.k[1], trace.header.position, trace.model, trace.dtype)
    for name, rows in (("k_post", turned), ("k_pre", layer.k[1]), ("v", layer.v[1])):
        _check_numbers({stem: _one(table, name) for stem, table in tables.items()}, rows.astype(np.float64), name)
    sets = tables["sets"]
    for threshold, same in sets[sets["layer"] == 19].groupby("threshold"):
        heads = same[same["quantity"] == "sparsity"]["value"]
        moments = same[same["head"] == "all"].set_index("quantity")["value"]
        assert moments["sparsity_mean"] == pytest.approx(heads.mean()) and len(heads) == 3, threshold
        assert moments["sparsity_std"] == pytest.approx(heads.std(ddof=0))
    means = sets[sets["quantity"] == "sparsity_mean"].groupby("threshold")["value"].mean()
    assert f"{means[0.75]:.1%} above a cosine of 0.75" in said


def _one(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """Layer 19, KV head 1, one matrix."""
    return table[(table["layer"] == 19) & (table["head"].astype(str) == "1") & (table["matrix"] == name)]


def _check_numbers(tables: dict[str, pd.DataFrame], rows: np.ndarray, name: str) -> None:
    """Tables of one head and matrix against its whole cosine matrix."""
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    whole = rows @ rows.T
    neighbours = np.diagonal(whole, 1)
    adjacent = tables["adjacent"].set_index("quantity")["value"]
    expected = {f"adjacent_p{p:02d}": np.percentile(neighbours, p) for p in (5, 25, 50, 75, 95)}
    expected |= {"adjacent_mean": neighbours.mean(), "mean": whole[~np.eye(len(whole), dtype=bool)].mean()}
    assert adjacent.to_dict() == pytest.approx(expected, abs=1e-5)
    lags = tables["lag"].set_index("lag")["value"]
    assert lags.index.tolist() == list(range(1, 101))
    assert lags[37] == pytest.approx(np.diagonal(whole, 37).mean(), abs=1e-5)
    blocks = tables["map-019"].set_index(["token", "other_token"])["value"]
    assert len(blocks) == 128 * 129 // 2
    assert blocks[800, 64] == pytest.approx(whole[800:808, 64:72].mean(), abs=1e-4)
    correlation = tables["rank"]["value"].item()
    assert -1 <= correlation <= 1
    if name == "k_post":
        sets = tables["sets"].set_index("threshold")["value"]
        assert sets.to_dict() == pytest.approx({e: (neighbours > e).sum() / 1024 for e in sets.index}, abs=2e-3)
    else:
        assert tables["sets"].empty


def make_trace(path, tokens=20, **options):
    rng = np.random.default_rng(3)
    q, k, v = (rng.standard_normal((heads, tokens, 4)) for heads in (2, 1, 1))
    model = Model(1, 2, 1, 4, 4, 0, 1.0, rope_type="default", inv_freq=np.array([1, 0.1], np.float32))
    write(path, Header(tokens, tokens, "float32", model), [LayerData(0, q, k, v, **options)])
    return path


def test_a_trace_of_rotated_keys(tmp_path, capsys):
    path = make_trace(tmp_path / "x.h5", rope="post")
    assert main([str(path), "--out", str(tmp_path / "out")]) == 0
    assert "pre-RoPE" not in capsys.readouterr().out
    assert set(pd.read_csv(tmp_path / "out" / "similarity-lag.csv")["matrix"]) == {"k_post", "v"}


def test_the_same_numbers_whatever_the_blocks(tmp_path, monkeypatch):
    trace = Trace(make_trace(tmp_path / "x.h5"))
    whole, blocks = analyse(trace), matrices.blocks
    monkeypatch.setattr(matrices, "blocks", lambda *where: blocks(*where, size=3))
    pieces = analyse(trace)
    for name in ("values", "lags", "sets"):
        pd.testing.assert_frame_equal(getattr(pieces, name), getattr(whole, name))
    assert list(sentences(pieces)) == list(sentences(whole))


def test_bad_input(data, tmp_path, capsys):
    (tmp_path / "broken.h5").write_bytes(b"nothing")
    (tmp_path / "file").touch()
    short, out = make_trace(tmp_path / "short.h5", tokens=5), tmp_path / "out"
    for path, folder, code, words in (
        (short, out, 2, "5 tokens are too few, 6 are needed"),
        (tmp_path / "broken.h5", out, 3, "cannot be opened"),
        (tmp_path / "missing.h5", out, 3, "cannot be opened"),
        (make_trace(tmp_path / "least.h5", tokens=6), tmp_path / "file" / "out", 2, "file"),
    ):
        assert main([str(path), "--out", str(folder)]) == code
        error = capsys.readouterr().err
        assert error.startswith("kvreplay.similarity: ") and error.count("\n") == 1 and words in error
        assert not out.exists()
