"""Wrong manifests and files that are none: each is one error with its remedy, or a skipped file with its reason."""

import os
import re
import signal
from pathlib import Path

import pytest
from make_audio import encode, noise, write, write_tar

from ajepa.data.index import DataError, build_index
from ajepa.data.shards import is_shards
from ajepa.pack import main as pack

DEEP, DIGITS = "[" * 100_000 + "]" * 100_000, "9" * 5000


@pytest.fixture(autouse=True)
def deadline():
    """Ends a test that hangs, as reading a pipe that nobody writes would."""

    def stop(*_):
        raise TimeoutError("the test hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(30)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def folder(tmp_path) -> Path:
    for i in range(2):
        write(tmp_path / "sub" / f"{i}.wav", noise(48_000, i))
    return tmp_path


def names(index) -> list[str]:
    return [os.path.basename(entry.name) for entry in index.entries]


# --- what spreadsheets of other systems and countries write -------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "remedy"),
    [
        ("file\nC:\\clips\\0.wav\nD:\\1.wav\n", "2 files that are not found have \\ in their names: write / in place"),
        ("file\nsub/0.wav;sub/1.wav\n", "1 files that are not found have ; in their names: give each file a row"),
        ("file,label\nsub/0.wav;a\nsub/1.wav;b\n", "2 rows are separated by ';' and the header by ','"),
        ("file;label\nsub/0.wav,a\n", "1 rows are separated by ',' and the header by ';'"),
        ("name;label\nsub/0.wav;a\n", "no column filename, file, path, audio; its columns: name, label"),
        ('file,offset\nsub/0.wav,"0,5"\n', "offset '0,5' is not a number of seconds: write a decimal point"),
    ],
)
def test_other_conventions_get_the_remedy_in_one_message(folder, text, remedy, capsys):
    (folder / "m.csv").write_text(text)
    with pytest.raises(DataError) as error:
        build_index(folder / "m.csv")
    assert str(error.value).count(remedy) == 1 and "\n" not in str(error.value)


def test_some_files_from_windows_are_one_warning(folder, capsys):
    (folder / "m.csv").write_text("file\nsub\\0.wav\n" + "".join(f"C:\\clips\\{i}.wav\n" for i in range(9)))
    index = build_index(folder / "m.csv")
    assert names(index) == ["0.wav"] and len(index.skipped) == 9
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"warning: {folder / 'm.csv'}: 9 files that are not found have \\ in their names: write /")


def test_a_european_table_is_read(folder):
    (folder / "m.csv").write_text("file;offset;duration;label\nsub/0.wav;0,5;1,25;a\nsub/1.wav;1;2,0;b,c\n")
    index = build_index(folder / "m.csv")
    assert [(entry.start, entry.frames) for entry in index.entries] == [(8_000, 20_000), (16_000, 32_000)]
    assert index.label_names == ["a", "b,c"]


# --- values beyond all measure ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ('{"file":"sub/0.wav","x":' + DEEP + "}", "not a JSON object"),
        ('{"file":"sub/0.wav","x":' + DIGITS + "}", "not a JSON object"),
        ('{"file":"sub/0.wav","label":' + "[" * 300 + "]" * 300 + "}", "nested too deeply"),
        ('{"file":' + "[" * 1200 + "]" * 1200 + "}", "not a JSON object|names no file|nested too deeply"),
        ('{"file":"sub/0.wav","offset":NaN}', "offset nan is not a finite number of seconds"),
        ('{"file":"sub/0.wav","duration":-Infinity}', "duration -inf is not a finite number of seconds"),
        ('{"file":"sub/0.wav","offset":1e400}', "offset inf is not a finite number of seconds"),
        ('{"file":"sub/0.wav","offset":"' + DIGITS + '"}', "offset '9{39} is not a finite number of seconds"),
        ('{"file":NaN}', "the row names no file"),
        ('{"file":"sub/\\u00000.wav"}', "not a file name"),
        ('{"file":"' + "x" * 5000 + '"}', "file name too long"),
        ('{"file":"/dev/zero"}', "not a regular file"),
        ('{"file":"sub/pipe.wav"}', "not a regular file"),
        ('{"file":"sub"}', "not a regular file"),
    ],
)
def test_a_row_without_measure_is_skipped_with_its_reason(folder, row, reason):
    os.mkfifo(folder / "sub" / "pipe.wav")
    (folder / "m.jsonl").write_text(row + '\n{"file":"sub/1.wav"}\n')
    index = build_index(folder / "m.jsonl")
    assert names(index) == ["1.wav"]
    ((_, got),) = index.skipped
    assert re.search(reason, got), got


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (DEEP, "not valid JSON (it is nested too deeply)"),
        (DIGITS, "not valid JSON (it holds a number of too many digits)"),
        ('[{"file":"sub/0.wav","x":' + DIGITS + "}]", "not valid JSON (it holds a number of too many digits)"),
    ],
)
def test_a_document_without_measure_is_one_error(folder, text, reason):
    (folder / "m.json").write_text(text)
    with pytest.raises(DataError) as error:
        build_index(folder / "m.json")
    assert str(error.value).startswith(f"{folder / 'm.json'}: {reason}: give one object a line")


@pytest.mark.parametrize("text", [DEEP, DIGITS, '{"x":' + DIGITS + "}"])
def test_notes_without_measure_in_a_tar_are_not_read(folder, text, capsys):
    path = write_tar(folder / "set.tar", {"a.json": text.encode(), "a.wav": encode(noise(800))})
    assert len(build_index(path)) == 1
    assert "labels or fields of 1 members cannot be read (a.json: not a JSON object)" in capsys.readouterr().err


def test_a_label_of_thousands_of_digits_is_text(folder):
    (folder / "m.csv").write_text(f"file,label\nsub/0.wav,{DIGITS}\nsub/1.wav,10\n")
    assert build_index(folder / "m.csv").label_names == ["10", DIGITS]


# --- what is no file ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["m.csv", "m.jsonl", "m.json", "m.parquet", "m.tar", "m.shard", "m.wav", "m"])
def test_a_named_pipe_as_the_source_is_one_error(tmp_path, name):
    os.mkfifo(tmp_path / name)
    assert not is_shards(str(tmp_path / name))
    with pytest.raises(DataError, match="not a regular file"):
        build_index(tmp_path / name)
    with pytest.raises(DataError):
        build_index(tmp_path / f"?{name[1:]}")


@pytest.mark.parametrize("name", ["/dev/null", "/dev/zero"])
def test_a_device_as_the_source_is_one_error(name):
    with pytest.raises(DataError, match=f"{name}: not a regular file; give a folder"):
        build_index(name)


def test_pipes_and_sockets_in_folders_are_left_out(folder, capsys):
    os.mkfifo(folder / "sub" / "pipe.flac")
    (folder / "sub" / "zero.wav").symlink_to("/dev/zero")
    assert {os.path.basename(p): r for p, r in build_index(folder).skipped} == {
        "pipe.flac": "not a regular file",
        "zero.wav": "not a regular file",
    }
    os.mkfifo(folder / "0.shard")
    assert pack([str(folder), str(folder / "packed"), "--rate", "16000"]) == 2
    assert "these are shards already" in capsys.readouterr().err
    with pytest.raises(DataError, match=r"0\.shard: not a regular file"):
        build_index(folder)
