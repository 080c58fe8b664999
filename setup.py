"""What pyproject.toml cannot say: the folder-to-package mapping and the cffi extension."""

from setuptools import find_packages, setup

SUBSYSTEMS = ("engine", "images", "lazy_pages", "pageserver", "transport")

packages = ["phaul", *(f"phaul.{sub}" for sub in find_packages("phaul"))]
packages = [p for p in packages if p.split(".")[1:2] == [] or p.split(".")[1] not in SUBSYSTEMS]
for name in SUBSYSTEMS:
    packages += [f"phaul.{name}", *(f"phaul.{name}.{sub}" for sub in find_packages(name))]

setup(
    packages=packages,
    package_dir={"phaul": "phaul", **{f"phaul.{name}": name for name in SUBSYSTEMS}},
    package_data={
        "phaul": ["py.typed"],
        **{package: ["*.pyi"] for package in ("phaul.engine", "phaul.images.pb", "phaul.pb")},
    },
    cffi_modules=["engine/_native_build.py:ffi"],
)
