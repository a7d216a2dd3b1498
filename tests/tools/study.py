"A study under DVC, in a copy of the project."

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from cmid.study.smoke import smoke_data, smoke_landscape, smoke_tasks

ROOT = Path(__file__).parents[2]
TASKS = dict(segment="land", change="dates", detect="objects")
INIT = "cmid-resnet18"


def environment(folder, *code):
    "Variables of a command in a study: with our programs, and the study's code before that in `code`."
    return os.environ | dict(
        PYTHONPATH=os.pathsep.join(map(str, [folder, *code])),
        PATH=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        CMID_ROOT=str(folder),
        OMP_NUM_THREADS="1",
    )


class Study:
    "A copy of the project with the smoke profile and a little generated imagery."

    def __init__(self, folder):
        self.folder = folder
        self.said = ""
        self.copy_project()
        smoke_data(folder)
        smoke_tasks(folder, TASKS.values())
        smoke_landscape(folder)
        self.commit()

    def copy_project(self):
        listed = ["git", "ls-files", "-co", "--exclude-standard", "-z"]
        names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0")
        left_out = "results/", "studies/", "tests/", "data.dvc", "dvc.lock"
        for name in filter(None, names):
            if (ROOT / name).is_file() and not name.startswith(left_out):
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, self.folder / name)
        self.edit("params.yaml", r"^profile: \w+", "profile: smoke")
        self.edit("params.yaml", "^device: auto", "device: cpu")
        floors = "{probe: [imagestats, randomconv], segment: [unet], change: [unet]}"
        self.edit("params.yaml", r"(?<=^  floors: ){.*}", floors)

    def commit(self):
        who = ["-c", "user.name=cmid", "-c", "user.email=cmid@example.com"]
        for args in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "study"]):
            subprocess.run(["git", *args], cwd=self.folder, check=True, capture_output=True)

    def dvc(self, *args, fails=False):
        "Names of the stages that ran, or would run; `folders`, which always runs, is left out."
        done = subprocess.run(
            ["dvc", *args], cwd=self.folder, env=environment(self.folder), capture_output=True, text=True
        )
        self.said = done.stdout + done.stderr
        assert (done.returncode != 0) == fails, self.said[-5000:]
        return [o for o in re.findall(r"Running stage '([^']+)'", self.said) if o != "folders"]

    def edit(self, path, pattern, new):
        "Replace the first match in a file."
        file = self.folder / path
        text = file.read_text(encoding="utf-8")
        edited, count = re.subn(pattern, lambda match: new, text, count=1, flags=re.M)
        assert count, f"{path}: {pattern}"
        file.write_text(edited, encoding="utf-8")

    def json(self, path):
        return json.loads((self.folder / path).read_text())

    def metrics(self, *parts):
        return self.json(Path("results", *parts, "metrics.json"))

    def model(self):
        return (self.folder / "models" / INIT / "model.safetensors").read_bytes()
