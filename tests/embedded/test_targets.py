"""Every target gives the bits of Python's Session, and torch's numbers within the bounds of models.py."""

import hashlib

import numpy as np
import pytest
from models import NARROW, TOLERANCES, file_name
from targets import TARGETS

by_name = pytest.mark.parametrize("target", [t for t in TARGETS if t.run], ids=lambda target: target.name)


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)
def test_builds_and_runs(outcome, target):
    """Or builds alone, if it is for a system that is not here."""
    outcome.result()


def answered(folder, name):
    return np.fromfile(folder / f"{file_name(name)}.y", np.float32)


def expected(jobs, target, name):
    """Sections of the Session's answers that the target's driver writes."""
    sections = np.load(jobs.path / f"{file_name(name)}.{jobs.instruction_sets[target.group]}.npz")
    return {section: sections[section] for section in sections.files}


@by_name
@pytest.mark.parametrize("name", TOLERANCES)
def test_bits_are_those_of_the_session(answers, jobs, target, name):
    got = answered(answers, name)
    sections = expected(jobs, target, name)
    assert got.size == sum(values.size for values in sections.values())
    for section, values in sections.items():
        part, got = np.split(got, [values.size])
        np.testing.assert_array_equal(part, values.ravel(), section)


@by_name
@pytest.mark.parametrize("name", TOLERANCES)
def test_numbers_are_those_of_torch(answers, jobs, row, target, name):
    truth = np.load(jobs.path / f"{file_name(name)}.torch.npy")
    sections = expected(jobs, target, name)
    section = "forecast" if name == "bidirectional" else "run"
    begin = sum(sections[before].size for before in list(sections)[: list(sections).index(section)])
    got = answered(answers, name)[begin : begin + truth.size].reshape(truth.shape)
    row.errors[name] = float(np.abs(got.astype(np.float64) - truth).max() / np.ptp(truth))
    assert row.errors[name] <= TOLERANCES[name]


@by_name
def test_hash_is_that_of_the_group(answers, jobs, row, target):
    """One for the answers of all float32 models in a group, one for those of narrow weights."""

    def digest(all_answers):
        return hashlib.sha256(b"".join(values.tobytes() for values in all_answers)).hexdigest()[:16]

    for kind, names in (("float32", [name for name in TOLERANCES if name not in NARROW]), ("narrow", NARROW)):
        row.hashes[kind] = digest(answered(answers, name) for name in names)
        session = (values for name in names for values in expected(jobs, target, name).values())
        assert row.hashes[kind] == digest(session), kind
