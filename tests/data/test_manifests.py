"""Manifests: every row becomes an entry or is listed as skipped with its reason."""

import csv
import functools
import json
import os
import sys
from collections.abc import Callable

import numpy as np
import pytest
from make_audio import encode, noise, write, write_set

import ajepa.data.sources.parquet
from ajepa.data.index import DataError, build_index
from ajepa.data.sources.listing import decode_label, encode_label

RATE = 1000  # Hz of these recordings, so a sample lasts a millisecond


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("AJEPA_CACHE", str(folder))
    return folder


@pytest.fixture
def index(tmp_path):
    """index(text, name, count) indexes a manifest beside `count` recordings 0.wav, 1.wav... of 100 samples each."""

    def make(text: str | bytes, name: str = "m.csv", count: int = 4, **options):
        for i in range(count):
            write(tmp_path / f"{i}.wav", noise(100, i), RATE)
        manifest = tmp_path / name
        manifest.write_bytes(text.encode() if isinstance(text, str) else text)
        return build_index(manifest, **options)

    return make


def files(index):
    return [os.path.basename(name) for name in index.entries.names()]


def skipped(index):
    return {os.path.basename(name): reason for name, reason in index.skipped}


def classes(index):
    return [index.label_names[label] if label >= 0 else None for label in index.labels]


def jsonl(*rows) -> str:
    return "\n".join(map(json.dumps, rows))


def wavs(count: int) -> list[str]:
    return [f"{i}.wav" for i in range(count)]


# ---- quotes ----

STRAY = ["plain", '"Hello, he said', "third", '"Yes" he said', 'a "quoted" word', 'last"', '"', 'ends"']


@pytest.mark.parametrize("last", [True, False], ids=["text last", "text in the middle"])
def test_a_stray_quote_in_a_tsv_swallows_no_row(index, last):
    rows = [f"{i}.wav\t{text}" + "\ten" * (not last) for i, text in enumerate(STRAY)]
    made = index("path\tsentence" + "\tlocale" * (not last) + "\n" + "\n".join(rows) + "\n", "m.tsv", len(STRAY))
    assert files(made) == wavs(len(STRAY))
    assert list(made.metadata["sentence"]) == STRAY
    assert not made.skipped


def test_a_tsv_whose_quotes_pair_up_over_rows_is_read_plainly(index):
    made = index('path\tsentence\n0.wav\t"opens\n1.wav\tplain\n2.wav\tcloses"\n3.wav\tx\n', "m.tsv")
    assert files(made) == wavs(4)


@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_what_pythons_csv_writer_writes_is_read_back(tmp_path, index, suffix):
    texts = ['say "hi"', "two\nlines", "comma, tab\tand ;", '"', "", 'end"\n"begin', "a\n\nb", ",\n,"]
    with open(tmp_path / "plain.txt", "w", newline="") as file:
        writer = csv.writer(file, "excel-tab" if suffix == "tsv" else "excel")
        writer.writerows([["file", "text", "n"], *([f"{i}.wav", text, i] for i, text in enumerate(texts))])
    made = index((tmp_path / "plain.txt").read_bytes(), f"m.{suffix}", len(texts))
    assert files(made) == wavs(len(texts))
    assert list(made.metadata["text"]) == texts
    assert not made.skipped


def test_a_multi_line_field_before_the_path_is_read(index):
    made = index('text,file\n"A dog\nbarks loudly",0.wav\n"two,\nthree",1.wav\nplain,2.wav\n')
    assert files(made) == wavs(3)
    assert made.metadata["text"][0] == "A dog\nbarks loudly"


@pytest.mark.parametrize(
    "body",
    [
        '0.wav,plain\n1.wav,"Hello, he said\n2.wav,x\n3.wav,y\n',
        '0.wav,plain\n1.wav,"Hello\n2.wav,x\n3.wav,"Yes, fine"\n',
        '0.wav,plain\n1.wav,"Hello\n2.wav,x\n3.wav,last"\n',
        '0.wav,plain\n1.wav,"Hello\n2.wav,last"\n3.wav,y\n',
        '0.wav,plain\n1.wav,"Hello\n2.wav,x\n3.wav,"\n',
    ],
)
def test_an_unbalanced_quote_in_a_csv_is_refused_by_its_line(index, body):
    with pytest.raises(DataError, match=r"m\.csv:3: an unbalanced"):
        index("file,text\n" + body)


def test_an_unbalanced_quote_in_front_of_the_path_is_refused_by_its_line(index):
    for body in ('"Hello,0.wav\nlast",1.wav\n', '"Hello,0.wav\nplain,1.wav\n', '"Hello,0.wav\nx,1.wav\nlast",2.wav\n'):
        with pytest.raises(DataError, match=r"m\.csv:2: an unbalanced"):
            index("text,file\n" + body)


def test_an_unbalanced_quote_before_paths_without_suffix_is_refused(tmp_path, index):
    for i in range(3):
        (tmp_path / f"{i}").write_bytes(encode(noise(100, i), RATE))
    with pytest.raises(DataError, match=r"m\.csv:2: an unbalanced"):
        index('file,text\n0,"Hello\n1,x\n2,last"\n')


def test_quotes_within_a_csv_field_are_text(index):
    made = index('file,text\n0.wav,5" nails\n1.wav,"Yes" he said\n2.wav, "a, b"\n')
    assert files(made) == wavs(3)
    assert list(made.metadata["text"]) == ['5" nails', '"Yes" he said', "a, b"]


@pytest.mark.parametrize("suffix,delimiter", [("csv", ","), ("tsv", "\t")])
def test_rows_of_another_width_are_skipped_with_their_line(index, suffix, delimiter):
    rows = ["file,label,n", "0.wav,a,1", "1.wav,b", "", "2.wav,c,1,x", "3.wav,d,2"]
    made = index("\n".join(rows).replace(",", delimiter), f"m.{suffix}")
    assert files(made) == ["0.wav", "3.wav"]
    expected = {f"m.{suffix}:3": "2 fields, the header has 3", f"m.{suffix}:5": "4 fields, the header has 3"}
    assert skipped(made) == expected


# ---- encodings, separators, headers ----


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_encodings_and_line_ends(index, encoding, end):
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    made = index((mark + end.join(["file,label", "0.wav,ä", "1.wav,日本", ""])).encode(encoding))
    assert files(made) == wavs(2)
    assert classes(made) == ["ä", "日本"]
    lines = end.join(['{"file": "0.wav", "label": "ä"}', "", '{"file": "1.wav", "label": "日本"}'])
    assert classes(index((mark + lines).encode(encoding), "m.jsonl")) == ["ä", "日本"]


def test_separators_other_than_line_ends_are_text(index):
    made = index("file,text\n0.wav,a\u2028b\x0bc\x85d\n1.wav,x\ry\n")
    assert list(made.metadata["text"]) == ["a\u2028b\x0bc\x85d", "x\ry"]


@pytest.mark.parametrize("data", ["file\n0.wav\n".encode("utf-16-le"), b"file\n0.wav\n1\0.wav\n"])
def test_nul_bytes_are_refused_with_the_remedy(index, data):
    with pytest.raises(DataError, match=r"m\.csv:\d: .*NUL.*save it as UTF-8"):
        index(data)


def test_broken_utf_16_is_refused(index):
    with pytest.raises(DataError, match="save it as UTF-8"):
        index("file\n0.wav\n".encode("utf-16") + b"\x00\xd8\x41")


@pytest.mark.parametrize("suffix,text", [("csv", "label;file\na,b;0.wav\n"), ("csv", "label\tfile\na,b\t0.wav\n"),
                                         ("tsv", 'label,file\n"a,b",0.wav\n'),
                                         ("csv", "sep=;\nlabel;file\na,b;0.wav\n")])  # fmt: skip
def test_other_delimiters_are_recognised_by_the_header(index, suffix, text):
    made = index(text, f"m.{suffix}")
    assert (files(made), classes(made)) == (["0.wav"], ["a,b"])


def test_unnamed_and_repeated_columns(index, capsys):
    made = index(",file,x,x\n7,0.wav,1,2\n")
    assert {name: column[0] for name, column in made.metadata.items()} == {"column 1": "7", "x": "1", "x.2": "2"}
    assert "several columns are called 'x'" in capsys.readouterr().err
    with pytest.raises(DataError, match="two columns are called 'label'"):
        index("file,label,label\n0.wav,a,b\n")


@pytest.mark.parametrize("text", ["", "\n\n", "file,label\n"])
@pytest.mark.parametrize("suffix", ["csv", "tsv"])
def test_a_manifest_without_rows(index, text, suffix):
    with pytest.raises(DataError, match="has no rows"):
        index(text, f"m.{suffix}")


def test_a_manifest_without_a_header(index):
    with pytest.raises(DataError, match=r"its columns: 0\.wav, dog; the first line must name the columns"):
        index("0.wav,dog\n1.wav,cat\n")


# ---- paths ----


@pytest.mark.parametrize("column", ajepa.data.sources.manifests.PATH_COLUMNS)
def test_path_columns(index, column):
    assert files(index(f"id,{column.upper()}\n7,0.wav\n")) == ["0.wav"]


def test_the_first_of_two_path_columns_counts(index):
    assert files(index("wav,file_name,filename\n2.wav,1.wav,0.wav\n")) == ["0.wav"]
    assert files(index("wav,file_name\n2.wav,1.wav\n")) == ["1.wav"]


def test_spellings_of_a_path(tmp_path, index):
    write(tmp_path / "sub" / "a b.wav", noise(100), RATE)
    write(tmp_path / "clips" / "c.wav", noise(100), RATE)
    write(tmp_path / " x.wav", noise(100), RATE)
    url = f"file://{tmp_path}/sub/a%20b.wav"
    made = index("\n".join(["file", " 0.wav ", "sub\\a b.wav", f"{tmp_path}/1.wav", url, "c.wav", " x.wav"]))
    expected = ["0.wav", "sub/a b.wav", "1.wav", "sub/a b.wav", "clips/c.wav", " x.wav"]
    assert [os.path.relpath(entry.path, tmp_path) for entry in made.entries] == expected


@pytest.mark.parametrize("address", ["https://host/a.wav", "http://host/a.wav", "s3://bucket/a.wav", "GS://b/a.wav"])
def test_addresses_are_skipped_with_the_reason(index, address):
    made = index(f"file,n\n0.wav,1\n{address},1\n ,1\n")
    assert files(made) == ["0.wav"]
    assert address.lower().partition(":")[0] in skipped(made)["m.csv:3"]
    assert skipped(made)["m.csv:4"] == "the row names no file"


# ---- JSON ----

RECORDS = [{"file": "0.wav", "label": "a"}, {"file": "1.wav", "label": "b"}]


@pytest.mark.parametrize("text", [json.dumps(RECORDS), json.dumps(RECORDS, indent=2), jsonl(*RECORDS),
                                  json.dumps({"data": RECORDS}), json.dumps({"version": 1, "data": RECORDS}, indent=1),
                                  "\n".join(json.dumps(r, indent=1) for r in RECORDS)],
                         ids=["array", "pretty array", "lines", "data", "pretty data", "pretty objects"])  # fmt: skip
@pytest.mark.parametrize("suffix", ["json", "jsonl"])
def test_shapes_of_json(index, text, suffix):
    made = index(text, f"m.{suffix}")
    assert (files(made), classes(made), made.skipped) == (wavs(2), ["a", "b"], [])


def test_bad_json_lines_are_counted(index):
    lines = ["{", "", json.dumps(RECORDS[0]), "[1]", '{"file": "1.wav"', "7", json.dumps(RECORDS[1])]
    made = index("\n".join(lines), "m.jsonl")
    assert files(made) == wavs(2)
    assert skipped(made) == {f"m.jsonl:{n}": "not a JSON object" for n in (1, 4, 5, 6)}


@pytest.mark.parametrize("limit", [1000, 5000])  # torch.compile raises the interpreter's limit
def test_records_nested_without_end_are_counted(index, limit, request):
    request.addfinalizer(functools.partial(sys.setrecursionlimit, sys.getrecursionlimit()))
    sys.setrecursionlimit(limit)
    deep = ['{"file": "0.wav", "label": ' + "[" * depth + "]" * depth + "}" for depth in (600, 100_000)]
    assert len(skipped(index("\n".join([*deep, json.dumps(RECORDS[1])]), "m.jsonl"))) == 2


def test_elements_of_an_array_that_are_no_objects_are_counted(index):
    assert skipped(index(json.dumps([RECORDS[0], 7]), "m.json")) == {"m.json:2": "not a JSON object"}


@pytest.mark.parametrize("text", [json.dumps(RECORDS, indent=1)[:-9], json.dumps(RECORDS)[:-1], "not json"])
def test_json_that_cannot_be_read_is_refused(index, text):
    with pytest.raises(DataError, match="one object a line, or one array"):
        index(text, "m.jsonl")


def test_nested_audio(index):
    rows = [{"audio": {"path": "0.wav", "bytes": None}}, {"audio": {"array": [0.1], "sampling_rate": 8000}},
            {"audio": ["1.wav"]}, {"audio": ["1.wav", "2.wav"]}, {"audio": None}, {"audio": {}}]  # fmt: skip
    made = index(jsonl(*rows), "m.jsonl")
    assert files(made) == wavs(2)
    reasons = skipped(made)
    assert "array" in reasons["m.jsonl:2"]
    assert "2 files" in reasons["m.jsonl:4"]
    assert reasons["m.jsonl:5"] == reasons["m.jsonl:6"] == "the row names no file"


def cut(file="0.wav", start=0.02, duration=0.05, **changes):
    source = {"type": "file", "channels": [0], "source": file}
    recording = {"id": "r", "sources": [source], "sampling_rate": RATE, "num_samples": 100, "duration": 0.1}
    supervision = {
        "id": "s",
        "recording_id": "r",
        "start": 0,
        "duration": 0.05,
        "channel": 0,
        "text": "hi",
        "speaker": "x",
    }
    return {"id": "c", "start": start, "duration": duration, "channel": 0, "supervisions": [supervision],
            "recording": recording, "custom": {"label": "dog"}, "type": "MonoCut"} | changes  # fmt: skip


def test_lhotse_cuts_and_recordings(index):
    other = {"sources": [{"type": "url", "channels": [0], "source": "https://host/a.wav"}]}
    two = {"sources": [{"type": "file", "channels": [0, 1], "source": "2.wav"}]}
    fast = {**cut()["recording"], "transforms": [{"factor": 1.1}]}
    rows = [cut(), cut("1.wav", 0, 0.1), cut("2.wav")["recording"], cut(type="MixedCut"), cut(recording=other)]
    rows += [cut(recording=two, channel=1), cut(recording=fast)]
    made = index(jsonl(*rows), "m.jsonl")
    assert files(made) == ["0.wav#t=0.02,0.07", "1.wav", "2.wav"]
    assert classes(made) == ["dog", "dog", None]
    assert list(made.metadata["text"]) == ["hi", "hi", ""]
    reasons = [skipped(made)[f"m.jsonl:{n}"] for n in (4, 5, 6, 7)]
    for reason, word in zip(reasons, ["mixed", "'url'", "channel 1", "transforms"], strict=True):
        assert word in reason


# ---- segments ----


@pytest.mark.parametrize(
    "row,start,frames",
    [
        ({"offset": 0.02, "duration": 0.03}, 20, 30),
        ({"offset": "0.02", "duration": "0.03"}, 20, 30),
        ({"start": 0.02, "end": 0.05}, 20, 30),
        ({"start_time": 0.02, "end_time": 0.05}, 20, 30),
        ({"begin": 0.02, "end": 0.05}, 20, 30),
        ({"start_seconds": 0.02, "end_seconds": 0.05}, 20, 30),
        ({"onset": 0.02, "offset": 0.05}, 20, 30),
        ({"start": 0.02, "duration": 0.03, "end": 0.05}, 20, 30),
        ({"offset": 0.0204, "duration": 0.0296}, 20, 30),
        ({"offset": 0.5}, 500, 500),
        ({"offset": 0.95, "duration": 0.1}, 950, 50),  # ends 0.05 s after the recording
        ({"offset": 0}, 0, 1000),
        ({"offset": 0, "duration": 0.5}, 0, 500),
        ({"duration": 0.5}, 0, 500),
        ({"duration": 0.95}, 0, 1000),  # the rounded duration of the whole file
        ({"duration": 1.05}, 0, 1000),
        ({"offset": None, "duration": None}, 0, 1000),
        ({"offset": "", "duration": ""}, 0, 1000),
        ({"frame_rate": 7, "offset_note": "x", "num_frames": 16}, 0, 1000),
    ],
)
def test_segments(tmp_path, row, start, frames):
    write(tmp_path / "long.wav", noise(1000), RATE)
    (tmp_path / "m.jsonl").write_text(jsonl({"file": "long.wav", **row}))
    (entry,) = build_index(tmp_path / "m.jsonl").entries
    assert (entry.start, entry.frames, entry.total) == (start, frames, 1000)
    suffix = "" if frames == 1000 else f"#t={start / 1000:g},{(start + frames) / 1000:g}"
    assert entry.name == str(tmp_path / f"long.wav{suffix}")


@pytest.mark.parametrize(
    "row,reason",
    [
        ({"offset": 3.2, "duration": 6}, "segment 3.2 to 9.2 s reaches beyond the recording's 5.0 s"),
        ({"offset": 3.2, "duration": 2}, "segment 3.2 to 5.2 s reaches beyond"),
        ({"offset": 1e308, "duration": 1e308}, "reaches beyond"),
        ({"duration": 1e308}, "reaches beyond"),
        ({"offset": 10**400}, "is not a number of seconds"),
        ({"offset": 5}, "segment from 5 s reaches beyond the recording's 5.0 s"),
        ({"start": 1000, "end": 2000}, "these look like samples"),
        ({"duration": 9}, "segment 0.0 to 9.0 s reaches beyond"),
        ({"offset": -1, "duration": 1}, "offset -1 is negative"),
        ({"offset": 0, "duration": -1}, "duration -1 is negative"),
        ({"offset": float("nan"), "duration": 1}, "offset nan is not a finite"),
        ({"offset": 0, "duration": float("inf")}, "duration inf is not a finite"),
        ({"offset": 1, "duration": 0}, "duration of 0"),
        ({"offset": 1, "duration": 1e-9}, "shorter than one sample"),
        ({"start": "06:30"}, "start '06:30' is not a number of seconds"),
        ({"start": True, "end": 1}, "start True is not a number"),
        ({"start": [1], "end": 1}, "is not a number"),
        ({"end": 1}, "an end of 1 s and no start"),
        ({"start": 2, "end": 1}, "ends at 1 s and starts at 2 s"),
        ({"start": 1, "end": 2, "duration": 3}, "contradict"),
        ({"offset": 1, "start": 2, "duration": 1}, "contradict"),
        ({"start_sample": 8, "end_sample": 900}, "give its start and end in seconds"),
        ({"start_ms": 8, "end_ms": 900}, "give its start and end in seconds"),
    ],
)
def test_a_segment_that_makes_no_sense_is_skipped(tmp_path, row, reason):
    write(tmp_path / "long.wav", noise(5000), RATE)
    write(tmp_path / "whole.wav", noise(100), RATE)
    (tmp_path / "m.jsonl").write_text(jsonl({"file": "whole.wav"}, {"file": "long.wav", **row}))
    made = build_index(tmp_path / "m.jsonl")
    assert files(made) == ["whole.wav"]
    ((_, got),) = made.skipped
    assert reason in got


def test_columns_that_are_no_segments_are_named(tmp_path, capsys):
    write(tmp_path / "0.wav", noise(100), RATE)
    write(tmp_path / "1.wav", noise(100), RATE)
    (tmp_path / "m.csv").write_text("file,start,end\n0.wav,300,304\n1.wav,0,0.05\n")
    assert len(build_index(tmp_path / "m.csv")) == 1
    assert "1 rows are left out because their segment" in capsys.readouterr().err
    (tmp_path / "m.csv").write_text("file,start,end\n0.wav,300,304\n")
    with pytest.raises(DataError, match="must not be called start, end"):
        build_index(tmp_path / "m.csv")


def test_segments_of_one_file_share_its_check(tmp_path, monkeypatch):
    write(tmp_path / "long.wav", noise(1000), RATE)
    rows = [{"file": "long.wav", "offset": i / 10, "duration": 0.1, "label": "ab"[i % 2]} for i in range(10)]
    (tmp_path / "m.jsonl").write_text(jsonl(*rows))
    seen = []
    original = ajepa.data.index.inspect
    monkeypatch.setattr(ajepa.data.index, "inspect", lambda path, *a, **k: seen.append(path) or original(path, *a, **k))
    first = build_index(tmp_path / "m.jsonl")
    assert len(seen) == 1
    assert len(set(first.entries.names())) == 10
    assert list(first.entries.names()) == [entry.name for entry in first.entries]
    assert first.entries.numbers["start"].tolist() == list(range(0, 1000, 100))
    assert first.seconds == pytest.approx(1.0)
    assert classes(first)[:2] == ["a", "b"]
    assert build_index(tmp_path / "m.jsonl").fingerprint == first.fingerprint
    assert len(seen) == 1
    rows[3]["offset"] = 0.31
    (tmp_path / "m.jsonl").write_text(jsonl(*rows))
    moved = build_index(tmp_path / "m.jsonl")
    assert moved.fingerprint != first.fingerprint
    assert len(seen) == 1
    assert not moved.warnings


def test_segments_of_a_bad_file_are_skipped_one_by_one(tmp_path):
    (tmp_path / "bad.wav").write_bytes(b"x")
    write(tmp_path / "0.wav", noise(100), RATE)
    rows = [{"file": "bad.wav", "offset": i, "duration": 1} for i in range(2)]
    (tmp_path / "m.jsonl").write_text(jsonl(*rows, {"file": "0.wav"}))
    assert set(skipped(build_index(tmp_path / "m.jsonl"))) == {"bad.wav#t=0,1", "bad.wav#t=1,2"}


# ---- labels ----


@pytest.mark.parametrize(
    "value,label",
    [
        ("dog", "dog"), (" dog ", "dog"), ("", None), ("  ", None), (None, None), (float("nan"), None), ("nan", None),
        (3, "3"), (3.0, "3"), (3.5, "3.5"), (-1.0, "-1"), (True, "true"), (False, "false"), (0, "0"),
        ([], None), ([None, ""], None), (["dog"], "dog"), (["b", "a", "b"], '["b", "a"]'), ([1, 2.0], '["1", "2"]'),
        (["dog, big"], '["dog, big"]'), ([" a ", None, "b"], '["a", "b"]'), (["é", "日"], '["é", "日"]'),
        ('["dog", "cat"]', '["dog", "cat"]'), ("['dog', 'cat']", '["dog", "cat"]'), ("[noise]", "[noise]"),
        ("[a, b", "[a, b"), ("[1] one", "[1] one"), ("['a' 'b']", "['a' 'b']"), ("[]", None), ('["dog"]', "dog"),
    ],
)  # fmt: skip
def test_labels_as_text(value, label):
    assert encode_label(value) == label
    assert encode_label(label) == label  # a round trip through a shard keeps the label


def test_decode_label():
    assert decode_label('["dog", "cat"]') == ["dog", "cat"]
    assert decode_label("dog;cat") is None
    assert decode_label("[noise]") is None
    assert decode_label("[" * 100_000) is None


def test_labels_of_a_manifest(index, capsys):
    rows = [["dog"], ["cat"], ["dog", "cat"], [], None, float("nan"), "dog", 3.0]
    made = index(jsonl(*({"file": f"{i}.wav", "labels": v} for i, v in enumerate(rows))), "m.jsonl", len(rows))
    assert classes(made) == ["dog", "cat", '["dog", "cat"]', None, None, None, "dog", "3"]
    assert made.metadata["labels"][2] == '["dog", "cat"]'
    made = index("file,label\n0.wav,nan\n1.wav,None\n2.wav,x\n")
    assert classes(made) == [None, "None", "x"]
    err = capsys.readouterr().err
    assert "'nan', which is taken as no label" in err
    assert "'None', which is taken as a class" in err


def test_whole_numbers_that_a_data_frame_wrote_with_a_fraction(index):
    assert classes(index("file,label\n0.wav,3.0\n1.wav,\n2.wav,10.0\n")) == ["3", None, "10"]
    assert index("file,label\n0.wav,3.0\n1.wav,\n2.wav,10.0\n").label_names == ["3", "10"]
    assert classes(index("file,label\n0.wav,3.0\n1.wav,2.5\n2.wav,\n")) == ["3.0", "2.5", None]
    assert classes(index("file,version\n0.wav,3.0\n1.wav,1.0\n", label_column="version")) == ["3.0", "1.0"]


def test_rows_of_one_file_with_different_labels_are_reported(index, capsys):
    made = index("file,label,n\n0.wav,cat,1\n./0.wav,dog,2\n1.wav,cat,1\n1.wav,cat,1\n2.wav,cat,1\n2.wav,,1\n")
    assert len(made) == 6
    different, same = made.warnings
    assert "1 files are named by several rows with different labels" in different
    assert "0.wav: cat, dog)" in different
    assert "2 rows repeat the recording of an earlier row, 1 of them word for word" in same
    assert capsys.readouterr().err == f"warning: {different}\nwarning: {same}\n"
    assert index("file,label,split\n0.wav,cat,a\n0.wav,dog,b\n", where="split=a").warnings == []


# ---- Parquet ----


@pytest.fixture
def parquet(tmp_path) -> Callable:
    pyarrow = pytest.importorskip("pyarrow")

    def make(columns: dict, name: str = "m.parquet", types: dict | None = None):
        from pyarrow import parquet

        arrays = {name: pyarrow.array(values, (types or {}).get(name)) for name, values in columns.items()}
        parquet.write_table(pyarrow.table(arrays), tmp_path / name, row_group_size=3)
        return tmp_path / name

    return make


def test_parquet_values(tmp_path, parquet):
    write_set(tmp_path, 4, 100)
    columns = {"file": [f"{i:03d}.wav" for i in range(4)], "label": [3.0, None, float("nan"), 10.0],
               "tags": [["a", "b"], ["a"], [], None], "flag": [True, False, None, True],
               "vector": [[0.5], [1.5], [2.5], [3.5]], "raw": [b"1", b"2", b"3", b"4"]}  # fmt: skip
    made = build_index(parquet(columns))
    assert classes(made) == ["3", None, None, "10"]
    assert list(made.metadata["flag"]) == ["true", "false", "", "true"]
    assert "vector, raw" in made.warnings[0]
    tagged = build_index(tmp_path / "m.parquet", label_column="tags")
    assert classes(tagged) == ['["a", "b"]', "a", None, None]


@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_recordings_within_parquet(tmp_path, parquet, cache, capsys, kind):
    clips = [noise(100 + i, i) for i in range(5)]
    data = [encode(clip, RATE, kind) for clip, kind in zip(clips, ["wav16", "flac"] * 2 + ["wav16"], strict=True)]
    audio = [{"bytes": d, "path": f"/far/away/é{i}.wav"} for i, d in enumerate(data)] if kind == "struct" else data
    path = parquet({"file": ["gone.wav"] * 5, "audio": audio, "label": list("ababa"), "start": [None] * 4 + [0.05]})
    made = build_index(path)
    assert [entry.frames for entry in made.entries] == [100, 101, 102, 103, 54]
    assert classes(made) == list("ababa")
    assert made.metadata["file"][0] == "gone.wav"
    names = [entry.member for entry in made.entries]
    assert names[:2] == (
        ["000001-é0.wav", "000002-é1.wav"] if kind == "struct" else ["000001-audio.wav", "000002-audio.flac"]
    )
    assert made.entries[4].name.endswith("#t=0.05,0.104")
    (tar,) = (cache / "parquet").glob("*")
    for entry, whole in zip(made.entries, data, strict=True):
        assert tar.read_bytes()[entry.offset : entry.offset + entry.size] == whole
    assert capsys.readouterr().err.count("copied to") == 1
    before = tar.stat()
    assert build_index(path).entries == made.entries
    assert (tar.stat().st_ino, capsys.readouterr().err) == (before.st_ino, "")
    tar.unlink()
    assert build_index(path).entries == made.entries  # a second copy is the same file


def test_manifests_by_pattern(tmp_path, parquet):
    for i in range(2):
        parquet({"audio": [encode(noise(100 + i), RATE)], "label": ["ab"[i]], f"n{i}": [i]}, f"part-{i}.parquet")
    made = build_index(tmp_path / "part-*.parquet")
    assert [entry.frames for entry in made.entries] == [100, 101]
    assert classes(made) == ["a", "b"]
    assert {name: list(column) for name, column in made.metadata.items()} == {
        "label": ["a", "b"], "n0": ["0", ""], "n1": ["", "1"]}  # fmt: skip


def test_parquet_rows_of_bytes_and_of_paths(tmp_path, parquet):
    write_set(tmp_path, 1, 100)
    audio = [{"bytes": encode(noise(200), RATE), "path": None}, {"bytes": None, "path": "000.wav"},
             {"bytes": None, "path": None}, None, {"bytes": b"", "path": "x"}]  # fmt: skip
    made = build_index(parquet({"audio": audio}))
    assert [entry.frames for entry in made.entries] == [200, 100]
    assert [reason for _, reason in made.skipped] == ["the row names no file"] * 2 + ["empty file"]


def test_parquet_paths_alone_need_no_copy(tmp_path, parquet, cache):
    write_set(tmp_path, 2, 100)
    names = ["000.wav", "001.wav"]
    pyarrow = pytest.importorskip("pyarrow")
    kind = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    for audio in (names, [n.encode() for n in names], [{"path": n} for n in names]):
        assert files(build_index(parquet({"audio": audio}))) == names
    path = parquet({"speech": [{"bytes": None, "path": n} for n in names]}, types={"speech": kind})
    assert files(build_index(path)) == names
    assert not (cache / "parquet").exists() or not list((cache / "parquet").iterdir())


def test_recordings_within_parquet_need_room(parquet, monkeypatch, cache):
    path = parquet({"audio": [encode(noise(100), RATE)]})
    usage = ajepa.data.sources.parquet.shutil.disk_usage(path)._replace(free=100)
    with monkeypatch.context() as patch:
        patch.setattr(ajepa.data.sources.parquet.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(DataError, match="set AJEPA_CACHE to a folder on another disk"):
            build_index(path)
    (cache / "file").write_text("")
    monkeypatch.setenv("AJEPA_CACHE", str(cache / "file"))
    with pytest.raises(DataError, match=r"cannot be copied to .*set AJEPA_CACHE"):
        build_index(path)


def test_damaged_parquet_is_refused(tmp_path, parquet):
    path = parquet({"file": ["a.wav"]})
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(DataError, match="cannot be read"):
        build_index(path)


# ---- nothing is lost ----


@pytest.mark.parametrize("seed", range(20))
def test_every_line_of_a_random_tsv_is_an_entry_or_skipped(tmp_path, seed):
    rng = np.random.default_rng(seed)
    write(tmp_path / "0.wav", noise(100), RATE)
    pieces = ['"', "a", " ", ",", '""', "'", "b"]
    lines = []
    for _ in range(30):
        text = "".join(rng.choice(pieces, rng.integers(0, 6)))
        lines.append("\t".join(["0.wav", text, "en"] + ["surplus"] * int(rng.random() < 0.1)))
    (tmp_path / "m.tsv").write_text("path\tsentence\tlocale\n" + "\n".join(lines) + "\n")
    made = build_index(tmp_path / "m.tsv")
    assert len(made) + len(made.skipped) == len(lines)


def test_where_finds_a_value_within_a_list(tmp_path):
    write_set(tmp_path, 4)
    labels = [["dog", "cat"], ["dog"], "cat", ["cow"]]
    rows = [{"file": f"{i:03d}.wav", "labels": label} for i, label in enumerate(labels)]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def rows_of(where: str) -> list[str]:
        return [os.path.basename(entry.path) for entry in build_index(tmp_path / "m.jsonl", where=where).entries]

    assert rows_of("labels=dog") == rows_of("label=dog") == ["000.wav", "001.wav"]
    assert rows_of("labels=cat,cow") == ["000.wav", "002.wav", "003.wav"]
    assert rows_of("labels!=dog") == ["002.wav", "003.wav"]


def test_text_that_is_no_utf_8_can_be_shown(tmp_path, capsys):
    """Labels can come from a Latin-1 manifest, from bytes in a folder's name, or be half a surrogate pair in JSON."""
    write_set(tmp_path / "files", 2)
    rows = "file,label,who\nfiles/000.wav,café,é\nfiles/001.wav,b,x\n"
    (tmp_path / "m.csv").write_bytes(rows.encode("latin-1"))
    index = build_index(tmp_path / "m.csv")
    assert sorted(index.label_names) == ["b", "café"] and list(index.metadata["who"]) == ["é", "x"]
    assert "not UTF-8; labels such as 'café'" in capsys.readouterr().err
    (tmp_path / "m.jsonl").write_text('{"file": "files/000.wav", "label": "a\\ud83d"}\n')
    assert build_index(tmp_path / "m.jsonl").label_names == ["a\\ud83d"]
    for name in (b"caf\xe9", b"other"):
        write(tmp_path / "folders" / os.fsdecode(name) / "x.wav", noise(900, len(name)))
    index = build_index(tmp_path / "folders")
    assert sorted(index.label_names) == ["café", "other"] and len(index) == 2 and not index.skipped
