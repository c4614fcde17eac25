"""A list of members is complete, whatever stands in the registry of one of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from registry_builders import three_clients

from fedcompo.cli.tables import print_list
from fedcompo.registry.inspection import DAMAGED, summary
from fedcompo.service.members import _listed


@pytest.fixture
def registry(tmp_path):
    return three_clients(tmp_path / "registry")


@pytest.mark.parametrize(
    "strange", [{"num_examples": 10**30}, {"num_examples": "x"}, {"classes": ("\ud800",)}], ids=str
)
def test_over_the_network_one_that_cannot_be_described_is_named(registry, strange):
    old = replace(registry.member("ada"), **strange)  # as an older version could take it in
    found = _listed(old, share=1000)
    assert (found.client, found.kind, found.num_examples) == ("ada", DAMAGED, 0)
    assert found.SerializeToString()


def test_names_of_classes_have_their_share_of_the_answer(registry):
    names = tuple(f"{i:03d}" + "x" * 97 for i in range(1000))
    found = _listed(replace(registry.member("ada"), classes=names), share=250)
    assert list(found.classes) == [*names[:2], "… and 998 more"]
    assert list(_listed(registry.member("ada"), share=250).classes) == ["cat", "dog"]


def test_here_one_whose_files_are_gone_is_named_and_the_others_are_listed(registry, capsys):
    file = next((registry.path / registry.member("ben").folder).iterdir())
    file.unlink()
    values = summary(registry)
    rows = {row["client"]: row for row in values["clients"]}
    assert [rows[c]["kind"] for c in ("ada", "ben", "cho")] == ["full", DAMAGED, "ia3"]
    assert "FileNotFoundError" in rows["ben"]["fault"]
    print_list(values)
    out = capsys.readouterr().out
    assert "ben cannot be described" in out and "cho" in out
