"""Versions: which weights a seed holds, told and compared between processes."""

from typing import Any

import pytest
import torch
from seed_leases import SECONDS, model

import tensorfork
from tensorfork import Version


def test_a_version_counts_changes_and_has_the_label_of_the_last() -> None:
    with tensorfork.publish(model(), version="base") as seed:
        first = seed.version
        assert (first.counter, first.label) == (0, "base")
        with seed.updating(version="step-1200"):
            pass
        assert (seed.version.lineage, seed.version.counter, seed.version.label) == (first.lineage, 1, "step-1200")
        with seed.updating():
            pass
        assert (seed.version.counter, seed.version.label) == (2, None)
        with pytest.raises(RuntimeError), seed.updating(version="half"):
            raise RuntimeError
        assert seed.version.counter == 2
        seed.suspend()
        seed.resume()
        assert seed.version.counter == 2


def test_two_models_that_are_loaded_begin_two_lineages() -> None:
    with tensorfork.publish(model()) as one, tensorfork.publish(model()) as other:
        assert one.version.lineage != other.version.lineage


def test_the_content_is_there_once_digests_are_and_is_the_same_wherever_the_bytes_are() -> None:
    with tensorfork.publish(model(2.0)) as one, tensorfork.publish(dict(reversed(model(2.0).items()))) as other:
        assert one.version.content is None
        reports = [tensorfork.fork_into(model(), seed.address, timeout=SECONDS) for seed in (one, other)]
        contents = {report.version.content for report in reports if report.version}
        assert contents == {one.version.content} == {other.version.content}
        assert len(contents.pop() or "") == 32
        with one.updating():
            pass
        assert one.version.content is None


def test_other_bytes_are_another_content() -> None:
    contents = set()
    for value in (1.0, 2.0):
        with tensorfork.publish(model(value)) as seed:
            report = tensorfork.fork_into(model(), seed.address, timeout=SECONDS)
            assert report.version
            contents.add(report.version.content)
    assert len(contents) == 2


def test_without_verification_the_content_is_not_known() -> None:
    with tensorfork.publish(model()) as seed:
        report = tensorfork.fork_into(model(), seed.address, timeout=SECONDS, verify=False)
        assert report.version == seed.version
        assert report.version is not None
        assert report.version.content is None


@pytest.mark.parametrize("kind", ["in place", "meta", "copy"])
def test_a_fork_inherits_the_version_until_it_changes_the_weights(kind: str) -> None:
    with tensorfork.publish(model(2.0)) as seed:
        with seed.updating(version="step-1"):
            pass
        ours: dict[str, torch.Tensor] = model()
        if kind == "meta":
            ours = {name: tensor.to("meta") for name, tensor in ours.items()}
        if kind == "copy":
            ours = tensorfork.fork(seed.address, timeout=SECONDS)
        else:
            tensorfork.fork_into(ours, seed.address, timeout=SECONDS)
        with tensorfork.publish(ours) as relay:
            assert (relay.version.lineage, relay.version.counter) == (seed.version.lineage, 1)
            assert relay.version.label == "step-1"
            with relay.updating():
                pass
            assert relay.version.counter == 2
        ours["layer.3"].add_(1.0)
        with tensorfork.publish(ours) as changed:
            assert changed.version.lineage != seed.version.lineage


def test_a_version_can_be_handed_on_explicitly() -> None:
    with tensorfork.publish(model()) as seed:
        report = tensorfork.fork_into(ours := model(), seed.address, timeout=SECONDS)
        for tensor in ours.values():
            tensor.mul_(1.0)
        with tensorfork.publish(ours, version=report.version) as relay:
            assert relay.version.lineage == seed.version.lineage


def has(lineage: str, **changes: Any) -> Version:
    return Version(**{"lineage": lineage, "counter": 2, "label": "step-2", **changes})


def test_a_fork_takes_only_a_version_that_will_do() -> None:
    with tensorfork.publish(model(), version=has("0123")) as seed:
        content = tensorfork.fork_into(model(), seed.address, timeout=SECONDS).version.content  # type: ignore[union-attr]
        wanted: list[dict[str, Any]] = [
            {"version": "step-2"},
            {"version": has("0123")},
            {"version": has("0123", content=content)},
            {"version": has("0123", label=None)},
            {"at_least": 2},
            {"at_least": has("0123")},
            {"at_least": has("0123", counter=0)},
        ]
        unwanted: list[dict[str, Any]] = [
            {"version": "step-3"},
            {"version": has("4567")},
            {"version": has("0123", counter=3)},
            {"version": has("0123", content="0" * 32)},
            {"at_least": 3},
            {"at_least": has("0123", counter=3)},
            {"at_least": has("4567", counter=0)},
        ]
        for terms in wanted:
            tensorfork.fork_into(model(), seed.address, timeout=SECONDS, **terms)
        for terms in unwanted:
            ours = model(-1.0)
            with pytest.raises(tensorfork.VersionMismatch, match="was asked for"):
                tensorfork.fork_into(ours, seed.address, timeout=SECONDS, **terms)
            assert all(bool((tensor == -1.0).all()) for tensor in ours.values())
            with pytest.raises(tensorfork.VersionMismatch):
                tensorfork.fork(seed.address, timeout=SECONDS, **terms)


def test_a_content_that_turns_out_to_be_another_is_refused_after_the_copy() -> None:
    """The seed had not computed its digests when the lease was granted."""
    with tensorfork.publish(model(), version=has("0123")) as seed:
        meta = {name: tensor.to("meta") for name, tensor in model().items()}
        with pytest.raises(tensorfork.VersionMismatch, match="content"):
            tensorfork.fork_into(meta, seed.address, timeout=SECONDS, version=has("0123", content="0" * 32))
        assert all(tensor.is_meta for tensor in meta.values())


@pytest.mark.parametrize("terms", [{"version": 3}, {"version": b"x"}, {"at_least": "x"}, {"at_least": True}], ids=repr)
def test_what_is_no_version_is_a_type_error(terms: dict[str, Any]) -> None:
    with tensorfork.publish(model()) as seed, pytest.raises(TypeError):
        tensorfork.fork(seed.address, timeout=SECONDS, **terms)
    if "version" in terms:
        with pytest.raises(TypeError):
            tensorfork.publish(model(), **terms)
