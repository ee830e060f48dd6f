"""Sites: every reading of the residual stream against float64 numpy.

pytest tests/test_sites.py
"""

import numpy as np
import pytest
import torch

from deltatc.errors import SiteError
from deltatc.sites import DEFAULT_SITE, SITES, rms_normalize, site

EPS = 1e-6


@pytest.fixture
def h():
    return torch.randn(3, 5, 48, generator=torch.Generator().manual_seed(0)) * 30 + 7


def test_normalizing_equals_numpy_and_has_unit_rms(h):
    wide = h.double().numpy()
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS)
    np.testing.assert_allclose(rms_normalize(h, EPS).numpy(), wanted, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(rms_normalize(h.double(), EPS).numpy(), wanted, rtol=1e-14, atol=1e-14)
    np.testing.assert_allclose((rms_normalize(h, EPS).double().numpy() ** 2).mean(-1), 1, rtol=1e-6)
    assert not rms_normalize(torch.zeros(2, 48), EPS).any()  # eps, not a division by zero


def test_normalizing_is_in_float32_also_for_bfloat16(h):
    low = h.bfloat16()
    assert rms_normalize(low, EPS).dtype == torch.float32
    assert torch.equal(rms_normalize(low, EPS), rms_normalize(low.float(), EPS))
    assert rms_normalize(h.double(), EPS).dtype == torch.float64


def test_each_site_reads_what_its_name_says(h):
    gain = torch.randn(48, generator=torch.Generator().manual_seed(1))
    wide, w = h.double().numpy(), gain.double().numpy()
    unit = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPS)
    wanted = {
        "normalized": (unit, 1.0),
        "normalized_with_gain": (unit * (1 + w), 1.0),  # (1 + w), not w
        "resid_mid": (wide, 1.0),
        "resid_mid_over_sqrt_d": (wide / np.sqrt(48), np.sqrt(48)),
    }
    assert set(SITES) == set(wanted) and DEFAULT_SITE == "normalized"
    for name, (x, scale) in wanted.items():
        np.testing.assert_allclose(site(name).read(h, gain, EPS).numpy(), x, rtol=1e-5, atol=1e-5)
        assert site(name).scale(48) == pytest.approx(scale)


def test_an_unknown_site_is_refused_with_the_known_ones():
    with pytest.raises(SiteError, match=r"'ln2' is unknown; expected one of normalized, .*resid_mid_over_sqrt_d"):
        site("ln2")
