"""Test the files that the benchmarks write: JSON documents and JSON lines."""

from pathlib import Path

from benchmarks.records import append_line, read_document, read_lines, write_document


def test_a_document_reads_as_written_with_one_line_per_flat_object(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    assert read_document(path) is None
    content = {"runs": [{"text": 'one\n"line"', "x": 1}, {"text": "two", "x": 2.5}], "empty": {}}
    write_document(path, content)
    assert read_document(path) == content
    assert len(path.read_text().splitlines()) == 7
    braces = {"runs": [{"text": "{ }\n}", "x": 1}, {"text": "{", "x": [{}]}]}
    write_document(path, braces)
    assert read_document(path) == braces
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_the_last_line_of_a_key_counts_and_an_incomplete_line_does_not(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_lines(path, key="name") == {}
    for record in ({"name": "a", "x": 1}, {"name": "b", "x": 2}, {"name": "a", "x": 3}):
        append_line(path, record)
    with path.open("a") as file:
        file.write('{"name": "c", ')
    assert read_lines(path, key="name") == {"a": {"name": "a", "x": 3}, "b": {"name": "b", "x": 2}}
