"""Notes on clients that come to classes of others."""

from fedcompo.report.newcomers import note_on_newcomers


def test_shards_of_one_client_are_no_newcomers_to_its_classes():
    """Yet a shard of another client is, also where a shard of its own was there before."""
    came = [(1, "a.shard-0", ["cat"]), (2, "a.shard-1", ["cat"]), (3, "b.shard-0", ["dog"])]
    assert note_on_newcomers(came) == ""
    assert "b.shard-1 ('cat')" in note_on_newcomers([*came, (4, "b.shard-1", ["cat", "dog"])])
