"""Scores from vectors on disk: against the formulas written out in full, in memory."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from isoray.attribution import vectors
from isoray.attribution.config import ArnoldiConfig
from isoray.attribution.scores import grad_cos, grad_dot, hif_lissa, tracin
from isoray.attribution.vectors import cross_products, norm, open_vector, save_vector
from isoray.errors import DataError, NumericError, UserError

Arrays = dict[str, np.ndarray]


@pytest.fixture
def sets(tmp_path: Path) -> tuple[list[Arrays], list[Arrays], list[dict[str, Path]], list[dict[str, Path]]]:
    """Gradients of three corpora and two test sets at two checkpoints, in memory and on disk."""
    rng = np.random.default_rng(0)

    def draw(names: str, checkpoint: int) -> tuple[Arrays, dict[str, Path]]:
        arrays = {name: rng.normal(size=37).astype(np.float32) for name in names}
        paths = {name: tmp_path / str(checkpoint) / f"{name}.npy" for name in names}
        for name, path in paths.items():
            save_vector(path, arrays[name])
        return arrays, paths

    train, test = [draw("abc", step) for step in (0, 1)], [draw("xy", step) for step in (0, 1)]
    return [t[0] for t in train], [t[0] for t in test], [t[1] for t in train], [t[1] for t in test]


def test_products_stream_over_chunks_and_sum_in_float64() -> None:
    rng = np.random.default_rng(1)
    rows = [rng.normal(size=1001).astype(np.float32) for _ in range(3)]
    columns = [rng.normal(size=1001).astype(np.float32) for _ in range(2)]
    exact = np.array(rows, dtype=np.float64) @ np.array(columns, dtype=np.float64).T
    for chunk in (1, 10, 1001, 5000):
        np.testing.assert_allclose(cross_products(rows, columns, chunk=chunk), exact, rtol=1e-12)
        assert norm(rows[0], chunk=chunk) == pytest.approx(np.linalg.norm(rows[0].astype(np.float64)), rel=1e-12)
    # In float32 the ones would vanish beside the large element.
    huge = np.ones(1000, dtype=np.float32)
    huge[0] = 2**15
    assert cross_products([huge], [huge])[0, 0] == 2**30 + 999


def test_grad_dot_and_grad_cos(sets) -> None:  # type: ignore[no-untyped-def]
    (train, *_), (test, *_), (train_paths, *_), (test_paths, *_) = sets
    for z in "abc":
        for t in "xy":
            dot = float(train[z].astype(float) @ test[t].astype(float))
            assert grad_dot(train_paths, test_paths)[t][z] == pytest.approx(dot)
            cos = dot / np.linalg.norm(train[z].astype(float))
            assert grad_cos(train_paths, test_paths)[t][z] == pytest.approx(cos)
            assert hif_lissa(train_paths, test_paths)[t][z] == pytest.approx(dot)


def test_tracin_as_published_and_as_in_the_paper(sets) -> None:  # type: ignore[no-untyped-def]
    train, test, train_paths, test_paths = sets
    published, paper = 0.0, 0.0
    for rate, train_here, test_here in zip((0.1, 0.3), train, test, strict=True):
        g, h = train_here["b"].astype(float), test_here["x"].astype(float)
        published += float(g @ h) / float(np.linalg.norm(g))
        paper += rate * float(g @ h)
    assert tracin(train_paths, test_paths)["x"]["b"] == pytest.approx(published)
    found = tracin(train_paths, test_paths, normalise_train=False, learning_rates=[0.1, 0.3])
    assert found["x"]["b"] == pytest.approx(paper)
    assert tracin(train_paths[:1], test_paths[:1]) == grad_cos(train_paths[0], test_paths[0])
    with pytest.raises(UserError, match="checkpoint"):
        tracin(train_paths, test_paths[:1])


def test_what_is_not_there_or_does_not_fit_is_a_data_error(tmp_path: Path, sets) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(DataError, match="run again"):
        open_vector(tmp_path / "absent.npy")
    (tmp_path / "torn.npy").write_bytes((sets[2][0]["a"]).read_bytes()[:100])
    with pytest.raises(DataError, match="run again"):
        open_vector(tmp_path / "torn.npy")
    save_vector(tmp_path / "short.npy", np.ones(5, dtype=np.float32))
    with pytest.raises(DataError, match="different lengths"):
        grad_dot({"a": tmp_path / "short.npy"}, sets[3][0])


def test_a_save_that_dies_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(file: object, array: object, **options: object) -> None:
        file.write(b"\x93NUMPY")  # type: ignore[attr-defined]
        raise KeyboardInterrupt

    monkeypatch.setattr(vectors.np, "save", die)
    with pytest.raises(KeyboardInterrupt):
        save_vector(tmp_path / "g.npy", np.ones(3))
    assert not (tmp_path / "g.npy").exists()
    assert (tmp_path / "g.npy.partial").exists()


def test_a_zero_gradient_has_no_direction(tmp_path: Path) -> None:
    save_vector(tmp_path / "zero.npy", np.zeros(4, dtype=np.float32))
    paths = {"empty": tmp_path / "zero.npy"}
    with pytest.raises(NumericError, match="empty"):
        grad_cos(paths, paths)


def test_more_eigenpairs_than_dimensions_is_refused() -> None:
    with pytest.raises(ValueError, match="lower `eigenpairs`"):
        ArnoldiConfig(dimension=5, eigenpairs=6)
