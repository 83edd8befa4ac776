"""Rounding upward, powers of two, and the setting of the precision of products."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectralnorm.linalg.precision import full_precision, is_full_precision
from spectralnorm.linalg.rounding import (
    binary_exponent,
    gamma,
    norm_above,
    norm_below,
    power_below,
    power_of_two,
    product_gamma,
    round_up,
)

HALVES_AND_FLOATS = (torch.float16, torch.bfloat16, torch.float32)


class TestRoundUp:
    @given(number=st.floats(allow_nan=False), dtype=st.sampled_from(HALVES_AND_FLOATS))
    def test_it_is_the_least_number_that_is_not_less(self, number, dtype):
        rounded = round_up(torch.tensor(number, dtype=torch.float64), dtype)
        assert rounded.dtype == dtype
        assert rounded.double().item() >= number
        below = torch.nextafter(rounded.float(), torch.tensor(-math.inf)) if dtype == torch.float32 else None
        if below is not None and math.isfinite(number):
            assert below.double().item() < number

    @pytest.mark.parametrize("dtype", HALVES_AND_FLOATS)
    def test_numbers_of_the_type_stay(self, dtype):
        numbers = torch.randn(1000).to(dtype)
        assert torch.equal(round_up(numbers.double(), dtype), numbers)

    @pytest.mark.parametrize("dtype", HALVES_AND_FLOATS)
    def test_just_above_a_number_is_the_next(self, dtype):
        number = 1 + 1e-12
        eps = torch.finfo(dtype).eps
        assert round_up(torch.tensor(number, dtype=torch.float64), dtype).item() == 1 + eps
        assert round_up(torch.tensor(1e-320, dtype=torch.float64), dtype).item() > 0
        assert round_up(torch.tensor(1e300, dtype=torch.float64), dtype).item() == math.inf
        assert math.isnan(round_up(torch.tensor(math.nan, dtype=torch.float64), dtype).item())


def test_powers_of_two_are_exact():
    exponents = torch.arange(-1022, 1024)
    powers = power_of_two(exponents)
    assert powers.tolist() == [2.0**e for e in exponents.tolist()]
    assert torch.equal(binary_exponent(powers), exponents)
    assert torch.equal(binary_exponent(powers * 1.999), exponents)
    assert binary_exponent(torch.tensor([0, 5e-324, math.inf, math.nan], dtype=torch.float64)).tolist() == [
        -1023,
        -1023,
        1024,
        1024,
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_power_of_two_is_the_next_below(dtype):
    last = 127 if dtype == torch.float32 else 1023
    powers = power_of_two(torch.arange(1 - last, last + 1)).to(dtype)
    assert torch.equal(power_below(powers), powers)
    assert torch.equal(power_below(powers * (2 - torch.finfo(dtype).eps)), powers)
    special = torch.tensor([0, torch.finfo(dtype).tiny / 2, math.inf, math.nan, -math.nan], dtype=dtype)
    assert power_below(special).tolist() == [0, 0, math.inf, math.inf, math.inf]


def test_gamma_is_highams():
    n, u = 1000, Fraction(1, 2**24)
    assert gamma(n, torch.float32) == pytest.approx(float(n * u / (1 - n * u)), rel=1e-15)
    assert gamma(2**24, torch.float32) == math.inf
    assert gamma(n, torch.complex64) == gamma(n, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64, torch.complex128])
def test_the_rounding_of_products_is_bounded(dtype):
    # Exact by fractions; few terms, so that the bound is not met by accident of a large n.
    for terms in (1, 2, 3, 10):
        left, right = torch.randn(20, terms, dtype=dtype), torch.randn(terms, 20, dtype=dtype)
        product = left @ right
        error = 0.0
        for row in range(20):
            for column in range(20):
                real = imaginary = Fraction(0)
                for a, b in zip(left[row].tolist(), right[:, column].tolist(), strict=True):
                    a, b = complex(a), complex(b)
                    ar, ai, br, bi = (Fraction(x) for x in (a.real, a.imag, b.real, b.imag))
                    real += ar * br - ai * bi
                    imaginary += ar * bi + ai * br
                came = complex(product[row, column].item())
                error += float(real - Fraction(came.real)) ** 2 + float(imaginary - Fraction(came.imag)) ** 2
        size = torch.linalg.matrix_norm(left).item() * torch.linalg.matrix_norm(right).item()
        assert math.sqrt(error) <= product_gamma(terms, dtype) * size
        assert product_gamma(terms, dtype) <= 2.0**-22 * (2 * terms + 2) if dtype.to_real() == torch.float32 else True


@given(numbers=st.lists(st.floats(-1e100, 1e100), min_size=1, max_size=50))
def test_the_norm_is_enclosed(numbers):
    tensor = torch.tensor(numbers, dtype=torch.float64)
    above, below = Fraction(norm_above(tensor, -1).item()), Fraction(norm_below(tensor, -1).item())
    assert below**2 <= sum(Fraction(number) ** 2 for number in numbers) <= above**2


class TestPrecision:
    @pytest.mark.parametrize("precision", ["highest", "high", "medium"])
    def test_products_are_full_inside_and_as_before_outside(self, precision, device):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision(precision)
        try:
            assert is_full_precision(device) == (precision == "highest")
            with full_precision(device):
                assert is_full_precision(device)
            assert torch.get_float32_matmul_precision() == precision
            with pytest.raises(RuntimeError, match="stop"), full_precision(device):
                raise RuntimeError("stop")
            assert torch.get_float32_matmul_precision() == precision
        finally:
            torch.set_float32_matmul_precision(before)

    def test_an_inherited_setting_is_inherited_again(self, device):
        if not hasattr(torch.backends, "fp32_precision"):
            pytest.skip("this torch has no setting for everything")
        backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
        before = backend.matmul.fp32_precision
        backend.matmul.fp32_precision = "none"
        torch.backends.fp32_precision = "tf32"
        try:
            assert not is_full_precision(device)
            with full_precision(device):
                assert is_full_precision(device)
            assert not is_full_precision(device)
        finally:
            torch.backends.fp32_precision = "none"
            backend.matmul.fp32_precision = before
