import json
import re
import shutil
from pathlib import Path

import pytest

from spectralnorm.report import build_report
from spectralnorm.report.guarantee import guarantee

CERTIFICATE = {
    "upper_bound": 1.00001,
    "lower_bound": 0.75,
    "weights_sha256": "0123456789abcdef",
    "seconds": 1.5,
    "layers": [
        {"name": "layers.0", "op": "Conv2d", "lower": 0.5, "upper": 2.0, "product": 2.0},
        {"name": "pool", "op": "AvgPool2d", "lower": None, "upper": 0.5, "product": 1.00001},
        {"name": "sum", "op": "add", "lower": None, "upper": None, "product": 1.00001},
    ],
}


@pytest.fixture
def copied_run(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "run")


def test_an_upper_bound_is_never_shown_smaller_than_it_is():
    assert guarantee(CERTIFICATE).upper == "1.001"


def test_each_layer_has_its_bars_and_what_is_unknown_has_none():
    conv, pool, joined = guarantee(CERTIFICATE).layers
    assert (conv.lower_percent, conv.upper_percent) == (25, 100)
    assert (pool.lower, pool.lower_percent, pool.upper_percent) == ("", 0, 25)
    assert (joined.upper, joined.upper_percent) == ("", 0)


def test_the_report_shows_the_certificate_of_its_run(copied_run: Path):
    assert "Nothing is proved of this discriminator yet" in build_report(copied_run).read_text(encoding="utf-8")
    (copied_run / "certificate.json").write_text(json.dumps(CERTIFICATE), encoding="utf-8")
    page = build_report(copied_run).read_text(encoding="utf-8")
    assert "at most <strong>1.001</strong>" in page
    assert "layers.0" in page
    assert "it may be above the norm of its kernel as a matrix" in page


def test_a_certificate_of_a_step_before_the_last_is_told(copied_run: Path):
    file = copied_run / "certificate.json"
    file.write_text(json.dumps({**CERTIFICATE, "step": 1}), encoding="utf-8")
    assert "Of the weights of step 1, after which the run went on, with" in build_report(copied_run).read_text("utf-8")
    file.write_text(json.dumps({**CERTIFICATE, "step": 10**6}), encoding="utf-8")
    assert "Of the weights of step 1,000,000, with SHA-256" in build_report(copied_run).read_text("utf-8")


@pytest.mark.parametrize("text", ["{", "[]", '{"upper_bound": 1}'])
def test_a_broken_certificate_is_told_and_the_rest_is_shown(copied_run: Path, text: str):
    (copied_run / "certificate.json").write_text(text, encoding="utf-8")
    page = build_report(copied_run).read_text(encoding="utf-8")
    assert re.search("certificate.json (cannot be read|is not a certificate), so no guarantee is shown", page)
    assert "Nothing is proved of this discriminator yet" in page
