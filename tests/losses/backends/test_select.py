"""Which backend computes the loss, and that a wrong kernel is not used."""

import pytest
import torch

from retina_plugin.errors import ConfigError
from retina_plugin.losses import (
    CLS_LOSS_REGISTRY,
    FocalLoss,
    check_backend,
    dense_classification_loss,
)
from retina_plugin.losses.backends import native, select, triton
from retina_plugin.losses.classification import Formula, FormulaKind
from tests.losses.reference import K, needs_compiler, random_logits, random_targets, textbook


@pytest.fixture(autouse=True)
def forget_self_tests():
    """A backend is tested once in a process."""

    def clear():
        select.unavailable_reason.cache_clear()
        select.is_available.cache_clear()

    clear()
    yield
    clear()


def test_unknown_backend_raises():
    with pytest.raises(
        ConfigError, match="LOSS_BACKEND: unknown 'cuda'; known: auto, eager, native, triton"
    ):
        check_backend("cuda")


def test_unavailable_backend_raises_only_where_it_has_to_run(monkeypatch):
    monkeypatch.setattr(triton, "unavailable", lambda: "no device")
    line = "LOSS_BACKEND triton is not available: no device; set it to auto"
    with pytest.raises(ConfigError, match=line):
        check_backend("triton")
    with pytest.raises(ConfigError, match=line):
        dense_classification_loss(
            random_logits(), random_targets(), FocalLoss(), K, backend="triton"
        )
    check_backend("triton", here=False)


@needs_compiler
@pytest.mark.parametrize("what", ["sums", "gradient", "crash"])
def test_wrong_kernel_is_not_used(monkeypatch, what):
    """The self-test finds the mistake of a compiler or a driver before the first training step."""
    right = native.dense_sums

    def wrong(x, grad, *rest):
        if what == "crash":
            raise OSError("no kernel image\nfor this device")
        sums = right(x, grad, *rest)
        if what == "gradient":
            grad *= 1.001
        return sums * 1.001 if what == "sums" else sums

    monkeypatch.setattr(native, "dense_sums", wrong)
    message = "it fails on this machine: no kernel" if what == "crash" else "is wrong on this"
    with pytest.raises(ConfigError, match=f"native is not available: .*{message}"):
        check_backend("native")
    logits, targets = random_logits(), random_targets()
    total = dense_classification_loss(logits, targets, FocalLoss(), K).total
    torch.testing.assert_close(total.double(), textbook(logits, targets, 0.25, 2.0)[0])


@needs_compiler
def test_self_test_covers_every_loss_with_a_formula(monkeypatch):
    """A registered loss whose formula is not its value is found, too."""

    class Doubled(FocalLoss):
        @property
        def formula(self):
            return Formula(FormulaKind.FOCAL, self.gamma)

        def value_and_derivative(self, x_t):
            value, derivative = super().value_and_derivative(x_t)
            return 2 * value, 2 * derivative

    assert select.unavailable_reason("native") is None
    select.unavailable_reason.cache_clear()
    with monkeypatch.context() as patch:
        registered = {**CLS_LOSS_REGISTRY._obj_map, "Doubled": Doubled}
        patch.setattr(CLS_LOSS_REGISTRY, "_obj_map", registered)
        assert "its result for Doubled(" in select.unavailable_reason("native")

    compared, right = set(), native.dense_sums

    def watched(x, grad, labels, channels_last, loss, *rest):
        compared.add(repr(loss))
        return right(x, grad, labels, channels_last, loss, *rest)

    select.unavailable_reason.cache_clear()
    monkeypatch.setattr(native, "dense_sums", watched)
    assert select.unavailable_reason("native") is None
    with_formula = {cls for _, cls in CLS_LOSS_REGISTRY if cls().kernel_formula() is not None}
    assert {repr(cls()) for cls in with_formula} < compared
    assert "FocalLoss(alpha=0.25, gamma=0.5)" in compared


def test_missing_compiler_is_logged_once(monkeypatch, caplog):
    """Without a kernel, "auto" gives the same numbers and logs once why it is slower."""
    reason = "no C++ compiler (c++ or g++ on PATH, or CXX)"
    monkeypatch.setattr(native, "unavailable", lambda: reason)
    monkeypatch.setattr(native, "dense_sums", None)
    logits, targets = random_logits(), random_targets()
    for _ in range(2):
        total = dense_classification_loss(logits, targets, FocalLoss(), K).total
    torch.testing.assert_close(total.double(), textbook(logits, targets, 0.25, 2.0)[0])
    assert [r.getMessage() for r in caplog.records] == [
        f"No native kernel for the loss, so it is slower: {reason}"
    ]
