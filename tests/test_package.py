"""What a user gets from pip: a wheel with the modules and the backbone, and requirements free of development tools."""
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    pytest.importorskip("setuptools")
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-c", f"from setuptools import setup; import sys, runpy; sys.argv = ['setup.py', '-q', 'egg_info', '--egg-base', r'{out}', 'build', '-b', r'{out}/build', 'bdist_wheel', '-d', r'{out}']; runpy.run_path('setup.py')"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True, timeout=120)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_holds_modules_and_backbone(wheel):
    names = set(wheel.namelist())
    for path in (ROOT / "revela_nb").glob("*.py"): assert f"revela_nb/{path.name}" in names
    assert {"revela_nb/backbone/model.safetensors", "revela_nb/backbone/config.json", "revela_nb/backbone/tokenizer.json"} <= names
    size = sum(i.file_size for i in wheel.infolist() if i.filename.startswith("revela_nb/backbone/"))
    assert size <= 48e6, f"the backbone has {size/1e6:.1f} MB"


def test_requirements_are_for_users(wheel):
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    runtime = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert len(runtime) > 8 and not any(t in line for line in runtime for t in ("fastcore", "nbdev", "execnb", "pytest"))
    entry = wheel.read(next(n for n in wheel.namelist() if n.endswith("entry_points.txt"))).decode()
    assert "revela = revela_nb.cli:main" in entry or "revela=revela_nb.cli:main" in entry


def test_every_extra_is_offered(wheel):
    "Each NAME_requirements of settings.ini is an extra of the wheel; what tests skip for want of a package has one."
    metadata = wheel.read(next(n for n in wheel.namelist() if n.endswith("METADATA"))).decode()
    offered = set(re.findall(r"^Provides-Extra: (\w+)", metadata, re.M))
    assert offered == set(re.findall(r"^(\w+)_requirements = ", (ROOT / "settings.ini").read_text(encoding="utf-8"), re.M)) - {"conda"}
    for package, extra in (("deepspeed", "cluster"), ("datatrove", "cluster"), ("liger-kernel", "gpu"), ("mteb", "mteb"), ("pypdf", "files"), ("starlette", "serve")):
        assert re.search(rf'^Requires-Dist: {package}\b.*extra == ["\']{extra}["\']', metadata, re.M), f"{package} is not in the extra {extra}"
