import numpy as np
import pytest
import torch
from torch import Tensor

from dd_lightning.functional import whitening
from dd_lightning.functional.errors import InputError
from dd_lightning.functional.whitening import apply_zca, fit_zca, invert_zca


def correlated_images(count: int, shape: tuple[int, int, int] = (3, 4, 4)) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    length = shape[0] * shape[1] * shape[2]
    mixing = torch.randn(length, length, generator=generator) / length**0.5
    return torch.sigmoid(3 * torch.randn(count, length, generator=generator) @ mixing).view(count, *shape)


def test_equals_a_numpy_reference() -> None:
    images = correlated_images(200)
    data = images.flatten(1).numpy().astype(np.float64)
    mean = data.mean(axis=0)
    # A singular value decomposition, as in the reference code, instead of an eigendecomposition.
    u, s, _ = np.linalg.svd(np.cov(data, rowvar=False))
    whiten = u @ np.diag(1 / np.sqrt(s + 0.1)) @ u.T
    unwhiten = u @ np.diag(np.sqrt(s + 0.1)) @ u.T
    zca = fit_zca(images)
    assert {part.dtype for part in zca} == {torch.float32}
    np.testing.assert_allclose(zca.mean.numpy(), mean, atol=1e-6)
    np.testing.assert_allclose(zca.whiten.numpy(), whiten, atol=1e-6)
    np.testing.assert_allclose(zca.unwhiten.numpy(), unwhiten, atol=1e-6)
    whitened = apply_zca(images, zca)
    assert whitened.dtype == torch.float32
    np.testing.assert_allclose(whitened.flatten(1).numpy(), (data - mean) @ whiten, atol=2e-6)


@pytest.mark.parametrize("eps", [0.1, 1e-3])
def test_variance_along_each_eigenvector_is_s_over_s_plus_eps(eps: float) -> None:
    images = correlated_images(500)
    values, vectors = torch.linalg.eigh(images.flatten(1).double().T.cov())
    whitened = apply_zca(images, fit_zca(images, eps)).flatten(1).double()
    expected = vectors @ torch.diag(values / (values + eps)) @ vectors.T
    torch.testing.assert_close(whitened.T.cov(), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(whitened.mean(0), torch.zeros(48, dtype=torch.float64), rtol=0, atol=1e-5)


def test_inverse_and_unseen_images() -> None:
    train, test = correlated_images(300)[:250], correlated_images(300)[250:]
    zca = fit_zca(train)
    torch.testing.assert_close(invert_zca(apply_zca(test, zca), zca), test, rtol=0, atol=1e-5)
    torch.testing.assert_close(apply_zca(invert_zca(test, zca), zca), test, rtol=0, atol=1e-5)
    # One image at a time is the same as all at once: nothing is estimated from what is being whitened.
    one_by_one = torch.cat([apply_zca(image[None], zca) for image in test])
    torch.testing.assert_close(one_by_one, apply_zca(test, zca), rtol=0, atol=1e-6)


def test_fewer_images_than_values_is_finite() -> None:
    images = correlated_images(5)
    zca = fit_zca(images, eps=1e-4)
    torch.testing.assert_close(invert_zca(apply_zca(images, zca), zca), images, rtol=0, atol=1e-5)


def test_chunks_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    images = correlated_images(101)
    whole = fit_zca(images)
    whitened = apply_zca(images, whole)
    restored = invert_zca(whitened, whole)
    monkeypatch.setattr(whitening, "_CHUNK", 7)
    for part, expected in zip(fit_zca(images), whole, strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(apply_zca(images, whole), whitened, rtol=0, atol=1e-6)
    torch.testing.assert_close(invert_zca(whitened, whole), restored, rtol=0, atol=1e-6)


def test_errors() -> None:
    with pytest.raises(InputError, match="images is 1; it must be at least 2"):
        fit_zca(correlated_images(1))
    with pytest.raises(InputError, match="eps is 0; it must be above 0"):
        fit_zca(correlated_images(3), eps=0.0)
    zca = fit_zca(correlated_images(3))
    for function in (apply_zca, invert_zca):
        with pytest.raises(InputError, match="have 12 values each, this ZCA was fitted on 48"):
            function(torch.zeros(2, 3, 2, 2), zca)
