"""Blocks by name."""

import pytest

from keras_natgrad import blocks


def test_names():
    shape = blocks.BlockShape(3, 2)
    assert isinstance(blocks.create("kfac", shape), blocks.KroneckerBlock)
    assert isinstance(blocks.create("kronecker", shape), blocks.KroneckerBlock)
    assert isinstance(blocks.create("diagonal", shape), blocks.DiagonalBlock)
    assert isinstance(blocks.create("ekfac", shape), blocks.EigenBlock)
    assert isinstance(blocks.create("eigen", shape), blocks.EigenBlock)
    assert isinstance(blocks.create("full", shape), blocks.FullBlock)


def test_options_of_other_blocks_are_dropped():
    block = blocks.create(
        "full", blocks.BlockShape(3, 2), weight_sharing="reduce"
    )
    assert block.kind == "full"


def test_unknown_name():
    with pytest.raises(ValueError, match="Unknown block.*'none'"):
        blocks.check_kind("none")


def test_registration_of_a_new_name(monkeypatch):
    monkeypatch.setattr(
        blocks.registry, "_BLOCKS", dict(blocks.registry._BLOCKS)
    )

    @blocks.register_block("mine")
    class MyBlock(blocks.DiagonalBlock):
        pass

    assert blocks.check_kind("mine") == "mine"
    created = blocks.create("mine", blocks.BlockShape(3, 2))
    assert isinstance(created, MyBlock)
    # The same class again is harmless.
    assert blocks.register_block("mine")(MyBlock) is MyBlock


def test_taken_name():
    with pytest.raises(ValueError, match="'full' is taken"):

        @blocks.register_block("full")
        class Other(blocks.DiagonalBlock):
            pass


@pytest.mark.parametrize("value", [int, "block", None])
def test_only_blocks_can_be_registered(value):
    with pytest.raises(ValueError, match="decorates a subclass"):
        blocks.register_block("mine")(value)
