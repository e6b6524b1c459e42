"""What a release needs to agree on: the version, the files of this version, the workflows and what SECURITY.md points to."""

import re
from pathlib import Path

import pytest
import yaml

import diffusers_dti

ROOT = Path(__file__).parents[1]
VERSION = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)[1]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))


def jobs_of(workflow):
    return yaml.safe_load(workflow.read_text())["jobs"]


def test_the_version_is_the_same_everywhere():
    assert diffusers_dti.__version__ == VERSION
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == VERSION
    newest = re.search(r"^## (\S+) \((unreleased|\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert newest[1] == VERSION
    assert "dev" in VERSION or (ROOT / "tests" / "regression" / VERSION / "expected.json").is_file()


@pytest.mark.parametrize("workflow", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_and_have_no_rights(workflow):
    text = workflow.read_text()
    assert yaml.safe_load(text)["permissions"] == {}
    assert all(job["permissions"] for job in jobs_of(workflow).values())
    for action, pin in re.findall(r"uses: (\S+?)(?:@(.*))?$", text, re.M):
        assert action.startswith("./") or re.fullmatch(r"[0-9a-f]{40} # v\d+\.\d+\.\d+", pin), (action, pin)
    for job in jobs_of(workflow).values():
        for step in job.get("steps", []):
            assert "actions/checkout" not in step.get("uses", "") or step["with"] == {"persist-credentials": False}


def test_only_publishing_may_ask_for_an_identity():
    asking = []
    for workflow in WORKFLOWS:
        for name, job in jobs_of(workflow).items():
            if job["permissions"] != {"contents": "read"}:
                asking.append((workflow.name, name))
    assert asking == [("release.yml", "publish")]
    (release,) = (jobs_of(workflow) for workflow in WORKFLOWS if workflow.name == "release.yml")
    assert release["publish"]["permissions"] == {"id-token": "write"} and release["publish"]["needs"] == "tests"


def test_security_points_to_tests_that_exist():
    names = re.findall(r"`((?:tests/)?[\w/]*test_\w+\.py)`", (ROOT / "SECURITY.md").read_text())
    assert len(names) > 10
    for name in names:
        found = [ROOT / name] if "/" in name else list((ROOT / "tests").rglob(name))
        assert len(found) == 1 and found[0].is_file(), name
