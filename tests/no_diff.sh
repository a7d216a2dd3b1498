#!/bin/sh
# Exporting and cleaning the notebooks must change nothing.
set -e
before=$(git status --porcelain -- cmid nbs; git diff -- cmid nbs | cksum)
nbdev_export
nbdev_clean
after=$(git status --porcelain -- cmid nbs; git diff -- cmid nbs | cksum)
[ "$before" = "$after" ] || { echo "nbdev_export or nbdev_clean changed something: run both and commit" >&2; git --no-pager diff --stat -- cmid nbs >&2; exit 1; }
echo "export and clean leave no diff"
