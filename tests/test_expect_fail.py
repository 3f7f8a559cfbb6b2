"""The one helper by which every page shows an error: it fails where nothing, or something else, is raised."""
import json, tempfile

import pytest
from conftest import ROOT
from transformer2_nbdev import expect_fail


def test_it_prints_the_line_a_user_would_read(capsys):
    with expect_fail(ValueError, "too small"): raise ValueError("3 is too small")
    assert capsys.readouterr().out == "ValueError: 3 is too small\n"
    with expect_fail(OSError, "gone"): raise FileNotFoundError(f"{tempfile.gettempdir()}/tmp_x1/a.json is gone")
    assert capsys.readouterr().out == "FileNotFoundError: FOLDER/a.json is gone\n"
    with expect_fail((TypeError, ValueError), hide={"/somewhere": "..."}): raise ValueError("/somewhere/a")
    assert capsys.readouterr().out == "ValueError: .../a\n"


def test_it_fails_where_it_should():
    with pytest.raises(AssertionError, match="nothing was raised"):
        with expect_fail(ValueError): pass
    with pytest.raises(AssertionError, match="not in the message"):
        with expect_fail(ValueError, "small"): raise ValueError("large")
    with pytest.raises(TypeError):
        with expect_fail(ValueError): raise TypeError("another one")


def test_no_page_makes_its_own():
    for path in [ROOT / "index.ipynb", *(ROOT / "nbs").rglob("*.ipynb")]:
        for c in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            assert "def expect_fail" not in "".join(c["source"]), path.name
