"Packaging: everything that it says comes from settings.ini."

from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

cfg = ConfigParser(delimiters=["="])
cfg.read("settings.ini", encoding="utf-8")
s = cfg["DEFAULT"]
setup(
    name=s["lib_name"],
    version=s["version"],
    author=s["author"],
    description=s["description"],
    keywords=s["keywords"].split(),
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=f">={s['min_python']}",
    packages=find_packages(include=["cmid", "cmid.*"]),
    package_data={"cmid.study": ["templates/*"]},
    install_requires=s["requirements"].split(),
    extras_require={"dev": s["dev_requirements"].split()},
    long_description=Path("README.md").read_text(encoding="utf-8") if Path("README.md").exists() else "",
    long_description_content_type="text/markdown",
    entry_points={
        "console_scripts": s["console_scripts"].split(),
        "nbdev": [f"{s['lib_path']}={s['lib_path']}._modidx:d"],
    },
)
