"""Copy the results of runs that were made before recipes had names into a study.

    python studies/import_runs.py RUNS studies/NAME

RUNS holds a folder for each run, named <recipe>-s<seed> (`cmid-long-s0` is the recipe `cmid_long`), and `prepare`
with the images' own results. A run's folder has what its `results` had: JSON files below <stage>/.../<init>. The init
of a pretrained network is renamed after its recipe, as a folder and in run.json; no other byte is changed.
"""

import re
import sys
from pathlib import Path

import yaml

PRETRAINED = "cmid", "byol"  # what the method of an init could be called


def renamed(init: str, recipe: str) -> str:
    "The name of an init; that of a baseline stays."
    method, backbone = init.split("-", 1)
    return f"{recipe}-{backbone}" if method in PRETRAINED else init


def import_run(run: Path, results: Path, recipe: str):
    "Copy the results of one run."
    for file in sorted(run.glob("*/**/*.json")):
        *folders, init = file.relative_to(run).parts[:-1]
        text = file.read_text(encoding="utf-8")
        if "-" in init:
            name = renamed(init, recipe)
            text = text.replace(f'"init": "{init}"', f'"init": "{name}"')
            init = name
        to = results.joinpath(*folders, init, file.name)
        to.parent.mkdir(parents=True, exist_ok=True)
        to.write_text(text, encoding="utf-8")


def main(runs: Path, study: Path):
    "Copy the results of all runs."
    seeds = yaml.safe_load((study / "params.yaml").read_text(encoding="utf-8")).get("seeds")
    for run in sorted(o for o in runs.iterdir() if o.is_dir()):
        found = re.fullmatch(rf"(?:{study.name.partition('-')[0]}-)?(.+)-s(\d+)", run.name)
        recipe, seed = found.groups() if found else ("", "0")
        results = study / f"seed-{seed}/results" if seeds else study / "results"
        import_run(run, results, recipe.replace("-", "_"))


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
