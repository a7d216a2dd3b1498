"A linked folder among the images of a study: refused at every `dvc repro`, also where it is added after the first run."

import shutil

import pytest

from tests.tools.study import Study

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    "A study whose unlabelled images are prepared, and other images outside."
    study = Study(tmp_path_factory.mktemp("study"))
    study.other = tmp_path_factory.mktemp("other")
    for path in sorted((study.folder / "data/pool").glob("*"))[:3]:
        shutil.copy(path, study.other)
    assert study.dvc("repro", "prepare@pool") == ["digest", "prepare@pool"]
    return study


def test_a_link_that_is_added_later_is_refused(study):
    link = study.folder / "data/pool/more"
    link.symlink_to(study.other)
    assert study.dvc("repro", "prepare@pool", fails=True) == []
    assert (
        f"datasets.pool.folder: more in data/pool links to a folder, in which DVC sees no change; name {study.other}"
        in (study.said)
    )
    assert (study.folder / "prepared/pool/manifest.json").exists(), "what was made is left"
    link.unlink()
    assert study.dvc("repro", "--dry", "prepare@pool") == []


def test_links_to_files_rerun_when_their_targets_change(study):
    folder = study.folder / "data/pool/more"
    folder.mkdir()
    for path in study.other.iterdir():
        (folder / path.name).symlink_to(path)
    assert study.dvc("repro", "prepare@pool") == ["prepare@pool"]
    before = study.json("prepared/pool/manifest.json")
    first, second = sorted(study.other.iterdir())[:2]
    shutil.copy(second, first)
    assert study.dvc("repro", "prepare@pool") == ["prepare@pool"]
    after = study.json("prepared/pool/manifest.json")
    assert after["counts"] == before["counts"]
    assert after["hash"] != before["hash"]
