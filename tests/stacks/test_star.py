"""Star files are read as RELION reads them, or refused by name; what is written is read back, by starfile too."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import starfile

from cryo_lib.stacks.star import Star, text

CASES = Path(__file__).resolve().parents[3] / "shared" / "cases"
HEAD = "data_\n\nloop_\n_rlnImageName #1\n_rlnMicrographName #2\n_rlnDefocusU #3\n"


def read(tmp_path: Path, content: str | bytes, name: str = "") -> list[list]:
    path = tmp_path / "x.star"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return Star(path).table(name).to_numpy().tolist()


@pytest.mark.parametrize(
    "row, fields",
    [
        ("1@a.mrc m 1.5", ["1@a.mrc", "m", 1.5]),
        ('"1@a b.mrc" m 1.5', ["1@a b.mrc", "m", 1.5]),
        ("'1@a b.mrc'\t'm'  '1.5'", ["1@a b.mrc", "m", 1.5]),
        ("""'say "a"' "it's" 1.5""", ['say "a"', "it's", 1.5]),
        ("""'it's one' a'b 1.5""", ["it's one", "a'b", 1.5]),  # a quote ends a field before a blank only
        ("1@a#1.mrc m 1.5 # looked 'at", ["1@a#1.mrc", "m", 1.5]),
        ("'a #1.mrc' \"\" 1.5 #", ["a #1.mrc", "", 1.5]),
        ("data_1/a.mrc _m 1.5", ["data_1/a.mrc", "_m", 1.5]),
        (";a.mrc [1,1] 1.5", [";a.mrc", "[1,1]", 1.5]),
        ("None NaN nan", ["None", "NaN", np.nan]),
    ],
)
def test_fields_are_those_of_relion(tmp_path, row, fields):
    assert repr(read(tmp_path, f"{HEAD}x y 1\n{row}\n")[1]) == repr(fields)


@pytest.mark.parametrize(
    "content",
    [
        HEAD + "a b 1\nc d 2\n",
        HEAD + "# one\n\na b 1\n  # two\n\n \nc d 2",
        "\ufeff" + HEAD + "a b 1\nc d 2\n\n",
        HEAD.replace("\n", "\r\n") + "a b 1\r\nc d 2\r\n",
        "  data_  # the first\n# by a script\n\nloop_ \n# one\n_rlnImageName\n\n# two\n_rlnMicrographName #2 [A text]\n"
        "_rlnDefocusU\na b 1\nc d 2\n",
        HEAD + "a b 1\nc d 2\n\ndata_optics\n\nloop_\n_rlnVoltage #1\n300\n",
    ],
)
def test_blank_lines_comments_marks_and_line_ends_do_not_matter(tmp_path, content):
    assert read(tmp_path, content) == [["a", "b", 1], ["c", "d", 2]]


def test_a_list_of_labels_and_values_is_one_row(tmp_path):
    content = (
        "data_general\n\n_rlnImageName  'a b'\n_rlnFinalResolution #2  \n_rlnDefocusU 1.5 # A\n\n" + HEAD + "a b 1\n"
    )
    assert read(tmp_path, content, "general") == [["a b", "", 1.5]]
    assert read(tmp_path, content.replace("#2", "10.5"), "general") == [["a b", 10.5, 1.5]]


@pytest.mark.parametrize(
    "content, message",
    [
        (HEAD + 'a b 1\nc "d 2\ne f 3\ng "h 4\n', 'data_, row 2: expected a closing ", got .*close it'),
        (HEAD + "a b 1\nc 'd'2 3\n", "data_, row 2: expected a closing '"),
        (HEAD + "a b\nc d 2 3\n", "data_, row 1: expected 3 fields, got 2"),
        (HEAD + "a b 1\rc d 2\n", "data_, row 1: expected 3 fields, got 6"),
        (HEAD + "\n", "data_: expected distinct columns and rows, got .*no rows"),
        (HEAD.replace("rlnMicrographName", "rlnImageName") + "a b 1\n", "data_: expected distinct columns"),
        (HEAD + "a b 1\n" + HEAD + "c d 2\n", "expected blocks of different names, got data_ twice"),
        ("data_optics\n\nloop_\n_a\n1\n", "data_: expected this table, got optics"),
    ],
)
def test_what_is_no_table_is_refused_by_name(tmp_path, content, message):
    with pytest.raises(ValueError, match=f"x.star: {message}"):
        read(tmp_path, content)


def test_a_replaced_column_leaves_every_other_byte(tmp_path):
    path = tmp_path / "x.star"
    path.write_bytes(
        b"# head\n\n" + HEAD.encode() + b" 'a a'\tm\xe9 1.0 # note\n\n# gone\nc  \"d d\"  2 \n\ndata_b\n_c 1\n"
    )
    star = Star(path)
    head, tail = b"# head\n\n" + HEAD.encode() + b" ", b"\ndata_b\n_c 1\n"
    rows = [b"1@x\tm\xe9 1.0 # note\n", b'2@x  "d d"  2 \n']
    assert b"".join(star.replaced("", {"rlnImageName": ["1@x", "2@x"]})) == head + b"".join(rows) + tail
    assert b"".join(star.replaced("", {"rlnImageName": ["2@x"]}, [False, True])) == head + rows[1] + tail
    with pytest.raises(ValueError):
        list(star.replaced("", {"rlnImageName": ["1@x"]}))


def test_a_new_column_comes_last_whatever_else_is_replaced(tmp_path):
    path = tmp_path / "x.star"
    path.write_bytes(HEAD.encode() + b"\n a 'b c' 1.5 # note\nd e 2\n\ndata_b\n_c 1\n")
    columns = {"new": ["7", "8"], "rlnDefocusU": ["10", "20"], "rlnImageName": ["1@longer", "2@longer"]}
    path.write_bytes(b"".join(Star(path).replaced("", columns)))
    table = Star(path).table("")
    assert list(table)[-1] == "new" and table["new"].tolist() == [7, 8] and table["rlnDefocusU"].tolist() == [10, 20]
    assert table["rlnImageName"].tolist() == ["1@longer", "2@longer"] and Star(path).table("b")["c"].tolist() == [1]
    assert table["rlnMicrographName"].tolist() == ["b c", "e"] and b"7 # note\n" in path.read_bytes()


def test_written_tables_are_read_back_by_us_and_by_starfile(tmp_path):
    optics = pd.DataFrame({"rlnOpticsGroupName": ["a b"], "rlnOpticsGroup": [1]})
    table = pd.DataFrame({"rlnImageName": ["1@a.mrc", "2@a.mrc"], "rlnDefocusU": [1.5, np.nan], "rlnOpticsGroup": 1})
    path = tmp_path / "x.star"
    path.write_bytes(text({"optics": optics, "particles": table}))
    star, theirs = Star(path), starfile.read(path)
    for name, expected in (("optics", optics), ("particles", table)):
        pd.testing.assert_frame_equal(star.table(name), expected, check_dtype=False)
        pd.testing.assert_frame_equal(theirs[name], expected, check_dtype=False)


@pytest.mark.parametrize(
    "value", ["a", "", "a b", "it's", "'a", 'say "a"', '"', "#1", "a#1", "_a", "None", " ", "é", "x\ty"]
)
def test_text_that_is_written_is_read_as_it_was(tmp_path, value):
    table = pd.DataFrame({"rlnMicrographName": [value, "b"], "rlnDefocusU": [1.5, 2.5], "rlnOtherName": ["c", value]})
    path = tmp_path / "x.star"
    path.write_bytes(text({"particles": table}))
    pd.testing.assert_frame_equal(Star(path).table("particles"), table, check_dtype=False)


@pytest.mark.parametrize("value", [None, float("nan"), "a\nb", "a\rb", "\"'", "a\0", 1.5j])
def test_text_that_would_be_read_as_another_is_refused(value):
    with pytest.raises(ValueError, match="data_particles: rlnMicrographName, row 2: expected text of one line"):
        text({"particles": pd.DataFrame({"rlnMicrographName": ["a", value]}, dtype=object)})


@pytest.mark.skipif(not CASES.is_dir(), reason=f"the cases {CASES} are not there")
def test_every_case_is_read_or_refused():
    rows = {"fractional_number": 2, "relion5_2dstacks": 3, "subtomograms": 3}
    for path in CASES.glob("*.star"):
        if path.stem == "unclosed_quote":
            with pytest.raises(ValueError, match="row 1: expected a closing"):
                Star(path).table("particles")
        else:
            star = Star(path)
            assert len(star.table(star.find("rlnImageName"))) == rows.get(path.stem, 6), path
            assert all(len(star.table(name)) for name in star.blocks)
