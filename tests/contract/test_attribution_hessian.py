"""Hessian products, LiSSA and Arnoldi: against the full Hessian of tiny models, and against real leaving out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from isoray.attribution.arnoldi import arnoldi, save_eigenpairs
from isoray.attribution.config import ArnoldiConfig, LissaConfig
from isoray.attribution.eigenpairs import Eigenpairs
from isoray.attribution.gradient import Batch, LossSums, save_gradient, split, summed_gradient, trainable
from isoray.attribution.hessian import MeanHessian
from isoray.attribution.lissa import choose_step_size, inverse_product, largest_eigenvalue, save_inverse_product
from isoray.attribution.scores import hif_arnoldi, hif_lissa
from isoray.attribution.vectors import open_vector
from isoray.errors import DataError, InfraError, NumericError, UserError


def token_losses(model: nn.Module, batch: Batch) -> Tensor:
    logits_BTV = model(input_ids=batch["input_ids"]).logits[:, :-1]
    return F.cross_entropy(logits_BTV.transpose(1, 2), batch["input_ids"][:, 1:], reduction="none").mean(1).sum()


def ridge_losses(model: nn.Module, batch: Batch) -> Tensor:
    """Logistic loss with a ridge, so that the Hessian has no null space."""
    ridge = sum((parameter**2).sum() for parameter in model.parameters())
    losses = F.binary_cross_entropy_with_logits(model(batch["x"])[:, 0], batch["y"], reduction="sum")
    return losses + 0.05 * len(batch["x"]) * ridge


def language_model(kind: str) -> nn.Module:
    torch.manual_seed(0)
    if kind == "llama":
        shape = {"hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(vocab_size=11, tie_word_embeddings=True, **shape)).double()
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=11, bos_token_id=0, eos_token_id=0, n_positions=8, n_embd=4, n_layer=1, n_head=2)
    ).double()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1)).double()


def points(count: int, seed: int) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return {"x": x, "y": (x[:, 0] - x[:, 1] * x[:, 2] > 0).double()}


def cut(batch: Batch, size: int) -> list[Batch]:
    count = len(next(iter(batch.values())))
    return [{k: v[start : start + size] for k, v in batch.items()} for start in range(0, count, size)]


def full_hessian(model: nn.Module, batch: Batch, loss_sums: LossSums) -> Tensor:
    """The Hessian of the mean loss by torch's own second derivatives, entry by entry."""
    model.eval()
    names = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    parameters = trainable(model)

    class Called(nn.Module):
        def __init__(self, vector_P: Tensor) -> None:
            super().__init__()
            self.values = dict(zip(names, split(vector_P, parameters), strict=True))

        def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
            return functional_call(model, self.values, args, kwargs)

        def parameters(self, recurse: bool = True):  # type: ignore[no-untyped-def]
            return iter(self.values.values())

    def mean_loss(vector_P: Tensor) -> Tensor:
        return loss_sums(Called(vector_P), batch) / len(next(iter(batch.values())))

    start = torch.cat([parameter.detach().flatten() for parameter in parameters])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        return torch.autograd.functional.hessian(mean_loss, start)


@pytest.mark.parametrize(("kind", "tolerance"), [("gpt2", 1e-10), ("llama", 1e-6)])  # llama's norms are float32 inside
def test_products_equal_the_full_hessian_however_batched(kind: str, tolerance: float) -> None:
    model = language_model(kind)
    batch = {"input_ids": torch.randint(0, 11, (5, 6), generator=torch.Generator().manual_seed(1))}
    full = full_hessian(model, batch, token_losses)
    model.train()
    for size in (1, 2, 5):
        hessian = MeanHessian(model, cut(batch, size), token_losses, examples=5)
        vector_P = hessian.random_normal(seed=2)
        kept = vector_P.clone()
        scale = (full @ vector_P).abs().max()
        assert ((hessian(vector_P) - full @ vector_P).abs().max() / scale) < tolerance
        assert torch.equal(vector_P, kept)
    assert all(module.training for module in model.modules())


def test_a_loss_linear_in_the_parameters_has_a_zero_product() -> None:
    model = nn.Linear(3, 1).double()
    hessian = MeanHessian(model, [points(4, seed=1)], lambda m, b: m(b["x"]).sum(), examples=4)
    assert torch.equal(hessian(torch.ones(4, dtype=torch.float64)), torch.zeros(4, dtype=torch.float64))
    with pytest.raises(NumericError, match="norm 0"):
        largest_eigenvalue(hessian, hessian.random_normal(0), iterations=3)


def test_half_precision_and_no_examples_are_refused() -> None:
    with pytest.raises(UserError, match="float32"):
        MeanHessian(network().bfloat16(), [], ridge_losses, examples=1)
    with pytest.raises(UserError, match="at least one"):
        MeanHessian(network(), [], ridge_losses, examples=0)


@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_lissa_equals_its_matrix_polynomial(tmp_path: Path, damping: float) -> None:
    model, batch, test = network(), points(9, seed=1), points(4, seed=2)
    hessian = MeanHessian(model, cut(batch, 4), ridge_losses, examples=9)
    config = LissaConfig(damping=damping)
    step_size = choose_step_size(hessian, config, seed=0)
    save_gradient(model, [test], ridge_losses, tmp_path / "g.npy")
    report = save_inverse_product(hessian, tmp_path / "g.npy", tmp_path / "p.npy", config, step_size=step_size)

    full = full_hessian(model, batch, ridge_losses) + damping * torch.eye(21, dtype=torch.float64)
    gradient_P = summed_gradient(model, [test], ridge_losses)
    shrink = torch.eye(21, dtype=torch.float64) - step_size * full
    terms = [torch.linalg.matrix_power(shrink, power) @ gradient_P for power in range(11)]
    expected = step_size * torch.stack(terms).sum(0)
    np.testing.assert_allclose(open_vector(tmp_path / "p.npy"), expected.numpy(), rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(report.norms, [float(term.norm()) for term in terms], rtol=1e-9)
    assert step_size == pytest.approx(1 / float(torch.linalg.eigvalsh(full).abs().max()), rel=0.2)


def test_lissa_converges_to_the_inverse_where_the_hessian_is_positive() -> None:
    matrix = _symmetric([0.5, 1.0, 2.0, 4.0])
    vector_P = torch.arange(1.0, 5.0, dtype=torch.float64)
    inverse, report = inverse_product(lambda v: matrix @ v, vector_P, iterations=400, step_size=0.25)
    torch.testing.assert_close(inverse, torch.linalg.solve(matrix, vector_P))
    assert not report.diverged


def test_lissa_reports_divergence() -> None:
    matrix = _symmetric([0.5, 1.0, 2.0, 4.0])
    vector_P = torch.ones(4, dtype=torch.float64)
    _, report = inverse_product(lambda v: matrix @ v, vector_P, iterations=10, step_size=1.0)
    assert report.diverged
    with pytest.raises(NumericError, match="step_size"):
        inverse_product(lambda v: matrix @ v, vector_P, iterations=10, step_size=1e60)


def test_power_iteration_finds_the_largest_absolute_eigenvalue() -> None:
    matrix = _symmetric([-5.0, 1.0, 2.0, 3.0])
    assert largest_eigenvalue(lambda v: matrix @ v, torch.ones(4).double(), iterations=60) == pytest.approx(5.0)


def test_arnoldi_of_full_dimension_is_the_exact_eigendecomposition(tmp_path: Path) -> None:
    model, batch = network(), points(9, seed=1)
    hessian = MeanHessian(model, cut(batch, 4), ridge_losses, examples=9)
    found = save_eigenpairs(hessian, tmp_path, ArnoldiConfig(dimension=21, eigenpairs=21), seed=0)
    full = full_hessian(model, batch, ridge_losses)
    exact = torch.linalg.eigvalsh(full).numpy()
    np.testing.assert_allclose(found.values, exact[np.argsort(-np.abs(exact))], rtol=1e-8)
    np.testing.assert_allclose(found.basis @ found.basis.T, np.eye(21), atol=1e-12)
    assert found.asymmetry < 1e-10

    paths = {}
    for name, seed in (("a", 3), ("b", 4), ("test", 5)):
        paths[name] = tmp_path / f"{name}.npy"
        save_gradient(model, [points(4, seed=seed)], ridge_losses, paths[name])
    train, test = {name: paths[name] for name in "ab"}, {"test": paths["test"]}
    solved = torch.linalg.solve(full, torch.from_numpy(np.array(open_vector(paths["test"])))).numpy()
    opened = Eigenpairs.open(tmp_path)
    for name in "ab":
        gradient = open_vector(paths[name])
        influence = hif_arnoldi(train, test, opened, normalise_train=False)["test"][name]
        assert influence == pytest.approx(float(gradient @ solved), rel=1e-6)
        normalised = hif_arnoldi(train, test, opened)["test"][name]
        assert normalised == pytest.approx(float(gradient @ solved / np.linalg.norm(gradient)), rel=1e-6)


def test_arnoldi_keeps_the_dominant_pairs_of_an_indefinite_matrix(tmp_path: Path) -> None:
    """In float32, where a single Gram-Schmidt pass would lose orthogonality."""
    spectrum = [*np.linspace(-0.5, 0.5, 196), -30.0, 20.0, 10.0, -5.0]
    matrix = _symmetric(spectrum).float()
    start = torch.randn(200, generator=torch.Generator().manual_seed(0))
    found = arnoldi(lambda v: matrix @ v, start, tmp_path, dimension=40, eigenpairs=4)
    assert found.basis.dtype == np.float32
    np.testing.assert_allclose(found.values, [-30.0, 20.0, 10.0, -5.0], rtol=1e-4)
    np.testing.assert_allclose(found.basis @ found.basis.T, np.eye(40), atol=1e-5)
    eigenvectors = found.vectors.T @ found.basis
    np.testing.assert_allclose(eigenvectors @ matrix.numpy(), found.values[:, None] * eigenvectors, atol=1e-3)


def test_arnoldi_stops_where_the_space_is_exhausted_and_drops_zero_eigenvalues(tmp_path: Path) -> None:
    matrix = _symmetric([0.0, 0.0, 0.0, 0.0, 2.0, 3.0])
    products = 0

    def product(vector_P: Tensor) -> Tensor:
        nonlocal products
        products += 1
        return matrix @ vector_P

    start = torch.ones(6, dtype=torch.float64)
    found = arnoldi(product, start, tmp_path, dimension=6, eigenpairs=6)
    np.testing.assert_allclose(found.values, [3.0, 2.0], rtol=1e-9)
    assert products == 3


def test_arnoldi_refuses_what_is_not_a_hessian(tmp_path: Path) -> None:
    lopsided = torch.triu(torch.ones(6, 6, dtype=torch.float64))
    start = torch.randn(6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    with pytest.raises(NumericError, match="symmetric"):
        arnoldi(lambda v: lopsided @ v, start, tmp_path, dimension=6, eigenpairs=6)
    with pytest.raises(NumericError, match="not finite"):
        arnoldi(lambda v: v * torch.nan, start, tmp_path, dimension=6, eigenpairs=6)
    with pytest.raises(NumericError, match="zero"):
        arnoldi(torch.zeros_like, start, tmp_path, dimension=6, eigenpairs=6)
    with pytest.raises(DataError, match="run again"):
        Eigenpairs.open(tmp_path)


def test_arnoldi_on_a_full_disk_is_refused_before_it_starts(tmp_path: Path) -> None:
    with pytest.raises(InfraError, match="GiB"):
        arnoldi(lambda v: v, torch.ones(10), tmp_path, dimension=10**15, eigenpairs=1)


def test_influence_has_the_sign_and_size_of_leaving_a_corpus_out(tmp_path: Path) -> None:
    """Train to the optimum with and without each corpus; one has its labels flipped and must come out as harmful."""
    corpora = {name: points(24, seed=seed) for seed, name in enumerate(("a", "b", "flipped"))}
    corpora["flipped"]["y"] = 1 - corpora["flipped"]["y"]
    test = points(40, seed=9)

    def optimum(names: list[str]) -> nn.Module:
        model = nn.Linear(3, 1).double()
        nn.init.zeros_(model.weight), nn.init.zeros_(model.bias)
        optimizer = torch.optim.LBFGS(
            model.parameters(), max_iter=200, tolerance_grad=1e-12, line_search_fn="strong_wolfe"
        )

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = sum(ridge_losses(model, corpora[name]) for name in names) / 72
            loss.backward()
            return loss

        optimizer.step(closure)
        return model

    def loss_on_test(model: nn.Module) -> float:
        return F.binary_cross_entropy_with_logits(model(test["x"])[:, 0], test["y"], reduction="sum").item()

    model = optimum(list(corpora))
    truth = {name: loss_on_test(optimum([n for n in corpora if n != name])) - loss_on_test(model) for name in corpora}
    train = {name: tmp_path / f"{name}.npy" for name in corpora}
    for name, path in train.items():
        save_gradient(model, [corpora[name]], ridge_losses, path)
    plain = lambda m, b: F.binary_cross_entropy_with_logits(m(b["x"])[:, 0], b["y"], reduction="sum")  # noqa: E731
    save_gradient(model, [test], plain, tmp_path / "test.npy")
    hessian = MeanHessian(model, list(corpora.values()), ridge_losses, examples=72)
    eigenpairs = save_eigenpairs(hessian, tmp_path / "arnoldi", ArnoldiConfig(dimension=4, eigenpairs=4), seed=0)
    config = LissaConfig(iterations=500)
    step_size = choose_step_size(hessian, config, seed=0)
    save_inverse_product(hessian, tmp_path / "test.npy", tmp_path / "inverse.npy", config, step_size=step_size)
    by_arnoldi = hif_arnoldi(train, {"test": tmp_path / "test.npy"}, eigenpairs, normalise_train=False)["test"]
    by_lissa = hif_lissa(train, {"test": tmp_path / "inverse.npy"})["test"]
    assert truth["flipped"] < 0 < min(truth["a"], truth["b"])
    for name in corpora:
        assert by_arnoldi[name] == pytest.approx(by_lissa[name], rel=1e-5)
        assert np.sign(by_arnoldi[name]) == np.sign(truth[name])
    assert np.corrcoef(list(by_arnoldi.values()), list(truth.values()))[0, 1] > 0.95


def _symmetric(eigenvalues: list[float]) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    size = len(eigenvalues)
    rotation, _ = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))
    return rotation @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ rotation.T
