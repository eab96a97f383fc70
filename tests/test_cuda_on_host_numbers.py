"""Functions, conversions and accesses of numbers through the shim."""

import numpy as np
import pytest
import torch
from shim_kernels import values, words


@pytest.mark.parametrize("kind, dtype", [("float", np.float32), ("double", np.float64)])
def test_numbers(shim, kind, dtype):
    x = np.array([0.3, 1, 7.5, 0, -0.7, -np.inf, np.inf, np.nan], dtype)
    with np.errstate(all="ignore"):
        expected = [np.exp(x), np.exp2(x), np.log(x), np.log2(x), np.fmax(x, 1), np.fmin(x, 1)]
        expected += [x * x + 1, 1 / np.sqrt(x), np.abs(x), np.isfinite(x), np.isnan(x)]
    got = getattr(shim, f"numbers_{kind}")(x)
    np.testing.assert_allclose(got, np.stack(expected, -1), rtol=4 * np.finfo(x.dtype).eps)


def test_functions_of_floats(shim):
    pairs = shim.float_pairs(np.array([0.3, 1, 7.5, 0, -0.7, np.inf, np.nan]))
    np.testing.assert_array_equal(pairs[..., 0], pairs[..., 1])


def test_accesses_with_a_hint(shim):
    floats, integers = values(64, 4).astype(np.float32), words(64, 4)
    floats_got, integers_got = shim.hints(floats, integers)
    np.testing.assert_array_equal(floats_got, floats[:, ::-1])
    np.testing.assert_array_equal(integers_got, integers[:, ::-1])


EVERY = np.arange(2**16, dtype=np.uint16)


@pytest.mark.parametrize("dtype, name", [(torch.float16, "half"), (torch.bfloat16, "bfloat16")])
def test_conversion(shim, dtype, name):
    every = torch.from_numpy(EVERY.view(np.int16)).view(dtype).float()
    widened = getattr(shim, f"{name}_to_float")(EVERY)
    np.testing.assert_array_equal(widened, every.numpy())
    np.testing.assert_array_equal(np.signbit(widened[EVERY << 1 == 0]), [False, True])

    # Every number, half way to the next one, and a float's last place to either side of both.
    exact = every[every.isfinite()].double().sort().values
    points = torch.cat([exact, (exact[1:] + exact[:-1]) / 2, torch.tensor([65520.0])]).float()
    infinity = torch.tensor(torch.inf)
    near = [points, points.nextafter(infinity), points.nextafter(-infinity)]
    any_bits = torch.randint(-(2**31), 2**31, (10**6,)).int().view(torch.float32)
    x = torch.cat([*near, any_bits, -points, infinity[None], -infinity[None]])
    narrowed = getattr(shim, f"float_to_{name}")(x.numpy())
    expected = x.to(dtype).view(torch.int16).numpy().view(np.uint16)
    nan = x.isnan().numpy()
    assert nan.any()
    np.testing.assert_array_equal(narrowed[~nan], expected[~nan])
    assert (narrowed[nan] == 0x7FFF).all()
