"""JSON files of others: what is refused, and with which error."""

from __future__ import annotations

from pathlib import Path

import pytest
from evermind_manifests.errors import ConfigError, LocationError
from evermind_manifests.json_file import read_json, read_object


def test_values_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": ["\\u00e9", "\\ud83d\\ude00", 1, null], "b": {"a": 1}}')
    assert read_object(path, 100, ConfigError) == {"a": ["é", "😀", 1, None], "b": {"a": 1}}
    path.write_text("[1]")
    assert read_json(path, 3, ConfigError) == [1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "expected a JSON object, found list"),
        ('{"a": 1, "a": 1}', "the key 'a' stands twice"),
        ('{"b": {"a": 1, "a": 2}}', "the key 'a' stands twice"),
        ("{", "not JSON"),
        ("[" * 10**5, "not JSON"),
        (" " * (1 << 18), "at most 200,000 bytes"),
    ],
)
def test_what_is_no_object_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_object(path, 200_000, ConfigError)
    assert message in caught.value.message
    assert str(path) in caught.value.message


def test_no_file_and_a_folder(tmp_path: Path) -> None:
    with pytest.raises(LocationError):
        read_object(tmp_path / "gone.json", 9, ConfigError)
    with pytest.raises(ConfigError, match="expected a JSON file"):
        read_object(tmp_path, 9, ConfigError)
