"Label files of DOTA in the forms that exist."

from cmid.data.box_files import read_dota


def test_carriage_returns_byte_order_mark_and_no_difficulty(tmp_path):
    box = b"0 0 4 0 4 2 0 2 "
    header = b"\xef\xbb\xbfimagesource:GoogleEarth\r\ngsd:null\r\n"
    (tmp_path / "P.txt").write_bytes(header + box + b"7\r\n" + box + b"7\r\n" + box + b"tent 2\r\n")
    found = read_dota(tmp_path / "P.txt", ["7"], ["tent"])
    assert found["classes"].tolist() == [0, 0]
    assert found["difficult"].tolist() == [False, False]
    assert found["gsd"] is None
    assert (found["ignored"], found["repeated"]) == (1, 1)
