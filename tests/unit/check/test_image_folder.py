"""The folder of pictures that are all missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from dianjing.check.image_folder import nearby_folder

MESSAGES = ['picture "a b.png": no such file in data', 'picture "sub/c.png": no such file in data', "another message"]


@pytest.mark.parametrize("place", ["data", ".", "data/images", "photos"])
def test_it_is_found_next_to_the_data_and_one_above(
    place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    for name in ("a b.png", "sub/c.png"):
        (tmp_path / place / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / place / name).touch()
    assert nearby_folder("data/data.json", MESSAGES) == place


def test_a_folder_with_some_of_them_is_not_theirs(tmp_path: Path) -> None:
    tmp_path /= "alone/here"
    (tmp_path / "images").mkdir(parents=True)
    (tmp_path / "images" / "a b.png").touch()
    assert nearby_folder(str(tmp_path / "data.json"), MESSAGES) == ""
    assert nearby_folder(str(tmp_path / "data.json"), []) == ""
