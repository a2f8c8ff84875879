"""The build: which packages there are and what travels with them. All Python; nothing is compiled.

Name, version and requirements stand in pyproject.toml. `train.py`, `bench` and `tests` are run from the checkout and
not installed.
"""

from setuptools import find_packages, setup

setup(
    packages=find_packages(include=["reason_rl", "reason_rl.*", "kernels", "kernels.*"]),
    package_data={"reason_rl": ["**/*.jinja", "**/*.css", "**/*.js"]},
)
